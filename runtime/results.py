"""What an engine gives: predictions, traces, and a tally of what it has answered."""

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
        layer: the layer of that exit: encoder layers that ran for the row.
        probabilities: of all labels, in the order of `Engine.labels`.
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
    """What the chain gave for some rows.

    Attributes:
        logits: `[exits, rows, labels]` float32; NaN at exits that a row did not reach.
        exits: `[rows]` int64, exit of each row, counted from 1.
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
    """What an engine has answered since it was loaded, or since its tally was reset.

    Attributes:
        exits: rows that stopped at each exit.
        truncated: rows with more tokens than the model takes.
        deadline_limited: rows that a deadline stopped before their rule did.
        deadline_missed: rows with a deadline that even exit 1 misses.
        wasted: segments that rows ran beyond their exit, on devices that look ahead.
    """

    exits: tuple[int, ...]
    truncated: int = 0
    deadline_limited: int = 0
    deadline_missed: int = 0
    wasted: int = 0

    @property
    def rows(self) -> int:
        """How many rows in all."""
        return sum(self.exits)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the rows that stopped at each exit; zeros before the first row."""
        return tuple(count / max(1, self.rows) for count in self.exits)

    def drift(self, expected: Sequence[float]) -> float:
        """How far the exits are from those expected, such as `OperatingPoint.exits`.

        Args:
            expected: rows or shares by exit; at least one is above 0.

        Returns:
            Total variation distance: the share of rows that would have to stop elsewhere, 0
            to 1. Of n rows of the same source it is about sqrt(exits / n) by chance.

        Raises:
            ValueError: not one number for each exit, or all of them 0.

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
    """A tally that threads add to.

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
            truncated: how many of them were truncated.
            deadline_limited: `[rows]` which of them the deadline stopped.
            deadline_missed: whether even exit 1 misses their deadline.
            wasted: segments that they ran beyond their exit.
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
        """The tally now."""
        return self._now

    def reset(self) -> Tally:
        """Start again from zero; returns the tally until now."""
        with self._lock:
            before, self._now = self._now, self._zero
        return before
