"""Results of an engine: predictions, traces, and a tally of its answers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .rules.measures import Answers, Mask


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one row.

    Attributes:
        labels: the predicted label, or for multi-label the predicted labels (may be none).
        scores: the probability of each predicted label, in their order.
        exit: the exit that answered, counted from 1.
        layer: the layer of that exit, which is the number of encoder layers that ran.
        probabilities: probabilities of all labels, in the order of `Engine.labels`.
        truncated: whether the text had more tokens than the model takes.
        deadline_limited: whether the deadline stopped the row before its rule did.
        deadline_missed: whether even exit 1 takes longer than the deadline.
    """

    labels: tuple[str, ...]
    scores: tuple[float, ...]
    exit: int
    layer: int
    probabilities: tuple[float, ...]
    truncated: bool
    deadline_limited: bool = False
    deadline_missed: bool = False


@dataclass(frozen=True)
class Trace:
    """Logits of the exits for some rows.

    Attributes:
        logits: `[exits, rows, labels]` float32; NaN at exits that a row did not reach.
        exits: `[rows]` int64, the exit of each row, counted from 1.
        predictions: int64, the answer at that exit: `[rows]` class indices, or for
            multi-label `[rows, labels]` of 0 and 1.
        lengths: `[rows]` tokens of each row, special tokens included.
    """

    logits: NDArray[np.float32]
    exits: Answers
    predictions: Answers
    lengths: NDArray[np.intp]


@dataclass(frozen=True)
class Tally:
    """Counts of an engine's answers since it was loaded, or since its tally was reset.

    Attributes:
        exits: rows that stopped at each exit.
        truncated: rows with more tokens than the model takes.
        deadline_limited: rows that a deadline stopped before their rule did.
        deadline_missed: rows for which even exit 1 took longer than the deadline.
        wasted: segments that rows ran beyond their exit, on devices that look ahead.
    """

    exits: tuple[int, ...]
    truncated: int = 0
    deadline_limited: int = 0
    deadline_missed: int = 0
    wasted: int = 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(self.exits)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the rows that stopped at each exit; zeros before the first row."""
        return tuple(count / max(1, self.rows) for count in self.exits)

    def drift(self, expected: Sequence[float]) -> float:
        """How far the exits are from expected ones, such as `OperatingPoint.exits`.

        Args:
            expected: rows or shares by exit; at least one is above 0.

        Returns:
            The total variation distance, from 0 to 1: the share of rows that would have to stop
            elsewhere. For n rows from the same source it is about sqrt(exits / n) by chance.

        Raises:
            ValueError: `expected` does not have one number for each exit, or all are 0.

        Example:
            >>> from fpabee.runtime import Tally
            >>> Tally(exits=(75, 25)).drift([0.5, 0.5])
            0.25
        """
        if len(expected) != len(self.exits) or not sum(expected) > 0:
            raise ValueError(f"expected {len(self.exits)} counts, not {list(expected)}")
        total = sum(expected)
        pairs = zip(self.shares, expected, strict=True)
        return sum(abs(share - count / total) for share, count in pairs) / 2


class Counter:
    """A tally to which threads add.

    Args:
        exits: number of exits.
    """

    def __init__(self, exits: int) -> None:
        self._lock = threading.Lock()
        self._zero = Tally((0,) * exits)
        self._now = self._zero

    def add(
        self,
        exits: Answers,
        truncated: int,
        deadline_limited: Mask,
        deadline_missed: bool,
        wasted: int,
    ) -> None:
        """Count rows.

        Args:
            exits: `[rows]` exit of each row, counted from 1.
            truncated: how many rows were truncated.
            deadline_limited: `[rows]` which rows the deadline stopped.
            deadline_missed: whether even exit 1 takes longer than their deadline.
            wasted: segments that rows ran beyond their exit.
        """
        counts = np.bincount(exits, minlength=len(self._zero.exits) + 1)[1:].tolist()
        with self._lock:
            now = self._now
            self._now = Tally(
                tuple(a + b for a, b in zip(now.exits, counts, strict=True)),
                now.truncated + truncated,
                now.deadline_limited + int(np.count_nonzero(deadline_limited)),
                now.deadline_missed + len(exits) * deadline_missed,
                now.wasted + wasted,
            )

    def read(self) -> Tally:
        """The current tally."""
        return self._now

    def reset(self) -> Tally:
        """Start again from zero; returns the tally as it was."""
        with self._lock:
            before, self._now = self._now, self._zero
        return before
