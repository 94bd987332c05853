"""A whole request as one CUDA graph, in which the device decides after each exit who stops.

The graph copies the inputs in, runs segment 1 and `decide`, and has an IF node, whose body is
segment 2, `decide`, and the IF node of segment 3. After the outermost IF node it copies exits and
logits out. The host launches it once and waits once. The settings of the rule are among the
inputs, so another rule, operating point or deadline needs no new capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..rules.measures import Floats, Integers
from .cuda import Cuda


class Board:
    """The memory of `decide` for a group, on the device and on the host.

    Args:
        cuda: the driver.
        layout: the result of `board_type`.
        pointer: its device memory.
        rows: rows of the group, rows of padding included.
    """

    def __init__(self, cuda: Cuda, layout: np.dtype[np.void], pointer: int, rows: int) -> None:
        self.pointer, self.rows = pointer, rows
        self._cuda = cuda
        host = cuda.pinned((1,), layout)
        self._host, self._bytes = host.pointer, host.array.view(np.uint8)
        self._stops, self._streaks, self._logits = (
            host.array[name][0] for name in ("stops", "streaks", "logits")
        )
        self._exit_1 = layout.itemsize - self._logits[1:].nbytes
        self._state = self._exit_1 - self._logits[0].nbytes - 2 * self._stops.nbytes

    def write(self, settings: NDArray[np.uint8], rows: int, exit_0: Floats | None) -> None:
        """Write what the graph copies in: settings, and the state of rows before segment 1."""
        self._bytes[: len(settings)] = settings
        self._streaks[:] = 0
        self._stops[:rows], self._stops[rows:] = 0, -1
        if exit_0 is not None:
            self._logits[0, :rows] = exit_0

    def read(self, rows: int) -> tuple[Integers, Floats]:
        """The exit of each row, and the logits from exit 1: copies of what came back."""
        return self._stops[:rows].astype(np.int64), self._logits[1:, :rows].copy()

    def copy_in(self, stream: int) -> None:
        """Enqueue the copy of everything before the logits of exit 1 to the device."""
        self._cuda.copy(self.pointer, self._host, self._exit_1, stream)

    def copy_out(self, stream: int) -> None:
        """Enqueue the copy of the rows' state and logits to the host."""
        size = len(self._bytes) - self._state
        self._cuda.copy(self._host + self._state, self.pointer + self._state, size, stream)


@dataclass(frozen=True, slots=True)
class RequestGraph:
    """A captured request.

    Attributes:
        executable: the CUDA graph.
        board: what it decides on.
        scratch: number of the scratch memory that it uses.
    """

    executable: int
    board: Board
    scratch: int


def capture_request(
    cuda: Cuda,
    stream: int,
    board: Board,
    copy_in: Callable[[], None],
    segments: Sequence[tuple[Callable[[], None], int]],
) -> int:
    """Capture a request.

    Args:
        cuda: the driver.
        stream: the stream to capture in.
        board: what `decide` works on.
        copy_in: enqueues the copies of the inputs of segment 1.
        segments: for each, what enqueues it, and the address of its logits.

    Returns:
        An executable graph.
    """

    def part(number: int, handle: int) -> None:
        if number == 0:
            board.copy_in(stream)
            copy_in()
        run, logits = segments[number]
        run()
        cuda.decide(board.pointer, logits, number + 1, board.rows, handle, stream)

    parts = [partial(part, number) for number in range(len(segments))]
    return cuda.capture_request(stream, parts, partial(board.copy_out, stream))
