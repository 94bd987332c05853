"""Backends that keep hidden states in NumPy arrays, and whose runs are prepared over them.

Each graph of a segment is bound once to the buffers of a group. To run a segment is then to call
what `HostBackend.bind` returned, without copies.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import ATTENTION_BIAS, MASK_FILL, Target, TensorSpec
from ..encoding import EncodedRow, write_rows
from ..errors import ArtifactError, BackendError, first_line
from ..machine import multiplies_int8, usable_cores
from .base import Backend, Execution, Hidden, PendingLogits, Rows, is_out_of_memory
from .buffers import Bucket, BufferName, Limits, dtype_of, shape_of

# Memory of a binding besides its buffers.
_BINDING_BYTES = 5 * 2**10
# With fewer tokens the matrix kernels are less efficient, and more do not fit into the caches.
_GROUP_TOKENS = 1024
_MAX_BATCH = 256
# Bytes of a cache line, where buffers start. NumPy only aligns them to 16 bytes, so one vector
# instruction could read two lines.
_CACHE_LINE = 64
_LESS_MEMORY = "use shorter or fewer texts at a time: there is not enough free memory"

Run = Callable[[], object]


class _Prepared(NamedTuple):
    """The prepared runs of a segment's graphs, by name, and the logits that they give."""

    runs: list[tuple[str, Run]]
    logits: NDArray[np.float32]


class HostBackend(Backend):
    """A library that runs graphs over NumPy arrays; see `Backend`.

    Attributes:
        library: its name, for messages.
        update: the command that updates it.
        free_bytes: unused buffers, with the runs prepared over them, are kept up to this size. The
            default is about the size of a CPU cache. Buffers from a larger store would often no
            longer be in the cache, while memory from the allocator often is.
    """

    # More calls at a time would take longer, and each has buffers of its own.
    most_executions = max(4, usable_cores())

    library: ClassVar[str]
    update: str
    free_bytes: ClassVar[int] = 32 * 2**20

    @abstractmethod
    def tensor(self, array: NDArray[Any], spec: TensorSpec) -> Any:
        """A tensor of the library over an array's memory."""

    @abstractmethod
    def bind(self, graph: str, tensors: Mapping[str, Any]) -> Run:
        """Prepare to run a graph.

        Args:
            graph: its name.
            tensors: what it reads and writes, by the names of its inputs and outputs.
        """

    @abstractmethod
    def read(self, name: str) -> Any:
        """Load a graph as the library represents it, after its hash and content were checked."""

    @staticmethod
    @abstractmethod
    def failures() -> tuple[type[Exception], ...]:
        """The exceptions that the library raises."""

    @staticmethod
    def check(target: Target, name: str, device: int = 0) -> None:
        """Check that this CPU computes the target's precision; see `Backend.check`."""
        if device != 0:
            raise BackendError(
                f"target {name} runs on the CPU, which has no device {device}",
                "choose a `target` for GPUs, or leave out `device`",
            )
        if target.precision.startswith("int8") and not multiplies_int8():
            raise BackendError(
                f"target {name} needs a CPU with VNNI instructions, and this one has none",
                "choose another `target`, such as onnxruntime-fp32",
            )

    def limits(self) -> Limits:
        """Any shape up to the model's longest sequence."""
        rows = min(_MAX_BATCH, self._shapes.batch.max)
        return Limits(rows, self._shapes.sequence.max, _GROUP_TOKENS)

    def open(self) -> HostExecution:
        """A new execution."""
        return HostExecution(self)

    def _load(self, name: str) -> Any:
        try:
            return self.read(name)
        except self.failures() as error:
            raise ArtifactError(
                f"{self.library} cannot load {self.name} of {self._engines.path}: "
                f"{first_line(error)}",
                "close other programs: there is not enough free memory"
                if is_out_of_memory(error)
                else f"update {self.library}: {self.update}; or export or convert the model again",
            ) from error


class HostExecution(Execution):
    """Runs segments that are prepared over arrays; see `Execution`.

    A buffer is an array, and the tensor of the library over its memory.
    """

    def __init__(self, backend: HostBackend) -> None:
        super().__init__(backend, backend.free_bytes)
        # The pool of the backend holds this, and no cycle may delay until the garbage collector
        # runs that an engine is freed which nobody has closed.
        self._backend: HostBackend = weakref.proxy(backend)

    def enqueue(self, hidden: Hidden) -> PendingLogits:
        """Run a segment; its outputs are ready when this returns."""
        graph = f"segment {hidden.segment + 1}"
        try:
            prepared: _Prepared = self._prepared(hidden)
            for graph, run in prepared.runs:  # noqa: B007 (errors name the graph)
                run()
        except self._backend.failures() as error:
            raise BackendError(
                f"{self._backend.library} failed in {graph} on {hidden.rows} rows of "
                f"{hidden.bucket.sequence} tokens: {first_line(error)}",
                _LESS_MEMORY
                if is_out_of_memory(error)
                else (
                    "export or convert the model again: the graph does not accept these tokens; if "
                    "only long texts fail, give a smaller `max_length`"
                ),
            ) from error
        hidden.segment += 1
        logits = prepared.logits[: hidden.rows]
        return lambda: logits

    def _allocate(self, spec: TensorSpec, bucket: Bucket) -> tuple[NDArray[Any], Any]:
        shape = shape_of(spec, bucket)
        try:
            array = _aligned(shape, dtype_of(spec))
        except MemoryError as error:
            raise BackendError(f"no room for {spec.name} of shape {shape}", _LESS_MEMORY) from error
        return array, self._backend.tensor(array, spec)

    def _prepare(self, hidden: Hidden) -> _Prepared:
        stage = self._stages[hidden.segment]
        runs = []
        for graph, buffers in stage.calls:
            tensors = {name: self._buffer(hidden, place)[1] for name, place in buffers.items()}
            runs.append((graph, self._backend.bind(graph, tensors)))
            hidden.nbytes += _BINDING_BYTES
        return _Prepared(runs, self._buffer(hidden, stage.logits)[0])

    def _write(self, hidden: Hidden, encoded: Sequence[EncodedRow]) -> None:
        for name, buffer in self._stages[0].live.items():
            write_rows(self._buffer(hidden, buffer)[0], name, encoded, self._padding[name])

    def _gather(
        self, spec: TensorSpec, buffer: BufferName, sources: Sequence[tuple[Hidden, Rows]],
        into: Hidden,
    ) -> None:  # fmt: skip
        out = self._buffer(into, buffer)[0]
        axis = spec.shape.index("sequence") if "sequence" in spec.shape else None
        # Attention never reads the hidden states of padding, so they only have to be finite.
        fill = MASK_FILL if spec.name == ATTENTION_BIAS else 0
        position = 0
        for hidden, numbers in sources:
            source = self._buffer(hidden, buffer)[0]
            part = out[position : position + len(numbers)]
            position += len(numbers)
            if axis is None or source.shape[axis] == out.shape[axis]:
                np.take(source, numbers, axis=0, out=part, mode="clip")
                continue
            width = min(source.shape[axis], out.shape[axis])
            inside = (slice(None),) * (axis - 1) + (slice(width),)
            for row, number in zip(part, numbers, strict=True):
                row[inside] = source[number][inside]
            part[(slice(None), *inside[:-1], slice(width, None))] = fill
        out[position:] = fill

    def _crop(self, spec: TensorSpec, buffer: BufferName, source: Hidden, into: Hidden) -> None:
        ends = [into.bucket.sequence if size == "sequence" else None for size in spec.shape]
        wide = self._buffer(source, buffer)[0]
        self._buffer(into, buffer)[0][...] = wide[tuple(map(slice, ends))]


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array without values that starts at a cache line."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)
