"""Run segments on a CUDA device: what TensorRT and ONNX Runtime's CUDA provider share.

Each group's buffers have runners of their own, whose shapes and addresses never change. A segment
of a small group can therefore be started with one launch: its first run warms up, the second run is
captured as a CUDA graph, and later runs replay this graph. Segments run one after another, so all
runners of an execution share scratch memory, and those of the same graph and shape share what they
run on. Only the outputs of exit heads are copied back, into pinned memory, with an
event to wait for.

Rows are regrouped by one kernel for each tensor, which comes as PTX. All of this runs in the stream
of the segments, so buffers can be used again without waiting.
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

from ..artifact.manifest import ATTENTION_BIAS, MASK_FILL, NEXT, Manifest, TensorSpec
from ..encoding import Arrays, EncodedRow, write_rows
from ..errors import BackendError
from .base import (
    Backend,
    Bucket,
    BufferName,
    Buffers,
    Execution,
    Hidden,
    Rows,
    dtype_of,
    nbytes_of,
    shape_of,
)
from .cuda import GATHER, Cuda, PinnedArray, check_not_forked, cuda

logger = logging.getLogger(__name__)

# Unused buffers keep up to this much device memory; each also keeps its CUDA graphs.
_FREE_BYTES = 256 * 2**20
# Larger groups are not captured: their kernels take much longer than their launches, and a window
# of many groups would need as many graphs for each segment.
_CAPTURE_TOKENS = 1024


class Runner(ABC):
    """One graph at one shape, with fixed addresses."""

    @abstractmethod
    def run(self) -> None:
        """Enqueue the graph in its stream."""

    def can_capture(self) -> bool:
        """Whether its next run can be part of a CUDA graph."""
        return False


@dataclass(slots=True, eq=False)
class Step:
    """A segment over one group's buffers.

    Attributes:
        event: marks the end of its last run.
        runners: its graphs, in order.
        copies: pinned memory, device address and bytes of each output of the head.
        arrays: the pinned memory by the name of the output.
        executable: its captured CUDA graph; None before it is captured.
        is_small: whether its group is small enough to be captured.
    """

    event: int
    is_small: bool
    runners: list[Runner] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    arrays: Arrays = field(default_factory=dict)
    executable: int | None = None

    def run(self) -> None:
        """Enqueue its graphs."""
        for runner in self.runners:
            runner.run()

    def can_be_captured(self) -> bool:
        """Whether its next run can be captured."""
        return self.is_small and all(runner.can_capture() for runner in self.runners)


class DeviceBuffers(Buffers[int, Step]):
    """Device memory, each buffer as its address."""

    def __init__(self, execution: DeviceExecution, bucket: Bucket) -> None:
        super().__init__(bucket)
        execution.backend.check_bucket(bucket)
        self._execution = execution
        self._cuda = execution.backend.cuda
        self._pinned: dict[BufferName, PinnedArray] = {}
        self._events: list[int] = []
        self._uploaded = self._event()

    def upload(self, write: Callable[[str, NDArray[Any]], None]) -> None:
        """Fill the inputs of segment 1, in the stream's order.

        Args:
            write: writes an input, given by its name, into pinned memory.
        """
        self._cuda.wait(self._uploaded)  # until then, the pinned memory may still be read
        stream = self._execution.stream
        for name, buffer in self._execution.backend.stages[0].live.items():
            pinned = self._staging(buffer)
            write(name, pinned.array)
            self._cuda.copy(self.buffer(buffer), pinned.pointer, pinned.array.nbytes, stream)
        self._cuda.record(self._uploaded, stream)

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

    def _prepare(self, segment: int) -> Step:
        backend = self._execution.backend
        is_small = self.bucket.batch * self.bucket.sequence <= _CAPTURE_TOKENS
        step = Step(self._event(), is_small)
        for call in backend.stages[segment].calls:
            buffers = (*call.inputs, *call.outputs)
            addresses = {name: self.buffer(buffer) for name, buffer in buffers}
            runner = backend.runner(call.graph, self.bucket, addresses, self._execution)
            step.runners.append(runner)
            for name, buffer in call.outputs:
                if not name.startswith(NEXT):
                    host = self._staging(buffer)
                    step.copies.append((host.pointer, self.buffer(buffer), host.array.nbytes))
                    step.arrays[name] = host.array
        return step


class DeviceBackend(Backend[DeviceBuffers]):
    """A backend on the first CUDA device; see `Backend`.

    Attributes:
        most_executions: two keep the device busy: one runs while the other waits for the host.
            Each has contexts, buffers and CUDA graphs of its own for every shape.
        cuda: the driver.
        stream: the stream of all executions; None if each makes its own.
        captures: whether segments of small groups are captured; false once a capture has failed.
    """

    most_executions = 2
    joins = True
    stream: int | None = None

    def __init__(
        self, folder: Path, manifest: Manifest, name: str, threads: int | None = None
    ) -> None:
        super().__init__(folder, manifest, name, threads)
        self.cuda = cuda()
        self.captures = True

    def check_out(self) -> Execution[DeviceBuffers]:
        """An execution for one call, see `Backend`; refused in a forked process."""
        check_not_forked(self.name)
        return super().check_out()

    def open(self) -> DeviceExecution:
        """A new execution."""
        return DeviceExecution(self)

    @abstractmethod
    def check_bucket(self, bucket: Bucket) -> None:
        """Raise `BackendError` for a shape that the target does not run."""

    @abstractmethod
    def runner(
        self, graph: str, bucket: Bucket, addresses: Mapping[str, int], execution: DeviceExecution
    ) -> Runner:
        """A runner of a graph.

        Args:
            graph: name of the graph.
            bucket: the padded shape.
            addresses: where each input and output is, by its name.
            execution: has the stream to run in, and keeps what runners share.
        """


class _Pending(NamedTuple):
    """Head outputs on their way into pinned memory."""

    cuda: Cuda
    step: Step
    rows: int

    def result(self) -> Arrays:
        """Wait for the outputs."""
        self.cuda.wait(self.step.event)
        return {name: array[: self.rows] for name, array in self.step.arrays.items()}


class DeviceExecution(Execution[DeviceBuffers]):
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
        self._scratch = [(0, 0)]  # sizes and addresses
        self._groups: Counter[Bucket] = Counter()
        self.shared: dict[Bucket, dict[str, Any]] = {}

    def enqueue(self, segment: int, hidden: Hidden[DeviceBuffers]) -> _Pending:
        """Enqueue a segment without waiting for it."""
        step = hidden.buffers.step(segment)
        if step.executable is None and self.backend.captures and step.can_be_captured():
            self._capture(step)
        if step.executable is None:
            self._run(step)
        else:
            self._cuda.launch(step.executable, self.stream)
        self._cuda.record(step.event, self.stream)
        hidden.segment = segment + 1
        return _Pending(self._cuda, step, hidden.rows)

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
        """Allocate device memory, and free what no call uses if there is too little."""
        for free_some in (partial(self._shrink, 0), self.backend.drop_idle):
            try:
                return self._cuda.malloc(size)
            except BackendError:
                free_some()
        return self._cuda.malloc(size)

    def close(self) -> None:
        """Free everything."""
        super().close()
        self._cuda.synchronize(self.stream)
        for _, pointer in self._scratch[1:]:
            self._cuda.free(pointer)
        del self._scratch[1:]
        if self.backend.stream is None:
            self._cuda.destroy_stream(self.stream)

    def forget(self, bucket: Bucket) -> None:
        """Called when buffers are freed; the last ones of a shape free what runners share."""
        self._groups[bucket] -= 1
        if not self._groups[bucket]:
            self.shared.pop(bucket, None)

    def _make(self, bucket: Bucket) -> DeviceBuffers:
        buffers = DeviceBuffers(self, bucket)
        self._groups[bucket] += 1
        return buffers

    def _write(self, buffers: DeviceBuffers, encoded: Sequence[EncodedRow]) -> None:
        buffers.upload(lambda name, array: write_rows(array, name, encoded, self._padding[name]))

    def _gather(
        self,
        spec: TensorSpec,
        buffer: BufferName,
        sources: Sequence[tuple[DeviceBuffers, Rows]],
        target: DeviceBuffers,
    ) -> None:
        pitch = nbytes_of(spec, Bucket(1, target.bucket.sequence))
        addresses = np.zeros(target.bucket.batch, np.uint64)
        widths = np.zeros(target.bucket.batch, np.uint32)
        row = 0
        for source, rows in sources:
            source_pitch = nbytes_of(spec, Bucket(1, source.bucket.sequence))
            places = slice(row, row := row + len(rows))
            addresses[places] = source.buffer(buffer) + rows * source_pitch
            widths[places] = min(pitch, source_pitch)
        fill = np.full(8, MASK_FILL if spec.name == ATTENTION_BIAS else 0, dtype_of(spec))
        self._copy_rows(target.buffer(buffer), pitch, addresses, widths, fill)

    def _crop(
        self, spec: TensorSpec, buffer: BufferName, source: DeviceBuffers, target: DeviceBuffers
    ) -> None:
        wide, narrow = shape_of(spec, source.bucket), shape_of(spec, target.bucket)
        # The last two axes are a matrix, of which the first rows and columns are copied.
        matrices, rows = np.ogrid[: np.prod(narrow[:-2]), : narrow[-2]]
        itemsize = dtype_of(spec).itemsize
        places = (matrices * wide[-2] + rows).ravel() * (wide[-1] * itemsize)
        pitch = narrow[-1] * itemsize
        widths = np.full(len(places), pitch, np.uint32)
        addresses = (source.buffer(buffer) + places).astype(np.uint64)
        self._copy_rows(target.buffer(buffer), pitch, addresses, widths, np.zeros(8, np.uint8))

    def _copy_rows(
        self,
        to: int,
        pitch: int,
        sources: NDArray[np.uint64],
        widths: NDArray[np.uint32],
        fill: NDArray[Any],
    ) -> None:
        """Copy rows to one place, in as many launches as the parameters of a kernel need.

        Args:
            to: the address of the first row.
            pitch: bytes of a row there.
            sources: the address of each row.
            widths: bytes to copy of each row.
            fill: is repeated in the rest of each row; its first 8 bytes count.
        """
        plan = np.zeros(1, GATHER)
        plan["fill"], plan["pitch"] = fill.view(np.uint64)[0], pitch
        most = plan["sources"].shape[1]
        for first in range(0, len(sources), most):
            count = min(most, len(sources) - first)
            plan["to"] = to + first * pitch
            plan["sources"][0, :count] = sources[first : first + count]
            plan["widths"][0, :count] = widths[first : first + count]
            self._cuda.gather(plan, count, self.stream)

    def _run(self, step: Step) -> None:
        step.run()
        for host, pointer, size in step.copies:
            self._cuda.copy(host, pointer, size, self.stream)

    def _capture(self, step: Step) -> None:
        try:
            step.executable = self._cuda.capture(self.stream, partial(self._run, step))
        except BackendError as error:
            self.backend.captures = False
            logger.warning(
                "%s: segments run without CUDA graphs: %s", self.backend.name, error.message
            )
