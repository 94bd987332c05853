"""The memory of a group on a CUDA device, and what runs its segments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..artifact.manifest import NEXT
from ..encoding import Arrays
from .buffers import BufferName, Buffers, dtype_of, nbytes_of, shape_of
from .cuda import PinnedArray
from .shapes import Bucket

if TYPE_CHECKING:
    from .device import DeviceExecution

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
