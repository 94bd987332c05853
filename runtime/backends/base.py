"""The interface of backends, and the code that all of them share.

A `Backend` belongs to one target of an engines folder, and threads may share it. An `Execution`
owns buffers, bindings and streams. A call checks one out of a pool and gives it back, so there are
as many as calls that ran at the same time, up to the limit of the backend. Hidden states are opaque
to the engine: only the outputs of exit heads reach it.
"""

from __future__ import annotations

import math
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..artifact.folder import EnginesFolder, resolve
from ..artifact.manifest import BuiltFile, Graph, Target, TensorSpec
from ..encoding import EncodedRow, padding_values
from ..errors import START_AGAIN, BackendError
from ..machine import kind_of_machine
from .buffers import Bucket, BufferName, Limits, carried_specs, nbytes_of, plan_buffers
from .forks import Origin

Rows = NDArray[np.intp]
"""Row numbers within a group, from 0."""

# A call that waits gives up if no other call has run a segment for so long.
_PATIENCE_SECONDS = 60.0


@dataclass(slots=True, eq=False)
class Hidden:
    """The hidden states of a group between two segments, and what runs segments on them.

    Attributes:
        bucket: padded shape.
        rows: real rows; the rest of the bucket is padding.
        segment: the segment that runs next, from 0.
        nbytes: memory that is held so far, in bytes.
        buffers: the tensors that exist so far, as the backend holds them.
        prepared: what runs each segment, as far as it is prepared, by segment.
    """

    bucket: Bucket
    rows: int = 0
    segment: int = 0
    nbytes: int = 0
    buffers: dict[BufferName, Any] = field(default_factory=dict)
    prepared: dict[int, Any] = field(default_factory=dict)


PendingLogits = Callable[[], NDArray[np.float32]]
"""Waits for the logits of an exit, `[rows, labels]`, and returns them.

They may be a view of memory that is overwritten when the second segment after this one is started,
or after the group is released.
"""


class Execution(ABC):
    """Runs segments over pooled buffers, for one call at a time.

    Args:
        backend: the backend.
        most_bytes: unused buffers are kept up to this size, in bytes.
    """

    def __init__(self, backend: Backend, most_bytes: int) -> None:
        self._stages = backend.stages
        self._specs = backend.specs
        self._padding = backend.padding
        self._most_bytes = most_bytes
        self._unused: OrderedDict[Bucket, list[Hidden]] = OrderedDict()  # last used last
        self._unused_bytes = 0
        self._taken: set[Hidden] = set()

    def begin(self, encoded: Sequence[EncodedRow], bucket: Bucket) -> Hidden:
        """Put the tokens of a group where segment 1 reads them.

        Args:
            encoded: the rows, at most as many as the bucket has.
            bucket: padded shape of the group.

        Raises:
            BackendError: memory is lacking, or the target does not run the shape.
        """
        hidden = self._take(bucket, len(encoded), 0)
        self._write(hidden, encoded)
        return hidden

    @abstractmethod
    def enqueue(self, hidden: Hidden) -> PendingLogits:
        """Start the next segment on a group, whose hidden states it replaces.

        Args:
            hidden: the group.

        Returns:
            The logits of the exit at the end of the segment.

        Raises:
            BackendError: the library or the device failed, for example for lack of memory.
            ArtifactError: the segment is loaded now, and is missing or damaged.
        """

    def regroup(self, hiddens: Sequence[Hidden], rows: Sequence[Rows], bucket: Bucket) -> Hidden:
        """Gather, join and pad rows at once.

        The old groups stay as they are until they are released, so that outputs of a segment that
        was enqueued for them can still be read.

        Args:
            hiddens: the groups to take rows from, which are before the same segment.
            rows: for each group the rows to keep, in their new order.
            bucket: padded shape of the new group, no longer than the longest group.
        """
        new = self._take(bucket, sum(map(len, rows)), hiddens[0].segment)
        sources = list(zip(hiddens, rows, strict=True))
        for name, buffer in self._stages[new.segment].live.items():
            spec = self._specs[name]
            if "batch" in spec.shape:
                self._gather(spec, buffer, sources, new)
            else:
                longest = max(hiddens, key=lambda hidden: hidden.bucket.sequence)
                self._crop(spec, buffer, longest, new)
        return new

    def release(self, hidden: Hidden) -> None:
        """Keep the buffers of a group for the next group of its shape."""
        self._taken.remove(hidden)
        self._unused.setdefault(hidden.bucket, []).append(hidden)
        self._unused.move_to_end(hidden.bucket)
        self._unused_bytes += hidden.nbytes
        self._shrink(self._most_bytes)

    def recover(self, others: Collection[Hidden] = ()) -> None:
        """Free the buffers of groups that an error interrupted.

        Args:
            others: groups that go on.

        Raises:
            BackendError: the device has failed, so the execution cannot be used again.
        """
        lost = self._taken.difference(others)
        self._taken -= lost
        for hidden in lost:
            self._free(hidden)

    def close(self) -> None:
        """Free everything."""
        self.recover()
        self._shrink(0)

    def _take(self, bucket: Bucket, rows: int, segment: int) -> Hidden:
        """Hidden states of a shape: unused ones if possible, otherwise new ones."""
        unused = self._unused.get(bucket)
        if unused:
            hidden = unused.pop()
            self._unused_bytes -= hidden.nbytes
        else:
            hidden = Hidden(bucket)
        self._taken.add(hidden)
        hidden.rows = rows
        hidden.segment = segment
        return hidden

    def _shrink(self, most_bytes: int) -> None:
        """Free unused buffers, the least recently used first, until at most this size is left."""
        while self._unused_bytes > most_bytes:
            oldest, unused = next(iter(self._unused.items()))
            if unused:
                dropped = unused.pop(0)
                self._unused_bytes -= dropped.nbytes
                self._free(dropped)
            else:
                del self._unused[oldest]

    def _buffer(self, hidden: Hidden, name: BufferName) -> Any:
        """A tensor, allocated on first use."""
        if name not in hidden.buffers:
            spec = self._specs[name[0]]
            hidden.buffers[name] = self._allocate(spec, hidden.bucket)
            hidden.nbytes += nbytes_of(spec, hidden.bucket)
        return hidden.buffers[name]

    def _prepared(self, hidden: Hidden) -> Any:
        """The prepared next segment; it is prepared on first use."""
        if hidden.segment not in hidden.prepared:
            hidden.prepared[hidden.segment] = self._prepare(hidden)
        return hidden.prepared[hidden.segment]

    def _free(self, hidden: Hidden) -> None:
        """Free the memory, and what runs on it."""
        hidden.buffers.clear()
        hidden.prepared.clear()

    @abstractmethod
    def _allocate(self, spec: TensorSpec, bucket: Bucket) -> Any:
        """Allocate a tensor."""

    @abstractmethod
    def _prepare(self, hidden: Hidden) -> Any:
        """Prepare to run the next segment."""

    @abstractmethod
    def _write(self, hidden: Hidden, encoded: Sequence[EncodedRow]) -> None:
        """Write the inputs of segment 1, padding included."""

    @abstractmethod
    def _gather(
        self, spec: TensorSpec, buffer: BufferName, sources: Sequence[tuple[Hidden, Rows]],
        into: Hidden,
    ) -> None:  # fmt: skip
        """Copy rows of a tensor from the buffers of several groups into those of one."""

    @abstractmethod
    def _crop(self, spec: TensorSpec, buffer: BufferName, source: Hidden, into: Hidden) -> None:
        """Of a tensor that has no batch axis, copy the part that a shorter sequence needs."""


def _closed() -> BackendError:
    return BackendError("this engine is closed", "load it again with Engine.load")


class Backend(ABC):
    """The graphs of one target, loaded when first needed. Threads may share it.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        name: the target's name.
        threads: CPU threads; default: the cores that this process may use. Backends on a GPU
            ignore it.
        device: the number of the GPU; those on a CPU have only 0.

    Attributes:
        most_executions: a call waits for an execution if as many are lent.
        in_flight: how many groups run a segment at the same time: on a device, one runs while the
            rule is applied to another.
        joins: whether the undecided rows of several groups are joined, as long as they fit into
            one. Devices need full groups; on a CPU this gains almost nothing.
        prepares_shapes: whether the first run of each padded shape takes much longer than others.
        name: the target's name.
        threads: as given.
        device: as given.
        origin: the process that made the backend, the only one that can use it.
        target: the target's record in the manifest.
        graphs: the ONNX graphs behind the target, by name.
        stages: for each segment, which buffers its graphs read and write.
        segments: number of segments.
        specs: every tensor between and around graphs, by name.
        padding: what each input of segment 1 holds on padding, by name.

    Raises:
        MissingExtraError: the inference library is not installed.
        BackendError: the target cannot run on this machine.
        ArtifactError: a file of the target is missing.
    """

    most_executions: ClassVar[int]
    in_flight: ClassVar[int] = 1
    joins: ClassVar[bool] = False
    prepares_shapes: ClassVar[bool] = False

    def __init__(
        self, engines: EnginesFolder, name: str, threads: int | None = None, device: int = 0
    ) -> None:
        manifest = engines.manifest
        self.name = name
        self.origin = Origin(self, "this engine")
        self.target = manifest.targets[name]
        self.check(self.target, name, device)
        self.graphs = manifest.graphs_of(self.target)
        self.stages = plan_buffers(manifest)
        self.segments = len(self.stages)
        self.specs = carried_specs(self.graphs)
        self.padding = padding_values(manifest.tokenizer)
        # Segments are loaded when needed, and until then the process may change its directory.
        self._engines = engines.absolute()
        self._shapes = manifest.shapes
        self.threads = threads
        self.device = device
        self._lock = threading.Lock()
        self._loaded: dict[str, Any] = {}
        self._freed = False
        self._pool_lock = threading.Lock()  # nothing else is locked while it is held
        self._given_back = threading.Condition(self._pool_lock)
        self._idle: list[Execution] = []
        self._lent = 0
        self._waiting = deque[object]()  # calls, in order of their arrival
        self._progressed = -math.inf  # when a call ran a segment, in seconds of `time.monotonic`
        self._closed = False
        # Hashing waits until a file is loaded, but a missing one is reported now.
        for graph in self.graphs:
            resolve(engines.path, self._file(graph).file)

    @staticmethod
    @abstractmethod
    def check(target: Target, name: str, device: int = 0) -> None:
        """Check that a target can run on this machine, without loading any of its files.

        Args:
            target: the target's record.
            name: its name, for messages.
            device: the number of the GPU.

        Raises:
            MissingExtraError: the inference library is not installed.
            BackendError: the library, its version or the device does not fit.
        """

    @abstractmethod
    def limits(self) -> Limits:
        """The shapes that this target runs."""

    @property
    def kind_of_machine(self) -> str:
        """The kind of machine on which it computes, see the function of this name."""
        return kind_of_machine(self.target.backend, self.target.on_gpu, self.device)

    @property
    def failed(self) -> str:
        """Why nothing can run until the process starts again; empty unless a device has failed."""
        return ""

    def check_open(self) -> None:
        """Raise `BackendError` if it is closed, has failed, or was made in another process."""
        self.origin.check()
        if self._closed:
            raise _closed()
        if self.failed:
            raise BackendError(self.failed, START_AGAIN)

    def check_out(self) -> Execution:
        """An execution for one call, which must be given back.

        Waits for one if as many as possible are lent; the call that has waited longest gets the
        next one. A call that is waiting when the backend is closed still gets one.

        Raises:
            BackendError: the backend is closed; all executions are lent, and none has run a segment
                for 60 seconds; memory is lacking; or this process was forked after the backend was
                made.
        """
        self.origin.check()  # before the lock, which a fork may have copied while it was held
        with self._pool_lock:
            self.check_open()
            self._wait_for_turn()
            self._lent += 1
            if self._idle:
                return self._idle.pop()
        try:
            return self.open()
        except BaseException:
            self._end_call(None)
            raise

    def _wait_for_turn(self) -> None:
        """Wait, with the lock of the pool, until an execution can be lent to this call."""
        call = object()
        arrival = time.monotonic()
        self._waiting.append(call)
        try:
            while self._waiting[0] is not call or self._lent >= self.most_executions:
                patience = max(arrival, self._progressed) + _PATIENCE_SECONDS - time.monotonic()
                if patience <= 0:
                    raise BackendError(
                        f"all calls that target {self.name} can run at a time "
                        f"({self.most_executions}) have run no segment for {_PATIENCE_SECONDS:g} "
                        "seconds",
                        "if no segment should take so long, the device may hang: start the process "
                        "again; to answer the texts of many threads, use one Scheduler",
                    )
                self._given_back.wait(patience)
        finally:
            self._waiting.remove(call)
            self._given_back.notify_all()  # it may be the turn of the next one

    def give_back(self, execution: Execution, failed: bool = False) -> None:
        """Return an execution to the pool.

        Args:
            execution: the execution, which nobody uses any more.
            failed: whether an error interrupted its call.
        """
        if self.origin.is_elsewhere:
            self._idle.append(execution)  # so that it is not freed
            return
        usable = None
        try:
            with suppress(BackendError):  # the device has failed, so nothing can be freed
                if failed:
                    execution.recover()
                usable = execution
        finally:
            self._end_call(usable)

    @property
    def is_awaited(self) -> bool:
        """Whether a call waits for an execution."""
        return bool(self._waiting)

    def progressed(self) -> None:
        """Note that a call has run a segment, so that those which wait have patience."""
        self._progressed = time.monotonic()

    def keep_compiled(self) -> None:  # noqa: B027 - most backends have nothing to do
        """Keep what was compiled for this machine, if anything, for later processes."""

    def drop_idle(self) -> None:
        """Close the executions that no call uses."""
        with self._pool_lock:
            idle = self._idle
            self._idle = []
        for execution in idle:
            with suppress(BackendError):  # the device has failed, so nothing can be freed
                execution.close()

    @abstractmethod
    def open(self) -> Execution:
        """A new execution; `check_out` lends those that exist."""

    @abstractmethod
    def _load(self, name: str) -> Any:
        """Load a graph by name; a backend may load all of them at once."""

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

    def close(self) -> None:
        """Free what is loaded, as soon as the calls that have begun are done.

        Does nothing in a process that was forked after the backend was made.
        """
        if self.origin.is_elsewhere:
            return
        with self._pool_lock:
            self._closed = True
        self._free_if_done()

    def _end_call(self, execution: Execution | None) -> None:
        with self._pool_lock:
            self._lent -= 1
            self.progressed()
            if execution is not None:
                self._idle.append(execution)
            self._given_back.notify_all()
        self._free_if_done()

    def _free_if_done(self) -> None:
        with self._pool_lock:
            if not self._closed or self._lent or self._waiting or self._freed:
                return
            self._freed = True
        self.drop_idle()
        with self._lock:
            self._free()

    def _free(self) -> None:
        """Free the graphs, and what else a backend holds; called once."""
        self._loaded.clear()

    def _file(self, graph: str) -> BuiltFile | Graph:
        """The file that this target runs for a graph."""
        return self.target.files.get(graph) or self.graphs[graph]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a run failed because of too little memory; only the error's message shows this."""
    words = r"failed to allocate|bad.alloc|alloc_failed|out.?of.?memory"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error), re.IGNORECASE))
