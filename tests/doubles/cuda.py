"""A double of the CUDA driver.

Device memory is NumPy memory behind made-up addresses: every access is checked for bounds
and for freed memory. Streams are queues that run only when someone waits, which is as late as
the driver may run them. Freeing memory waits for all of them. Reading pinned memory before its
event gives NaN. A call in a thread whose current context is another one fails. Threads may share
the double; only one call runs at a time.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpabee.runtime.backends.cuda import FINAL, GATHER, Cuda, PinnedArray

_GAP = 1 << 20
_OF_THREAD = threading.local()

Work = Callable[[], None]


@dataclass
class _Stream:
    queue: list[Work | int] = field(default_factory=list)  # an int is an event


def contexts() -> list[object]:
    """The stack of contexts of this thread, the current one last."""
    stack: list[object] = _OF_THREAD.__dict__.setdefault("contexts", [])
    return stack


def current() -> FakeCuda:
    """The device whose context is current in this thread."""
    context = contexts()[-1] if contexts() else None
    assert isinstance(context, FakeCuda), f"the current context is {context}, not that of a device"
    return context


class OnDevice:
    """An object of a library that must be made and freed in the context of a device."""

    def __init__(self) -> None:
        self.cuda = current()
        number = next(_NUMBERS)
        self._number = _Number(number)
        _MADE[number] = (self.cuda, type(self).__name__)


class _Number(int):
    """Notes that the object which has it is freed.

    Like objects of a library, a number cannot be finalized by the garbage collector before what
    refers to its owner.
    """

    __slots__ = ()

    def __del__(self) -> None:
        cuda, kind = _MADE.pop(self)
        cuda.freed.append(kind)
        if contexts()[-1:] != [cuda]:
            cuda.freed_elsewhere.append(kind)


_NUMBERS = itertools.count()
_MADE: dict[int, tuple[FakeCuda, str]] = {}


def one_at_a_time(kind: type[Any]) -> type[Any]:
    """Lock every public method of a class that has a lock; calls of CUDA need its context."""
    for name, method in list(vars(kind).items()):
        if callable(method) and not name.startswith("_"):

            def locked(
                self: Any, *arguments: Any, _method: Callable[..., Any] = method, **others: Any
            ) -> Any:
                with self._lock:
                    self.calls[_method.__name__] += 1
                    if _method.__name__ in vars(Cuda):
                        self.must_be_current()
                        if self.dead:
                            self._check((self.dead,))
                    return _method(self, *arguments, **others)

            setattr(kind, name, functools.wraps(method)(locked))
    return kind


@one_at_a_time
class FakeCuda(Cuda):
    """The calls of `Cuda` over NumPy memory.

    Args:
        room: device memory in bytes.
        number: that of the device.

    Attributes:
        fails_at: calls that fail once, by name: 1 is the next call, 2 the one after it.
        error: the number of the error with which they fail.
        dead: the number of the error that every call gives; 0: none.
        calls: how often each method was called.
        idle: how often the device had nothing left to do when a wait ended.
        freed: kinds of objects of a library that were freed, in this order.
        freed_elsewhere: kinds of objects of a library that were freed in another context.
    """

    def __init__(self, room: int = 1 << 30, number: int = 0) -> None:
        self.failed = ""
        self._number = number
        self._context = self
        self._driver = SimpleNamespace(
            cuCtxPushCurrent=self._push,
            cuCtxPopCurrent=lambda: (0, contexts().pop()),
            cuGetErrorString=lambda status: (0, b"made up"),
        )
        self.error = 2
        self.dead = 0
        self.room = room
        self.memory_of: dict[int, NDArray[np.uint8]] = {}
        self.pinned_of: weakref.WeakValueDictionary[int, NDArray[np.uint8]]
        self.pinned_of = weakref.WeakValueDictionary()
        self.streams: dict[int, _Stream] = {}
        self.events: dict[int, bool] = {}
        self.idle = 0
        self.freed: list[str] = []
        self.freed_elsewhere: list[str] = []
        self.fails_at: dict[str, int] = {}
        self._lock = threading.RLock()
        self.calls: Counter[str] = Counter()
        self._next = itertools.count((1 << 40) + 256, 1 << 30)  # aligned as the driver's
        self._handles = itertools.count(1)

    # -- contexts

    def _push(self, context: object) -> tuple[int]:
        if not self.dead:
            contexts().append(context)
        return (self.dead,)

    def must_be_current(self) -> None:
        """Fail if the context of this device is not the current one of this thread."""
        assert current() is self, "the context of another device is current"

    # -- memory

    def malloc(self, size: int) -> int:
        used = sum(memory.nbytes for memory in self.memory_of.values())
        if used + size > self.room or self.fails("malloc"):
            raise self.no_room(size)
        pointer = next(self._next)
        self.memory_of[pointer] = np.full(size, 0xFF, np.uint8)
        return pointer

    def free(self, pointer: int) -> None:
        for stream in self.streams.values():
            while stream.queue:
                self._step(stream)
        del self.memory_of[pointer]

    def memory(self) -> tuple[int, int]:
        used = sum(memory.nbytes for memory in self.memory_of.values())
        return self.room - used, self.room

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> PinnedArray:
        self._may_fail("pinned")
        pointer = next(self._next)
        count = int(np.prod(shape))
        memory = np.zeros(max(1, count * dtype.itemsize), np.uint8)
        self.pinned_of[pointer] = memory
        array = memory[: count * dtype.itemsize].view(dtype).reshape(shape)
        return PinnedArray(array, pointer)

    def view(self, pointer: int, size: int) -> NDArray[np.uint8]:
        """`size` bytes of allocated memory at an address."""
        for memory_of in (self.memory_of, self.pinned_of):
            for start, memory in list(memory_of.items()):
                if start <= pointer < start + _GAP + memory.nbytes:
                    offset = pointer - start
                    assert offset + size <= memory.nbytes, "beyond the end of an allocation"
                    return memory[offset : offset + size]
        raise AssertionError(f"{pointer:#x} is nobody's memory, or was given back")

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        def work() -> None:
            self.view(target, size)[...] = self.view(source, size)

        def when_queued() -> None:
            if target in self.pinned_of:
                self.view(target, size)[...] = 0xFF  # invalid until it has been waited for

        self.put(stream, work, when_queued)

    def gather(self, plan: NDArray[np.void], rows: int, stream: int) -> None:
        assert plan.dtype == GATHER
        (copied,) = plan.copy()

        def work() -> None:
            pitch = int(copied["pitch"])
            fill = copied["fill"].tobytes()
            for row in range(rows):
                width = int(copied["widths"][row])
                target = self.view(int(copied["to"]) + row * pitch, pitch)
                target[:] = np.resize(np.frombuffer(fill, np.uint8), pitch)
                if width:
                    target[:width] = self.view(int(copied["sources"][row]), width)

        self.put(stream, work)

    # -- order

    def put(self, stream: int, work: Work, when_queued: Work | None = None) -> None:
        """Queue work; `when_queued` runs at once."""
        self.streams[stream].queue.append(work)
        if when_queued is not None:
            when_queued()

    def stream(self) -> int:
        self._may_fail("stream")
        handle = next(self._handles)
        self.streams[handle] = _Stream()
        return handle

    def run_all(self, stream: int) -> None:
        """Run all work of a stream."""
        state = self.streams[stream]
        while state.queue:
            self._step(state)

    def finish(self, stream: int) -> None:
        self.run_all(stream)

    def destroy_stream(self, stream: int) -> None:
        assert not self.streams[stream].queue
        del self.streams[stream]

    def event(self) -> int:
        self._may_fail("event")
        handle = next(self._handles)
        self.events[handle] = True
        return handle

    def record(self, event: int, stream: int) -> None:
        self.events[event] = False
        self.streams[stream].queue.append(event)

    def wait(self, event: int) -> None:
        assert event in self.events, "the event was given back"
        while not self.events[event]:
            stream = next(s for s in self.streams.values() if event in s.queue)
            self._step(stream)
            self.idle += self.events[event] and not stream.queue

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def _step(self, stream: _Stream) -> None:
        first = stream.queue.pop(0)
        if not isinstance(first, int):
            first()
        elif first not in stream.queue:
            self.events[first] = True

    def fails(self, call: str) -> bool:
        """Whether this call of a kind is the one that fails."""
        self.fails_at[call] = self.fails_at.get(call, 0) - 1
        fails = self.fails_at[call] == 0
        if fails and self.error in FINAL:
            self.dead = self.error
        return fails

    def _may_fail(self, call: str) -> None:
        if self.fails(call):
            self._check((self.error,))
