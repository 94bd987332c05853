"""The memory of a group on a CUDA device, and what runs its segments and its whole request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..artifact.manifest import LOGITS, NEXT
from ..encoding import Arrays
from ..errors import BackendError
from .buffers import BufferName, Buffers, dtype_of, nbytes_of, shape_of
from .cuda import PinnedArray
from .decide import MOST_ROWS, board_type
from .request_graph import Board, RequestGraph, capture_request
from .shapes import Bucket

if TYPE_CHECKING:
    from .device import DeviceExecution

# Larger groups are not captured: their kernels take much longer than their launches, and a window
# of many groups would need as many graphs for each segment.
_CAPTURE_TOKENS = 1024
# A request of several rows keeps the rows that have stopped. Beyond this size, a segment takes
# longer for more tokens, so running segments one by one and dropping rows is assumed to be faster.
_REQUEST_TOKENS = 256
# TensorRT for RTX compiles during the first runs, which cannot be captured.
_WARM_UPS = 3
_BOARD: BufferName = ("the board of decide", 0)


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


@dataclass(slots=True, eq=False)
class Step:
    """A segment over one group's buffers.

    Attributes:
        event: marks the end of its last run.
        runners: its graphs, in order.
        copies: pinned memory, device address and bytes of each output of the head.
        arrays: the pinned memory by the name of the output.
        executable: its captured CUDA graph; None before it is captured.
        can_capture: false for a large group, and once a capture has failed.
        scratch: number of the scratch memory that its runners use; 0 if none is set.
        logits: device address of the logits.
    """

    event: int
    can_capture: bool
    runners: list[Runner] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    arrays: Arrays = field(default_factory=dict)
    executable: int | None = None
    scratch: int = 0
    logits: int = 0

    def run(self) -> None:
        """Enqueue its graphs."""
        for runner in self.runners:
            runner.run()

    def is_warm(self) -> bool:
        """Whether its next run can be captured."""
        return all(runner.can_capture() for runner in self.runners)


class DeviceBuffers(Buffers[int, Step]):
    """Device memory, each buffer as its address.

    Attributes:
        can_capture: false for a large group, and once the capture of a request has failed.
        requests: how often a graph of the request was asked for before there was one.
        request: that graph.
    """

    def __init__(self, execution: DeviceExecution, bucket: Bucket) -> None:
        super().__init__(bucket)
        execution.backend.check_bucket(bucket)
        self._execution = execution
        self._cuda = execution.backend.cuda
        self._pinned: dict[BufferName, PinnedArray] = {}
        self._events: list[int] = []
        self._uploaded = self._event()
        self._is_uploading = False
        tokens = bucket.batch * bucket.sequence
        self._is_small = tokens <= _CAPTURE_TOKENS
        self.can_capture = self._is_small and (
            bucket.batch == 1 or (bucket.batch <= MOST_ROWS and tokens <= _REQUEST_TOKENS)
        )
        self.requests = 0
        self.request: RequestGraph | None = None
        self._board: Board | None = None

    def upload(self, buffers: Mapping[BufferName, Callable[[NDArray[Any]], None]]) -> None:
        """Fill buffers, in the stream's order.

        Args:
            buffers: for each, what writes its content into pinned memory.
        """
        self.fill(buffers)
        self.send(buffers)
        self._cuda.record(self._uploaded, self._execution.stream)
        self._is_uploading = True

    def fill(self, buffers: Mapping[BufferName, Callable[[NDArray[Any]], None]]) -> None:
        """Write the content of buffers into pinned memory only, see `upload`."""
        if self._is_uploading:  # the pinned memory may still be read
            self._cuda.wait(self._uploaded)
            self._is_uploading = False
        for buffer, write in buffers.items():
            write(self._staging(buffer).array)

    def send(self, buffers: Iterable[BufferName]) -> None:
        """Enqueue the copies of pinned memory to buffers."""
        for buffer in buffers:
            pinned = self._staging(buffer)
            size = pinned.array.nbytes
            self._cuda.copy(self.buffer(buffer), pinned.pointer, size, self._execution.stream)

    def capture_request(self) -> None:
        """Capture a graph of the whole request. The buffers hold inputs for runs that warm up."""
        execution, stages = self._execution, self._execution.backend.stages
        self.drop_request()
        steps = [self.step(segment) for segment in range(len(stages))]
        for step in steps * 2:  # a later segment may make the scratch memory grow
            execution.share_scratch(step)
        for _ in range(_WARM_UPS):
            if not all(step.is_warm() for step in steps):
                for step in steps:
                    step.run()
        if not all(step.is_warm() for step in steps):
            raise BackendError("a segment cannot be part of a CUDA graph", "")
        if self._board is None:
            spec = execution.backend.specs[LOGITS]
            if spec.dtype != "float32":
                raise BackendError(f"the logits are {spec.dtype}, not float32", "")
            _, labels = shape_of(spec, self.bucket)
            layout = board_type(len(steps), labels, self.bucket.batch)
            self._values[_BOARD] = execution.malloc(layout.itemsize)
            self.nbytes += layout.itemsize
            self._board = Board(self._cuda, layout, self._values[_BOARD], self.bucket.batch)
        copy_in = partial(self.send, list(stages[0].live.values()))
        parts = [(step.run, step.logits) for step in steps]
        executable = capture_request(self._cuda, execution.stream, self._board, copy_in, parts)
        self.request = RequestGraph(executable, self._board, steps[0].scratch)

    def drop_request(self) -> None:
        """Destroy the graph of the request."""
        if self.request is not None:
            self._cuda.synchronize(self._execution.stream)
            self._cuda.destroy_graph(self.request.executable)
            self.request = None

    def free(self) -> None:
        """Free everything, once the device no longer uses it."""
        self._cuda.synchronize(self._execution.stream)
        self.drop_request()
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
        step = Step(self._event(), self._is_small)
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
                    if name == LOGITS:
                        step.logits = self.buffer(buffer)
        return step
