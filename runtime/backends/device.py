"""Run segments on a CUDA device: what TensorRT and ONNX Runtime's CUDA provider share.

Each group's buffers have runners of their own, whose shapes and addresses never change. A segment
of a small group can therefore be started with one launch: its first run warms up, the second run is
captured as a CUDA graph, and later runs replay this graph. Segments run one after another, so all
runners of an execution share one piece of scratch memory, and those of the same graph and shape
share what they run on. Only the outputs of exit heads are copied back, into pinned memory, with an
event to wait for.

Rows are regrouped with copies of the CUDA driver, one for each run of neighbouring rows. Nothing
here needs a compiler on the device, or a kernel for each GPU. A group has a few dozen rows, and
most neighbours stay together.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import ATTENTION_BIAS, NEXT, Manifest, TensorSpec
from ..encoding import Arrays, EncodedRow, write_rows
from ..errors import BackendError
from .backend import Backend, Execution
from .buffers import BufferName, Buffers, Hidden, shape_of
from .cuda import Cuda, PinnedArray, cuda
from .device_tensors import bias_of, bits_of, dtype_of, nbytes_of, runs_of
from .shapes import Bucket, Rows

logger = logging.getLogger(__name__)

# Unused buffers keep up to this much device memory; each also keeps its CUDA graphs.
_FREE_BYTES = 256 * 2**20
# Larger groups are not captured: their kernels take much longer than their launches, and a window
# of many groups would need as many graphs for each segment.
_CAPTURE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is on the device: address, shape, and type as in the manifest."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str


class Runner(ABC):
    """One graph at one shape, with fixed addresses."""

    @abstractmethod
    def run(self) -> None:
        """Enqueue the graph in its stream."""

    def can_capture(self) -> bool:
        """Whether its next run can be part of a CUDA graph."""
        return False

    def scratch_bytes(self) -> int:
        """Scratch memory that it needs, in bytes; 0 if it allocates its own."""
        return 0

    @abstractmethod
    def use_scratch(self, pointer: int, size: int) -> None:
        """Use the execution's scratch memory: its address, and its size in bytes."""


class DeviceBackend(Backend["_DeviceBuffers"]):
    """A backend on the first CUDA device; see `Backend`.

    Attributes:
        cuda: the driver.
        stream: the stream of all executions; None if each makes its own.
    """

    stream: int | None = None

    def __init__(
        self, folder: Path, manifest: Manifest, name: str, threads: int | None = None
    ) -> None:
        super().__init__(folder, manifest, name, threads)
        self.cuda = cuda()
        self._warned = False

    def open(self) -> DeviceExecution:
        """A new execution."""
        return DeviceExecution(self)

    @abstractmethod
    def check_bucket(self, bucket: Bucket) -> None:
        """Raise `BackendError` for a shape that the target does not run."""

    @abstractmethod
    def runner(
        self, graph: str, bucket: Bucket, places: Mapping[str, Place], execution: DeviceExecution
    ) -> Runner:
        """A runner of a graph.

        Args:
            graph: name of the graph.
            bucket: the padded shape.
            places: where each input and output is, by its name.
            execution: has the stream to run in, and keeps what runners share.
        """

    def warn_once(self, message: str) -> None:
        """Log a warning, unless this backend has logged one before."""
        if not self._warned:
            self._warned = True
            logger.warning("%s: %s", self.name, message)


class _Pending(NamedTuple):
    """Head outputs on their way into pinned memory."""

    cuda: Cuda
    event: int
    arrays: Arrays
    rows: int

    def result(self) -> Arrays:
        """Wait for the outputs."""
        self.cuda.wait(self.event)
        return {name: array[: self.rows] for name, array in self.arrays.items()}


@dataclass(slots=True, eq=False)
class _Step:
    """A segment over one group's buffers.

    Attributes:
        event: marks the end of its last run.
        runners: its graphs, in order.
        copies: pinned memory, device address and bytes of each output of the head.
        arrays: the pinned memory by the name of the output.
        executable: its captured CUDA graph; None before it is captured.
        can_capture: false for a large group, and once a capture has failed.
        scratch: number of the scratch memory that its runners use; 0 if none is set.
    """

    event: int
    can_capture: bool
    runners: list[Runner] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    arrays: Arrays = field(default_factory=dict)
    executable: int | None = None
    scratch: int = 0


class _DeviceBuffers(Buffers[int, _Step]):
    """Device memory, each buffer as its address.

    Attributes:
        lengths: `[rows]` int64, tokens of each row that the buffers hold.
    """

    def __init__(self, execution: DeviceExecution, bucket: Bucket) -> None:
        super().__init__(bucket)
        execution.backend.check_bucket(bucket)
        self._execution = execution
        self._cuda = execution.backend.cuda
        self._pinned: dict[BufferName, PinnedArray] = {}
        self._events: list[int] = []
        self._uploaded = self._event()
        self.lengths = np.zeros(0, np.intp)

    def upload(self, buffers: Mapping[BufferName, Callable[[NDArray[Any]], None]]) -> None:
        """Fill buffers, in the stream's order.

        Args:
            buffers: for each, what writes its content into pinned memory.
        """
        self._cuda.wait(self._uploaded)  # the pinned memory may still be read
        for buffer, write in buffers.items():
            pinned = self._staging(buffer)
            write(pinned.array)
            size = pinned.array.nbytes
            self._cuda.copy(self.buffer(buffer), pinned.pointer, size, self._execution.stream)
        self._cuda.record(self._uploaded, self._execution.stream)

    def free(self) -> None:
        """Free everything, once the device no longer uses it."""
        self._cuda.synchronize(self._execution.stream)
        for step in self._steps.values():
            if step.executable is not None:
                self._cuda.destroy_graph(step.executable)
            step.runners.clear()
        for pointer in self._values.values():
            self._cuda.free(pointer)
        for event in self._events:
            self._cuda.destroy_event(event)
        for kept in (self._steps, self._values, self._pinned, self._events):
            kept.clear()
        self._execution.forget(self.bucket)

    def _allocate(self, name: BufferName) -> int:
        size = nbytes_of(self._execution.backend.specs[name[0]], self.bucket)
        pointer = self._execution.malloc(size)
        self.nbytes += size
        return pointer

    def _staging(self, buffer: BufferName) -> PinnedArray:
        pinned = self._pinned.get(buffer)
        if pinned is None:
            spec = self._execution.backend.specs[buffer[0]]
            shape = shape_of(spec, self.bucket)
            pinned = self._pinned[buffer] = self._cuda.pinned(shape, dtype_of(spec))
        return pinned

    def _event(self) -> int:
        self._events.append(self._cuda.event())
        return self._events[-1]

    def _prepare(self, segment: int) -> _Step:
        backend = self._execution.backend
        is_small = self.bucket.batch * self.bucket.sequence <= _CAPTURE_TOKENS
        step = _Step(self._event(), is_small)
        for call in backend.stages[segment].calls:
            places = {}
            for name, buffer in (*call.inputs, *call.outputs):
                spec = backend.specs[buffer[0]]
                places[name] = Place(self.buffer(buffer), shape_of(spec, self.bucket), spec.dtype)
            runner = backend.runner(call.graph, self.bucket, places, self._execution)
            step.runners.append(runner)
            for name, buffer in call.outputs:
                if not name.startswith(NEXT):
                    host = self._staging(buffer)
                    step.copies.append((host.pointer, self.buffer(buffer), host.array.nbytes))
                    step.arrays[name] = host.array
        return step


class DeviceExecution(Execution[_DeviceBuffers]):
    """Runs segments in a stream; see `Execution`.

    Args:
        backend: the backend, which may have one stream for all of its executions.

    Attributes:
        stream: the stream.
        shared: what runners of the same shape share, by shape and graph.
    """

    lookahead = True

    def __init__(self, backend: DeviceBackend) -> None:
        super().__init__(backend, _FREE_BYTES)
        self.backend = backend
        self.stream = backend.cuda.stream() if backend.stream is None else backend.stream
        self._cuda = backend.cuda
        self._scratch = 0
        self._scratch_size = 0
        self._scratch_number = 0  # an address may be used again for less memory
        self._groups: Counter[Bucket] = Counter()
        self.shared: dict[Bucket, dict[str, Any]] = {}

    def enqueue(self, segment: int, hidden: Hidden[_DeviceBuffers]) -> _Pending:
        """Enqueue a segment without waiting for it."""
        step = hidden.buffers.step(segment)
        self._share_scratch(step)
        if step.executable is not None:
            self._cuda.launch(step.executable, self.stream)
        elif step.can_capture and all(runner.can_capture() for runner in step.runners):
            self._capture(step)
        else:
            self._run(step)
        self._cuda.record(step.event, self.stream)
        hidden.segment = segment + 1
        return _Pending(self._cuda, step.event, step.arrays, hidden.rows)

    def wait(self) -> None:
        """Wait for the stream."""
        self._cuda.synchronize(self.stream)

    def malloc(self, size: int) -> int:
        """Allocate device memory, and free what no call uses if there is too little."""
        for free_some in (partial(self._store.shrink, 0), self.backend.drop_idle):
            try:
                return self._cuda.malloc(size)
            except BackendError:
                free_some()
        return self._cuda.malloc(size)

    def close(self) -> None:
        """Free everything."""
        super().close()
        if self._scratch:
            self._cuda.synchronize(self.stream)
            self._cuda.free(self._scratch)
            self._scratch = self._scratch_size = 0
        if self.backend.stream is None:
            self._cuda.destroy_stream(self.stream)

    def forget(self, bucket: Bucket) -> None:
        """Called when buffers are freed; the last ones of a shape free what runners share."""
        self._groups[bucket] -= 1
        if not self._groups[bucket]:
            self.shared.pop(bucket, None)

    def _make(self, bucket: Bucket) -> _DeviceBuffers:
        buffers = _DeviceBuffers(self, bucket)
        self._groups[bucket] += 1
        return buffers

    def _write(self, buffers: _DeviceBuffers, encoded: Sequence[EncodedRow]) -> None:
        def writes(name: str) -> Callable[[NDArray[Any]], None]:
            padding = bits_of(self._padding[name], self._specs[name])
            return lambda array: write_rows(array, name, encoded, padding)

        live = self._stages[0].live
        buffers.upload({buffer: writes(name) for name, buffer in live.items()})
        buffers.lengths = np.array([len(row) for row in encoded], np.intp)

    def _gather(
        self,
        spec: TensorSpec,
        buffer: BufferName,
        sources: Sequence[tuple[_DeviceBuffers, Rows]],
        target: _DeviceBuffers,
    ) -> None:
        if spec.name == ATTENTION_BIAS:
            # These few numbers follow from the lengths; uploading them is cheaper than gathering.
            target.lengths = np.concatenate([source.lengths[rows] for source, rows in sources])
            bias = bias_of(target.lengths, spec, target.bucket)
            target.upload({buffer: lambda array: np.copyto(array, bias)})
            return
        batch, sequence = target.bucket.batch, target.bucket.sequence
        pitch = nbytes_of(spec, Bucket(1, sequence))
        pointer = target.buffer(buffer)
        count = sum(len(rows) for _, rows in sources)
        shortest = min(source.bucket.sequence for source, _ in sources)
        if "sequence" in spec.shape and shortest < sequence:
            self._cuda.clear(pointer, pitch * batch, self.stream)
        elif count < batch:
            self._cuda.clear(pointer + count * pitch, (batch - count) * pitch, self.stream)
        for source, rows in sources:
            source_pitch = nbytes_of(spec, Bucket(1, source.bucket.sequence))
            width = min(pitch, source_pitch)
            for first, length in runs_of(rows):
                start = (source.buffer(buffer) + first * source_pitch, source_pitch)
                self._cuda.copy_rows((pointer, pitch), start, width, length, self.stream)
                pointer += length * pitch

    def _crop(
        self, spec: TensorSpec, buffer: BufferName, source: _DeviceBuffers, target: _DeviceBuffers
    ) -> None:
        wide, narrow = shape_of(spec, source.bucket), shape_of(spec, target.bucket)
        itemsize = dtype_of(spec).itemsize
        # The last two axes are a matrix, of which the first rows and columns are copied.
        wide_pitch, pitch = wide[-1] * itemsize, narrow[-1] * itemsize
        for matrix in range(int(np.prod(narrow[:-2]))):
            start = (source.buffer(buffer) + matrix * wide[-2] * wide_pitch, wide_pitch)
            end = (target.buffer(buffer) + matrix * narrow[-2] * pitch, pitch)
            self._cuda.copy_rows(end, start, pitch, narrow[-2], self.stream)

    def _run(self, step: _Step) -> None:
        for runner in step.runners:
            runner.run()
        for host, pointer, size in step.copies:
            self._cuda.copy(host, pointer, size, self.stream)

    def _capture(self, step: _Step) -> None:
        """Capture a step and launch it. If that fails, run it, and do not try again."""
        try:
            step.executable = self._cuda.capture(self.stream, partial(self._run, step))
        except BackendError as error:
            step.can_capture = False
            self.backend.warn_once(f"a segment runs without a CUDA graph: {error.message}")
            self._run(step)
        else:
            self._cuda.launch(step.executable, self.stream)

    def _share_scratch(self, step: _Step) -> None:
        """Let a step's runners use the common scratch memory, which grows if they need more."""
        if step.scratch and step.scratch == self._scratch_number:
            return
        need = max(runner.scratch_bytes() for runner in step.runners)
        if need > self._scratch_size:
            if self._scratch:  # work in the stream still uses it
                self._cuda.synchronize(self.stream)
                self._cuda.free(self._scratch)
                self._scratch = self._scratch_size = 0
            self._scratch = self.malloc(need)
            self._scratch_size = need
            self._scratch_number += 1
        if step.executable is not None:  # it holds the old address
            self._cuda.synchronize(self.stream)
            self._cuda.destroy_graph(step.executable)
            step.executable = None
        for runner in step.runners:
            runner.use_scratch(self._scratch, self._scratch_size)
        step.scratch = self._scratch_number
