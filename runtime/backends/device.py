"""Run segments on a CUDA device: buffers, copies, events, and the order of all of them.

Each group's buffers have runners of their own, whose shapes and addresses never change. Segments
run one after another, so all runners of an execution share scratch memory, and those of the same
graph and shape share what they run on. Only the outputs of exit heads are copied back, into pinned
memory, with an event to wait for.

Rows are regrouped by one kernel for each tensor, which comes as PTX. All of this runs in the stream
of the segments, so buffers can be used again without waiting.

An application may use CUDA, too. Methods that call the driver, or a library that does, are marked
`on_device`: they find the context of the device, and the application finds its own afterwards.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import ATTENTION_BIAS, LOGITS, MASK_FILL, TensorSpec
from ..encoding import EncodedRow, write_rows
from ..errors import BackendError
from .base import Backend, Execution, Hidden, PendingLogits, Rows
from .buffers import Bucket, BufferName, dtype_of, nbytes_of, shape_of
from .cuda import GATHER, Cuda, PinnedArray

_Method = TypeVar("_Method", bound=Callable[..., Any])

# Unused buffers keep up to this much device memory.
_FREE_BYTES = 256 * 2**20

Runner = Callable[[], object]
"""Enqueues one graph at one shape, with fixed addresses, in its stream."""


def on_device(method: _Method) -> _Method:
    """Let a method run while the context of its object's `cuda` is current in this thread."""

    @functools.wraps(method)
    def run(self: Any, *arguments: Any) -> Any:
        with self.cuda:
            return method(self, *arguments)

    return cast("_Method", run)


class _Memory(NamedTuple):
    """A buffer on the device, and on the host if it is copied from or to there."""

    address: int
    pinned: PinnedArray | None


class _Prepared(NamedTuple):
    """A prepared segment: its graphs, and its logits on the device and on the host."""

    event: int  # marks the end of its last run
    runners: list[Runner]
    logits: int
    pinned: PinnedArray


class DeviceExecution(Execution):
    """Runs segments in a stream of its own; see `Execution`.

    Args:
        backend: the backend.
        cuda: the driver on the device.

    Attributes:
        cuda: the driver on the device.
        stream: the stream.
        shared: what runners of the same shape and graph share. It takes long to make, so it stays
            when unused buffers are freed, unless memory is short.
    """

    def __init__(self, backend: Backend, cuda: Cuda) -> None:
        super().__init__(backend, _FREE_BYTES)
        self.cuda = cuda
        self.stream = cuda.stream()
        self._scratch = [(0, 0)]  # sizes and addresses
        # Tensors by name: the inputs of segment 1, and logits.
        self._on_host = {*self._stages[0].live, LOGITS}
        self.shared: dict[tuple[Bucket, str], Any] = {}

    @abstractmethod
    def runner(self, graph: str, bucket: Bucket, addresses: Mapping[str, int]) -> Runner:
        """A runner of a graph.

        Args:
            graph: name of the graph.
            bucket: the padded shape.
            addresses: where each input and output is, by its name.
        """

    @on_device
    def enqueue(self, hidden: Hidden) -> PendingLogits:
        """Enqueue a segment without waiting for it."""
        prepared: _Prepared = self._prepared(hidden)
        for run in prepared.runners:
            run()
        self.cuda.copy(
            prepared.pinned.pointer, prepared.logits, prepared.pinned.array.nbytes, self.stream
        )
        self.cuda.record(prepared.event, self.stream)
        hidden.segment += 1
        return partial(self._wait_for, prepared.event, prepared.pinned.array[: hidden.rows])

    @on_device
    def _wait_for(self, event: int, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        self.cuda.wait(event)
        return logits

    regroup = on_device(Execution.regroup)

    def scratch(self, size: int) -> int:
        """The address of memory for intermediate results, which all graphs share in turn.

        Graphs that were made before keep the smaller piece that they got.

        Args:
            size: the least size in bytes; 0 needs no memory.
        """
        if size > self._scratch[-1][0]:
            self._scratch.append((size, self.malloc(size)))
        return self._scratch[-1][1]

    def malloc(self, size: int) -> int:
        """Allocate device memory, and free what no group uses if there is too little."""
        try:
            return self.cuda.malloc(size)
        except BackendError:
            self.free_unused()
        return self.cuda.malloc(size)

    def free_unused(self) -> None:
        """Free the buffers and runners that no group uses."""
        self._shrink(0)
        self.shared.clear()  # runners that are still needed keep theirs

    @on_device
    def close(self) -> None:
        """Free everything."""
        super().close()
        self.cuda.finish(self.stream)
        self.shared.clear()
        for _, pointer in self._scratch[1:]:
            self.cuda.free(pointer)
        del self._scratch[1:]
        self.cuda.destroy_stream(self.stream)

    @on_device
    def _free(self, hidden: Hidden) -> None:
        self.cuda.finish(self.stream)
        for prepared in hidden.prepared.values():
            self.cuda.destroy_event(prepared.event)
        for memory in hidden.buffers.values():
            self.cuda.free(memory.address)
        super()._free(hidden)

    def _allocate(self, spec: TensorSpec, bucket: Bucket) -> _Memory:
        pinned = None
        if spec.name in self._on_host:
            pinned = self.cuda.pinned(shape_of(spec, bucket), dtype_of(spec))
        return _Memory(self.malloc(nbytes_of(spec, bucket)), pinned)

    def _prepare(self, hidden: Hidden) -> _Prepared:
        stage = self._stages[hidden.segment]
        runners = []
        for graph, buffers in stage.calls:
            addresses = {
                name: self._buffer(hidden, buffer).address for name, buffer in buffers.items()
            }
            runners.append(self.runner(graph, hidden.bucket, addresses))
        logits: _Memory = self._buffer(hidden, stage.logits)
        assert logits.pinned is not None
        return _Prepared(self.cuda.event(), runners, logits.address, logits.pinned)

    @on_device
    def _write(self, hidden: Hidden, encoded: Sequence[EncodedRow]) -> None:
        if 0 in hidden.prepared:  # until it has run, the pinned memory may still be read
            self.cuda.wait(hidden.prepared[0].event)
        for name, buffer in self._stages[0].live.items():
            address, pinned = self._buffer(hidden, buffer)
            write_rows(pinned.array, name, encoded, self._padding[name])
            self.cuda.copy(address, pinned.pointer, pinned.array.nbytes, self.stream)

    def _gather(
        self, spec: TensorSpec, buffer: BufferName, sources: Sequence[tuple[Hidden, Rows]],
        into: Hidden,
    ) -> None:  # fmt: skip
        pitch = nbytes_of(spec, Bucket(1, into.bucket.sequence))
        addresses = np.zeros(into.bucket.batch, np.uint64)
        widths = np.zeros(into.bucket.batch, np.uint32)
        row = 0
        for source, rows in sources:
            source_pitch = nbytes_of(spec, Bucket(1, source.bucket.sequence))
            places = slice(row, row := row + len(rows))
            addresses[places] = self._buffer(source, buffer).address + rows * source_pitch
            widths[places] = min(pitch, source_pitch)
        fill = np.full(8, MASK_FILL if spec.name == ATTENTION_BIAS else 0, dtype_of(spec))
        self._copy_rows(self._buffer(into, buffer).address, pitch, addresses, widths, fill)

    def _crop(self, spec: TensorSpec, buffer: BufferName, source: Hidden, into: Hidden) -> None:
        wide = shape_of(spec, source.bucket)
        narrow = shape_of(spec, into.bucket)
        # The last two axes are a matrix, of which the first rows and columns are copied.
        matrices, rows = np.ogrid[: np.prod(narrow[:-2]), : narrow[-2]]
        itemsize = dtype_of(spec).itemsize
        places = (matrices * wide[-2] + rows).ravel() * (wide[-1] * itemsize)
        pitch = narrow[-1] * itemsize
        widths = np.full(len(places), pitch, np.uint32)
        addresses = (self._buffer(source, buffer).address + places).astype(np.uint64)
        to = self._buffer(into, buffer).address
        self._copy_rows(to, pitch, addresses, widths, np.zeros(8, np.uint8))

    def _copy_rows(
        self,
        to: int,
        pitch: int,
        sources: NDArray[np.uint64],
        widths: NDArray[np.uint32],
        fill: NDArray[Any],
    ) -> None:
        """Copy rows to one place, in as many launches as the parameters of a kernel need.

        Of each row at `sources`, `widths` bytes are copied to a row of `pitch` bytes. In the rest
        of it, the first 8 bytes of `fill` are repeated.
        """
        plan = np.zeros(1, GATHER)
        plan["fill"] = fill.view(np.uint64)[0]
        plan["pitch"] = pitch
        most = plan["sources"].shape[1]
        for first in range(0, len(sources), most):
            count = min(most, len(sources) - first)
            plan["to"] = to + first * pitch
            plan["sources"][0, :count] = sources[first : first + count]
            plan["widths"][0, :count] = widths[first : first + count]
            self.cuda.gather(plan, count, self.stream)
