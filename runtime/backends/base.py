"""What a backend is, and what all backends have in common.

A `Backend` belongs to one target of an engines folder, and threads may share it. An `Execution`
owns buffers, bindings and streams. A call checks one out of a pool and gives it back, so there are
as many as calls that ran at the same time, up to the limit of the backend. Hidden states are opaque
to the engine: only the outputs of exit heads reach it.
"""

from __future__ import annotations

import math
import re
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..artifact.folder import resolve
from ..artifact.manifest import NEXT, BuiltFile, Graph, Manifest, Target, TensorSpec
from ..encoding import Arrays, EncodedRow, padding_values
from ..errors import BackendError

Rows = NDArray[np.intp]
"""Row numbers within a group, from 0."""
BufferName = tuple[str, int]

# Most memory of a window: the hidden states of all its rows, once as input and once as output.
_WINDOW_BYTES = 256 * 2**20

# NumPy lacks these types, so their bits are handled as integers.
_DTYPES = {"bfloat16": np.dtype(np.uint16)}


@dataclass(frozen=True)
class Bucket:
    """Padded shape of a group.

    Attributes:
        batch: rows, rows of padding included.
        sequence: tokens in a row, padding included.
    """

    batch: int
    sequence: int


@dataclass(frozen=True)
class Limits:
    """Shapes that a backend runs.

    Attributes:
        max_batch: most rows in a group.
        max_sequence: longest row, in tokens.
        group_tokens: padded tokens of a group that runs efficiently; more rows are split.
        batch_sizes: the batch sizes to pad to, ascending; empty: any size is possible.
        sequence_lengths: the lengths to pad to, ascending; empty: any length is possible.
        lengths_alone: the lengths to pad to if a group starts with a single row, ascending; empty:
            `sequence_lengths`.
    """

    max_batch: int
    max_sequence: int
    group_tokens: int
    batch_sizes: tuple[int, ...] = ()
    sequence_lengths: tuple[int, ...] = ()
    lengths_alone: tuple[int, ...] = ()

    def bucket(self, rows: int, longest: int, alone: bool = False) -> Bucket:
        """The smallest shape that holds `rows` rows of at most `longest` tokens.

        Args:
            rows: the number of rows.
            longest: the number of tokens of the longest row.
            alone: whether the group starts with a single row.
        """
        lengths = (alone and self.lengths_alone) or self.sequence_lengths
        return Bucket(_at_least(rows, self.batch_sizes), _at_least(max(1, longest), lengths))


def _at_least(value: int, steps: tuple[int, ...]) -> int:
    position = bisect_left(steps, value)
    return steps[position] if position < len(steps) else value


@dataclass(frozen=True, slots=True)
class GraphCall:
    """A graph's run within a segment, and the buffer of each input and output.

    A tensor that several segments write (`next_X` replaces `X`) alternates between two buffers,
    `(X, 0)` and `(X, 1)`. The plan is made before anything runs.
    """

    graph: str
    inputs: tuple[tuple[str, BufferName], ...]
    outputs: tuple[tuple[str, BufferName], ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """A segment's calls.

    Attributes:
        live: the buffers of all tensors that it or a later segment reads, by tensor.
        calls: in order.
    """

    live: Mapping[str, BufferName]
    calls: tuple[GraphCall, ...]


def plan_buffers(manifest: Manifest) -> list[Stage]:
    """For every segment, the buffer of each tensor of each call."""
    turn: dict[str, int] = {}
    planned = []
    for segment, live in zip(manifest.segments, _live_tensors(manifest), strict=True):
        before = {name: (name, turn.setdefault(name, 0)) for name in sorted(live)}
        calls = []
        for name in segment.calls:
            graph = manifest.graphs[name]
            inputs = tuple((spec.name, (spec.name, turn[spec.name])) for spec in graph.inputs)
            outputs = []
            for spec in graph.outputs:
                tensor = spec.name.removeprefix(NEXT)
                turn[tensor] = 1 - turn.get(tensor, 1)
                outputs.append((spec.name, (tensor, turn[tensor])))
            calls.append(GraphCall(name, inputs, tuple(outputs)))
        planned.append(Stage(before, tuple(calls)))
    return planned


def _live_tensors(manifest: Manifest) -> list[set[str]]:
    """For each segment, the tensors that exist before it and that it or a later segment reads."""
    live: list[set[str]] = []
    needed: set[str] = set()
    for segment in reversed(manifest.segments):
        for name in reversed(segment.calls):
            graph = manifest.graphs[name]
            needed -= {spec.name.removeprefix(NEXT) for spec in graph.outputs}
            needed |= {spec.name for spec in graph.inputs}
        live.insert(0, set(needed))
    return live


def carried_specs(graphs: Mapping[str, Graph]) -> dict[str, TensorSpec]:
    """Every tensor between and around graphs, by name; `next_X` counts as `X`."""
    return {
        spec.name.removeprefix(NEXT): spec
        for graph in graphs.values()
        for spec in (*graph.inputs, *graph.outputs)
    }


def shape_of(spec: TensorSpec, bucket: Bucket) -> tuple[int, ...]:
    """A tensor's shape in a bucket."""
    sizes = {"batch": bucket.batch, "sequence": bucket.sequence}
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def dtype_of(spec: TensorSpec) -> np.dtype[Any]:
    """The NumPy type that holds the bits of a tensor."""
    return _DTYPES.get(spec.dtype) or np.dtype(spec.dtype)


def nbytes_of(spec: TensorSpec, bucket: Bucket) -> int:
    """A tensor's size in bytes at a padded shape."""
    return int(np.prod(shape_of(spec, bucket))) * dtype_of(spec).itemsize


def window_tokens(manifest: Manifest, limits: Limits) -> int:
    """Most tokens of a window of rows whose hidden states are in memory at a time.

    Each tensor that segment 1 passes on counts twice: as an input and as an output of a segment.
    The rows are assumed to be the longest ones, because a position bias takes most memory there.
    """
    sequence = limits.max_sequence
    bucket = Bucket(max(1, limits.group_tokens // sequence), sequence)
    outputs = [
        spec for name in manifest.segments[0].calls for spec in manifest.graphs[name].outputs
    ]
    size = sum(nbytes_of(spec, bucket) for spec in outputs if spec.name.startswith(NEXT))
    per_token = max(1, 2 * size // (bucket.batch * sequence))
    return max(limits.group_tokens, _WINDOW_BYTES // per_token)


V = TypeVar("V")
S = TypeVar("S")


class Buffers(ABC, Generic[V, S]):
    """The memory of one group at one padded shape, and prepared runs of segments over it.

    `V` is how a backend holds one buffer, and `S` is what it prepares to run a segment.

    Attributes:
        bucket: the padded shape.
        nbytes: memory that is held so far, in bytes.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.nbytes = 0
        self._values: dict[BufferName, V] = {}
        self._steps: dict[int, S] = {}

    def buffer(self, name: BufferName) -> V:
        """A buffer, allocated on first use."""
        value = self._values.get(name)
        if value is None:
            value = self._values[name] = self._allocate(name)
        return value

    def step(self, segment: int) -> S:
        """What runs a segment, counted from 0, prepared on first use."""
        step = self._steps.get(segment)
        if step is None:
            step = self._steps[segment] = self._prepare(segment)
        return step

    @abstractmethod
    def _allocate(self, name: BufferName) -> V:
        """Allocate a buffer, and add its size to `nbytes`."""

    @abstractmethod
    def _prepare(self, segment: int) -> S:
        """Prepare to run a segment."""

    def free(self) -> None:
        """Free the memory, unless it is freed together with this object."""


B = TypeVar("B", bound=Buffers[Any, Any])


@dataclass(slots=True, eq=False)
class Hidden(Generic[B]):
    """The hidden states of a group between two segments, and what travels with its rows.

    Attributes:
        rows: real rows; the rest of the bucket is padding.
        buffers: the memory.
        segment: the segment that runs next, from 0.
    """

    rows: int
    buffers: B
    segment: int = 0

    @property
    def bucket(self) -> Bucket:
        """Padded shape."""
        return self.buffers.bucket


class Pending(Protocol):
    """Outputs of an exit head, which may not have been computed yet."""

    def result(self) -> Arrays:
        """Wait for the outputs.

        Returns:
            Arrays by name: `logits` is `[rows, labels]` float32. They may be views of memory that
            is overwritten when the second segment after this one is enqueued, or after the group
            is released.
        """


class Execution(ABC, Generic[B]):
    """Runs segments over pooled buffers, for one call at a time.

    Args:
        backend: the backend.
        most_bytes: unused buffers are kept up to this size, in bytes.

    Attributes:
        lookahead: whether `enqueue` returns before the segment has run. If so, the next segment
            is enqueued before this one's exit is read.
    """

    lookahead: ClassVar[bool]

    def __init__(self, backend: Backend[B], most_bytes: int) -> None:
        self._stages = backend.stages
        self._specs = backend.specs
        self._padding = backend.padding
        self._most_bytes = most_bytes
        self._unused: OrderedDict[Bucket, list[B]] = OrderedDict()  # last used last
        self._unused_bytes = 0
        self._taken: set[B] = set()

    def begin(self, encoded: Sequence[EncodedRow], bucket: Bucket) -> Hidden[B]:
        """Put the tokens of a group where segment 1 reads them.

        Args:
            encoded: the rows, at most as many as the bucket has.
            bucket: padded shape of the group.

        Raises:
            BackendError: memory is lacking, or the target does not run the shape.
        """
        buffers = self._take(bucket)
        self._write(buffers, encoded)
        return Hidden(len(encoded), buffers)

    @abstractmethod
    def enqueue(self, segment: int, hidden: Hidden[B]) -> Pending:
        """Start a segment on a group, whose hidden states it replaces.

        Args:
            segment: the segment, from 0.
            hidden: the group.

        Returns:
            The outputs of the exit at the end of the segment.

        Raises:
            BackendError: the library or the device failed, for example for lack of memory.
            ArtifactError: the segment is loaded now, and is missing or damaged.
        """

    def regroup(
        self, hiddens: Sequence[Hidden[B]], rows: Sequence[Rows], bucket: Bucket
    ) -> Hidden[B]:
        """Gather, join and pad rows in one step.

        The old groups stay as they are until they are released, so that outputs of a segment that
        was enqueued for them can still be read.

        Args:
            hiddens: the groups to take rows from.
            rows: for each group the rows to keep, in their new order.
            bucket: padded shape of the new group, no longer than the longest group.
        """
        segment = hiddens[0].segment
        buffers = self._take(bucket)
        sources = [(hidden.buffers, part) for hidden, part in zip(hiddens, rows, strict=True)]
        for name, buffer in self._stages[segment].live.items():
            spec = self._specs[name]
            if "batch" in spec.shape:
                self._gather(spec, buffer, sources, buffers)
            else:
                longest, _ = max(sources, key=lambda source: source[0].bucket.sequence)
                self._crop(spec, buffer, longest, buffers)
        return Hidden(sum(map(len, rows)), buffers, segment)

    def release(self, hidden: Hidden[B]) -> None:
        """Keep the buffers of a group for the next group of its shape."""
        buffers = hidden.buffers
        self._taken.remove(buffers)
        self._unused.setdefault(buffers.bucket, []).append(buffers)
        self._unused.move_to_end(buffers.bucket)
        self._unused_bytes += buffers.nbytes
        self._shrink(self._most_bytes)

    def recover(self, others: Sequence[Hidden[B]] = ()) -> None:
        """Free the buffers of groups that an error interrupted.

        Args:
            others: groups that go on.

        Raises:
            BackendError: the device has failed, so the execution cannot be used again.
        """
        lost = self._taken.difference(hidden.buffers for hidden in others)
        self._taken -= lost
        for buffers in lost:
            buffers.free()

    def close(self) -> None:
        """Free everything."""
        self.recover()
        self._shrink(0)

    def _take(self, bucket: Bucket) -> B:
        """Buffers of a shape: unused ones if possible, otherwise new ones."""
        unused = self._unused.get(bucket)
        if unused:
            buffers = unused.pop()
            self._unused_bytes -= buffers.nbytes
        else:
            buffers = self._make(bucket)
        self._taken.add(buffers)
        return buffers

    def _shrink(self, most_bytes: int) -> None:
        """Free the least recently used of the unused buffers, until at most so many bytes are."""
        while self._unused_bytes > most_bytes:
            oldest, unused = next(iter(self._unused.items()))
            if unused:
                dropped = unused.pop(0)
                self._unused_bytes -= dropped.nbytes
                dropped.free()
            else:
                del self._unused[oldest]

    @abstractmethod
    def _make(self, bucket: Bucket) -> B:
        """Make the buffers of a shape."""

    @abstractmethod
    def _write(self, buffers: B, encoded: Sequence[EncodedRow]) -> None:
        """Write the inputs of segment 1 into buffers, padding included."""

    @abstractmethod
    def _gather(
        self, spec: TensorSpec, buffer: BufferName, sources: Sequence[tuple[B, Rows]], target: B
    ) -> None:
        """Copy rows of a tensor from the buffers of several groups into those of one."""

    @abstractmethod
    def _crop(self, spec: TensorSpec, buffer: BufferName, source: B, target: B) -> None:
        """Of a tensor that has no batch axis, copy the part that a shorter sequence needs."""


def _closed() -> BackendError:
    return BackendError("this engine is closed", "load it again with Engine.load")


class Backend(ABC, Generic[B]):
    """The graphs of one target, each loaded when first needed. Threads may share it.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        name: the target's name.
        threads: CPU threads; default: the cores that this process may use. Backends on a GPU
            ignore it.

    Attributes:
        most_executions: a call waits for an execution if as many are lent.
        joins: whether the undecided rows of several groups are joined, as long as they fit into
            one. Devices need full groups; on a CPU this gains almost nothing.
        name: the target's name.
        target: the target's record in the manifest.
        graphs: the ONNX graphs behind the target, by name.
        stages: for each segment, which buffers its graphs read and write.
        segments: number of segments.
        labels: number of labels.
        specs: every tensor between and around graphs, by name.
        padding: what each input of segment 1 holds on padding, by name.

    Raises:
        MissingExtraError: the inference library is not installed.
        BackendError: the target cannot run on this machine.
        ArtifactError: a file of the target is missing.
    """

    most_executions: ClassVar[float] = math.inf
    joins: ClassVar[bool] = False

    def __init__(
        self, folder: Path, manifest: Manifest, name: str, threads: int | None = None
    ) -> None:
        self.name = name
        self.target = manifest.targets[name]
        self.check(self.target, name)
        self.graphs = manifest.graphs_of(self.target)
        self.stages = plan_buffers(manifest)
        self.segments, self.labels = len(self.stages), len(manifest.task.labels)
        self.specs = carried_specs(self.graphs)
        self.padding = padding_values(manifest.tokenizer)
        # Segments are loaded when needed, and until then the process may change its directory.
        self._folder = folder.absolute()
        self._shapes = manifest.shapes
        self._threads = threads
        self._lock = threading.Lock()
        self._loaded: dict[str, Any] = {}
        self._freed = False
        self._pool_lock = threading.Lock()  # nothing else is locked while it is held
        self._given_back = threading.Condition(self._pool_lock)
        self._idle: list[Execution[B]] = []
        self._lent = self._waiting = 0
        self._closed = False
        # Hashing waits until a file is loaded, but a missing one is reported now.
        for graph in self.graphs:
            resolve(folder, self._file(graph).file)

    @staticmethod
    @abstractmethod
    def check(target: Target, name: str) -> None:
        """Check that a target can run on this machine, without loading any of its files.

        Args:
            target: the target's record.
            name: its name, for messages.

        Raises:
            MissingExtraError: the inference library is not installed.
            BackendError: the library, its version or the device does not fit.
        """

    @abstractmethod
    def limits(self) -> Limits:
        """The shapes that this target runs."""

    def check_open(self) -> None:
        """Raise `BackendError` if the backend is closed."""
        if self._closed:
            raise _closed()

    def check_out(self) -> Execution[B]:
        """An execution for one call, which must be given back.

        Waits for one if as many as possible are lent. A call that is waiting when the backend is
        closed still gets one.

        Raises:
            BackendError: the backend is closed, or there is no memory for another execution.
        """
        with self._pool_lock:
            self.check_open()
            if self._lent >= self.most_executions:
                self._waiting += 1
                try:
                    self._given_back.wait_for(lambda: self._lent < self.most_executions)
                finally:
                    self._waiting -= 1
            self._lent += 1
            if self._idle:
                return self._idle.pop()
        try:
            return self.open()
        except BaseException:
            self._end_call(None)
            raise

    def give_back(self, execution: Execution[B], failed: bool = False) -> None:
        """Return an execution to the pool.

        Args:
            execution: the execution, which nobody uses any more.
            failed: whether an error interrupted its call.
        """
        if failed:
            try:
                execution.recover()
            except BackendError:  # the device has failed, so nothing can be freed
                self._end_call(None)
                return
        self._end_call(execution)

    def drop_idle(self) -> None:
        """Close the executions that no call uses."""
        with self._pool_lock:
            idle, self._idle = self._idle, []
        for execution in idle:
            with suppress(BackendError):  # the device has failed, so nothing can be freed
                execution.close()

    @abstractmethod
    def open(self) -> Execution[B]:
        """A new execution; `check_out` lends those that exist."""

    @abstractmethod
    def _load(self, name: str) -> Any:
        """Load a graph by name; called once for each graph."""

    def graph(self, name: str) -> Any:
        """The loaded graph, as the inference library represents it.

        Raises:
            ArtifactError: its file is missing or damaged, or the library refuses it.
            BackendError: the backend is closed, or lacks memory.
        """
        loaded = self._loaded.get(name)
        if loaded is None:
            with self._lock:
                if self._freed:
                    raise _closed()
                loaded = self._loaded.get(name) or self._load(name)
                self._loaded[name] = loaded
        return loaded

    def preload(self) -> None:
        """Load all graphs now."""
        for name in self.graphs:
            self.graph(name)

    def close(self) -> None:
        """Free what is loaded, as soon as the calls that have begun are done."""
        with self._pool_lock:
            self._closed = True
        self._free_if_done()

    def _end_call(self, execution: Execution[B] | None) -> None:
        with self._pool_lock:
            self._lent -= 1
            if execution is not None:
                self._idle.append(execution)
            if self._waiting:
                self._given_back.notify()
        self._free_if_done()

    def _free_if_done(self) -> None:
        with self._pool_lock:
            if not self._closed or self._lent or self._waiting or self._freed:
                return
            self._freed = True
        self.drop_idle()
        with self._lock:
            self._free()
            self._loaded.clear()

    def _free(self) -> None:
        """Free what a backend holds besides its graphs; called once."""

    def _file(self, graph: str) -> BuiltFile | Graph:
        """The file that this target runs for a graph."""
        return self.target.files.get(graph) or self.graphs[graph]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a run failed because of too little memory; only the error's message shows this."""
    words = r"failed to allocate|bad.alloc|alloc_failed|out of memory"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error), re.IGNORECASE))
