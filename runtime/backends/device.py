"""Hidden states on a CUDA device: what TensorRT and ONNX Runtime's CUDA provider share.

Each group's buffers have runners of their own, whose shapes and addresses never change, so
that a segment is one launch: the first run warms up, the second is captured as a CUDA
graph, later ones replay it. Segments run one after another, so all runners of an execution
share one piece of scratch memory. Only the heads' outputs come back, into pinned memory,
with an event to wait for.

Rows are regrouped by copies on the device, one for each run of neighbouring rows: every
call is the driver's own, so nothing here needs a compiler on the device or a kernel for
each GPU. A group is a few dozen rows, and most neighbours stay together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import ATTENTION_BIAS, MASK_FILL, NEXT, TensorSpec
from ..encoding import EncodedRow, write_rows
from ..errors import BackendError
from .base import Bucket, Rows
from .buffers import BufferName, Stage, Store, shape_of
from .cuda import Cuda, PinnedArray

# Device memory of buffers that no group uses; each also keeps its contexts and graphs.
_FREE_BYTES = 256 * 2**20
# What numpy has no type for is handled by its bits.
_DTYPES = {"bfloat16": np.dtype(np.uint16)}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is on the device: address, shape, and type as in the manifest."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str


class Runner(Protocol):
    """One graph at one shape, over addresses that stay."""

    def run(self) -> None:
        """Put the graph into the stream."""

    def can_capture(self) -> bool:
        """Whether its next run can be part of a CUDA graph."""

    def scratch_bytes(self) -> int:
        """Scratch memory it needs; 0 if it brings its own."""

    def use_scratch(self, pointer: int, size: int) -> None:
        """Take the execution's scratch memory."""


class DeviceBackend(Protocol):
    """What a backend on a CUDA device gives its executions.

    Attributes:
        cuda: the driver.
        stages: which buffer holds what.
        specs: every carried tensor.
        padding: value of padding for each input of segment 1.
    """

    cuda: Cuda
    stages: list[Stage]
    specs: dict[str, TensorSpec]
    padding: dict[str, float]

    def check_bucket(self, bucket: Bucket) -> None:
        """Raise `BackendError` for a shape that is not run."""

    def runner(
        self, graph: str, bucket: Bucket, places: Mapping[str, Place], stream: int
    ) -> Runner:
        """What runs a graph over given places, by input and output name."""


@dataclass(slots=True, eq=False)
class GpuHidden:
    """A group between two segments."""

    rows: int
    buffers: _DeviceBuffers
    segment: int
    lengths: NDArray[np.intp]

    @property
    def bucket(self) -> Bucket:
        """Padded shape."""
        return self.buffers.bucket


class _Pending:
    """Head outputs on their way into pinned memory."""

    __slots__ = ("_arrays", "_cuda", "_event", "_rows")

    def __init__(
        self, driver: Cuda, event: int, arrays: Mapping[str, NDArray[Any]], rows: int
    ) -> None:
        self._cuda = driver
        self._event = event
        self._arrays = arrays
        self._rows = rows

    def result(self) -> Mapping[str, NDArray[Any]]:
        """Wait for the outputs."""
        self._cuda.wait(self._event)
        return {name: array[: self._rows] for name, array in self._arrays.items()}


class _Step:
    """A segment over one group's buffers: what runs it, and its captured graph."""

    def __init__(self) -> None:
        self.runners: list[Runner] = []
        self.copies: list[tuple[PinnedArray, int, int]] = []
        self.arrays: dict[str, NDArray[Any]] = {}
        self.event = 0
        self.executable: int | None = None
        self.runs = 0
        self.scratch = 0


class _DeviceBuffers:
    """The device memory of one group at one padded shape, and what runs segments over it."""

    def __init__(self, execution: DeviceExecution, bucket: Bucket) -> None:
        self.bucket = bucket
        self.nbytes = 0
        execution.backend.check_bucket(bucket)
        self._execution = execution
        self._cuda = execution.backend.cuda
        self._pointers: dict[BufferName, int] = {}
        self._pinned: dict[BufferName, PinnedArray] = {}
        self._events: list[int] = []
        self._steps: dict[int, _Step] = {}
        self._uploaded = self._event()

    def pointer(self, buffer: BufferName) -> int:
        """The address of a buffer; its memory is taken when first asked for."""
        pointer = self._pointers.get(buffer)
        if pointer is None:
            size = _nbytes(self._execution.backend.specs[buffer[0]], self.bucket)
            pointer = self._pointers[buffer] = self._execution.malloc(size)
            self.nbytes += size
        return pointer

    def upload(self, values: Mapping[BufferName, NDArray[Any]]) -> None:
        """Copy host arrays into buffers, in the stream's order."""
        self._cuda.wait(self._uploaded)  # the staging memory may still be read
        for buffer, value in values.items():
            staging = self._staging(buffer)
            staging.array[...] = value
            size = staging.array.nbytes
            self._cuda.copy(self.pointer(buffer), staging.pointer, size, self._execution.stream)
        self._cuda.record(self._uploaded, self._execution.stream)

    def step(self, segment: int) -> _Step:
        """What runs a segment."""
        step = self._steps.get(segment)
        if step is None:
            step = self._steps[segment] = self._prepare(segment)
        return step

    def free(self) -> None:
        """Give everything back, once the device no longer uses it."""
        self._cuda.synchronize(self._execution.stream)
        for step in self._steps.values():
            if step.executable is not None:
                self._cuda.destroy_graph(step.executable)
            step.runners.clear()
        for pointer in self._pointers.values():
            self._cuda.free(pointer)
        for event in self._events:
            self._cuda.destroy_event(event)
        for kept in (self._steps, self._pointers, self._pinned, self._events):
            kept.clear()
        self._execution.made.discard(self)

    def _staging(self, buffer: BufferName) -> PinnedArray:
        pinned = self._pinned.get(buffer)
        if pinned is None:
            spec = self._execution.backend.specs[buffer[0]]
            shape = shape_of(spec, self.bucket)
            pinned = self._pinned[buffer] = self._cuda.pinned(shape, _dtype(spec))
        return pinned

    def _event(self) -> int:
        self._events.append(self._cuda.event())
        return self._events[-1]

    def _prepare(self, segment: int) -> _Step:
        backend, stream = self._execution.backend, self._execution.stream
        step = _Step()
        for call in backend.stages[segment].calls:
            ends = (*call.inputs, *call.outputs)
            places = {
                name: Place(
                    self.pointer(buffer),
                    shape_of(backend.specs[buffer[0]], self.bucket),
                    backend.specs[buffer[0]].dtype,
                )
                for name, buffer in ends
            }
            step.runners.append(backend.runner(call.graph, self.bucket, places, stream))
            for name, buffer in call.outputs:
                if not name.startswith(NEXT):
                    host = self._staging(buffer)
                    step.copies.append((host, self.pointer(buffer), host.array.nbytes))
                    step.arrays[name] = host.array
        step.event = self._event()
        return step


class DeviceExecution:
    """Runs segments on a stream. For one thread.

    Args:
        backend: what runs graphs.
        stream: the stream; None makes one of its own.
    """

    lookahead = True
    """The next segment can be enqueued before this one's exit is read."""

    def __init__(self, backend: DeviceBackend, stream: int | None = None) -> None:
        self.backend = backend
        self.stream = backend.cuda.stream() if stream is None else stream
        self._owns_stream = stream is None
        self._cuda = backend.cuda
        self._scratch = 0
        self._scratch_size = 0
        self._store: Store[_DeviceBuffers] = Store(self._make, _FREE_BYTES)
        self.made: set[_DeviceBuffers] = set()

    def begin(self, encoded: Sequence[EncodedRow], bucket: Bucket) -> GpuHidden:
        """Copy padded token ids and the attention bias to the device."""
        buffers = self._store.take(bucket)
        values = {}
        for name, buffer in self.backend.stages[0].live.items():
            spec = self.backend.specs[name]
            values[buffer] = np.empty(shape_of(spec, bucket), _dtype(spec))
            padding = _bits(self.backend.padding[name], spec)
            write_rows(values[buffer], name, encoded, padding)
        buffers.upload(values)
        lengths = np.array([len(row) for row in encoded], np.intp)
        return GpuHidden(len(encoded), buffers, 0, lengths)

    def enqueue(self, segment: int, hidden: GpuHidden) -> tuple[GpuHidden, _Pending]:
        """Start a segment; nothing waits."""
        step = hidden.buffers.step(segment)
        self._share_scratch(step)
        if step.executable is not None:
            self._cuda.launch(step.executable, self.stream)
        elif step.runs == 0 or not all(runner.can_capture() for runner in step.runners):
            # A first run may allocate, which no graph may hold.
            self._run(step)
        else:
            self._cuda.begin_capture(self.stream)
            self._run(step)
            step.executable = self._cuda.end_capture(self.stream)
            self._cuda.launch(step.executable, self.stream)
        step.runs += 1
        self._cuda.record(step.event, self.stream)
        hidden.segment = segment + 1
        return hidden, _Pending(self._cuda, step.event, step.arrays, hidden.rows)

    def regroup(
        self, hiddens: Sequence[GpuHidden], rows: Sequence[Rows], bucket: Bucket
    ) -> GpuHidden:
        """Copy rows into other buffers, on the device."""
        segment = hiddens[0].segment
        buffers = self._store.take(bucket)
        parts = zip(hiddens, rows, strict=True)
        lengths = np.concatenate([hidden.lengths[numbers] for hidden, numbers in parts])
        for name, buffer in self.backend.stages[segment].live.items():
            spec = self.backend.specs[name]
            if name == ATTENTION_BIAS:
                # A few numbers that the lengths say: cheaper sent than gathered.
                buffers.upload({buffer: _bias_of(lengths, spec, bucket)})
            elif "batch" in spec.shape:
                self._gather(spec, buffer, hiddens, rows, buffers)
            else:
                longest = max(hiddens, key=lambda hidden: hidden.bucket.sequence)
                self._crop(spec, buffer, longest.buffers, buffers)
        for hidden in hiddens:
            self.release(hidden)
        return GpuHidden(len(lengths), buffers, segment, lengths)

    def release(self, hidden: GpuHidden) -> None:
        """Keep the buffers for the next group of their shape; the stream keeps the order."""
        self._store.give(hidden.buffers)

    def malloc(self, size: int) -> int:
        """Device memory; buffers that no group uses make room if there is none."""
        try:
            return self._cuda.malloc(size)
        except BackendError:
            if self._store.nbytes == 0:
                raise
            self._store.shrink(0)
            return self._cuda.malloc(size)

    def close(self) -> None:
        """Give everything back, also what groups held that an error cut short."""
        self._store.shrink(0)
        self._cuda.synchronize(self.stream)
        for buffers in list(self.made):
            buffers.free()
        if self._scratch:
            self._cuda.free(self._scratch)
            self._scratch = self._scratch_size = 0
        if self._owns_stream:
            self._cuda.destroy_stream(self.stream)

    def _make(self, bucket: Bucket) -> _DeviceBuffers:
        buffers = _DeviceBuffers(self, bucket)
        self.made.add(buffers)
        return buffers

    def _run(self, step: _Step) -> None:
        for runner in step.runners:
            runner.run()
        for host, pointer, size in step.copies:
            self._cuda.copy(host.pointer, pointer, size, self.stream)

    def _share_scratch(self, step: _Step) -> None:
        """Give a step's runners the scratch memory of all, grown if they need more."""
        if step.scratch and step.scratch == self._scratch:
            return
        need = max(runner.scratch_bytes() for runner in step.runners)
        if need > self._scratch_size or not self._scratch:
            if self._scratch:  # what is in the stream still uses it
                self._cuda.synchronize(self.stream)
                self._cuda.free(self._scratch)
                self._scratch = 0
            self._scratch = self.malloc(max(1, need))
            self._scratch_size = max(1, need)
        if step.executable is not None:  # it holds the old address
            self._cuda.synchronize(self.stream)
            self._cuda.destroy_graph(step.executable)
            step.executable = None
        for runner in step.runners:
            runner.use_scratch(self._scratch, self._scratch_size)
        step.scratch, step.runs = self._scratch, 0

    def _gather(
        self,
        spec: TensorSpec,
        buffer: BufferName,
        hiddens: Sequence[GpuHidden],
        rows: Sequence[Rows],
        target: _DeviceBuffers,
    ) -> None:
        """Copy each run of neighbouring rows; what is new padding becomes zero."""
        pitch = _nbytes(spec, Bucket(1, target.bucket.sequence))
        pointer = target.pointer(buffer)
        widest = min(hidden.bucket.sequence for hidden in hiddens)
        count = sum(len(part) for part in rows)
        if "sequence" in spec.shape and widest < target.bucket.sequence:
            self._cuda.clear(pointer, pitch * target.bucket.batch, self.stream)
        elif count < target.bucket.batch:
            rest = (target.bucket.batch - count) * pitch
            self._cuda.clear(pointer + count * pitch, rest, self.stream)
        position = 0
        for hidden, numbers in zip(hiddens, rows, strict=True):
            source_pitch = _nbytes(spec, Bucket(1, hidden.bucket.sequence))
            source = hidden.buffers.pointer(buffer)
            for first, length in _runs(numbers):
                self._cuda.copy_rows(
                    pointer + position * pitch,
                    pitch,
                    source + first * source_pitch,
                    source_pitch,
                    min(pitch, source_pitch),
                    length,
                    self.stream,
                )
                position += length

    def _crop(
        self, spec: TensorSpec, buffer: BufferName, source: _DeviceBuffers, target: _DeviceBuffers
    ) -> None:
        """Copy the part of a tensor without a batch that a shorter sequence needs."""
        wide = shape_of(spec, source.bucket)
        narrow = shape_of(spec, target.bucket)
        itemsize = _dtype(spec).itemsize
        # The innermost rows are cut to their new width; of the axis before, fewer are taken.
        pitches = wide[-1] * itemsize, narrow[-1] * itemsize
        for matrix in range(int(np.prod(narrow[:-2]))):
            self._cuda.copy_rows(
                target.pointer(buffer) + matrix * narrow[-2] * pitches[1],
                pitches[1],
                source.pointer(buffer) + matrix * wide[-2] * pitches[0],
                pitches[0],
                pitches[1],
                narrow[-2],
                self.stream,
            )


def _dtype(spec: TensorSpec) -> np.dtype[Any]:
    return _DTYPES.get(spec.dtype) or np.dtype(spec.dtype)


def _bits(value: float, spec: TensorSpec) -> float:
    """A number as it is written into an array of a tensor's type."""
    if spec.dtype != "bfloat16":
        return value
    bits = int(np.array(value, np.float32).view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _nbytes(spec: TensorSpec, bucket: Bucket) -> int:
    return int(np.prod(shape_of(spec, bucket))) * _dtype(spec).itemsize


def _bias_of(lengths: NDArray[np.intp], spec: TensorSpec, bucket: Bucket) -> NDArray[Any]:
    bias = np.full(shape_of(spec, bucket), _bits(MASK_FILL, spec), _dtype(spec))
    for number, length in enumerate(lengths):
        bias[number, ..., :length] = 0
    return bias


def _runs(numbers: Rows) -> list[tuple[int, int]]:
    """Runs of neighbouring rows: first row and length."""
    if len(numbers) == 0:
        return []
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1)
    lengths = np.diff(starts, append=len(numbers))
    return [(int(numbers[start]), int(size)) for start, size in zip(starts, lengths, strict=True)]
