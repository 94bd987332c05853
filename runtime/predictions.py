"""The results of an engine: predictions, traces, and a tally of answers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from .artifact.exits import Exits
from .rules.measures import Integers


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one row.

    Attributes:
        labels: the predicted label, or for multi-label the predicted labels (may be none).
        scores: the probability of each predicted label, in their order.
        exit: the number of the exit that answered; exit 0 answers before layer 1. If the operating
            point has a quick pass, its exits come first, and the number after them is that of the
            end of the exact pass. Rows that run in the exact target only, such as those of
            `full_depth`, have the numbers of `Manifest.exits`.
        layer: after how many encoder layers of its pass that exit stands. At the end of an exact
            pass, all layers of the quick pass have run as well.
        probabilities: probabilities of all labels, in the order of `Engine.labels`. Those of a
            single-label model add up to 1; each of a multi-label model stands for itself. Rerankers
            have no labels and give no `Prediction`: a document has a score, `Ranked.score`.
        logits: the logits of that exit, in the same order, from which the probabilities come.
        truncated: whether the text had more tokens than the model takes.
        deadline_limited: whether the deadline stopped the row before its rule did.
        deadline_missed: whether the answer came after the deadline.
    """

    labels: tuple[str, ...]
    scores: tuple[float, ...]
    exit: int
    layer: int
    probabilities: tuple[float, ...]
    logits: tuple[float, ...]
    truncated: bool
    deadline_limited: bool = False
    deadline_missed: bool = False

    def top(self, labels: Sequence[str], k: int | None = None) -> list[tuple[str, float]]:
        """The most probable labels and their probabilities, the most probable one first.

        Args:
            labels: all labels, that is `Engine.labels`.
            k: how many; default: all.
        """
        pairs = zip(labels, self.probabilities, strict=True)
        return sorted(pairs, key=lambda pair: -pair[1])[:k]


@dataclass(frozen=True)
class Trace:
    """Logits of the exits for some rows.

    Attributes:
        logits: `[exits, rows, labels]` float32; NaN at exits that a row did not reach. The first
            axis has the exits from `first_exit` on. With a quick pass, these are its exits and the
            end of the exact pass, so there is one more than in `Manifest.exits`.
        exits: `[rows]` int64, the exit of each row.
        predictions: int64, the answer at that exit: `[rows]` class indices, or for
            multi-label `[rows, labels]` of 0 and 1.
        lengths: `[rows]` tokens of each row, special tokens included.
        first_exit: 0 if the model has exit 0, else 1.
    """

    logits: NDArray[np.float32]
    exits: Integers
    predictions: Integers
    lengths: NDArray[np.intp]
    first_exit: int = 1


@dataclass(frozen=True)
class Tally:
    """Counts of an engine's answers since it was loaded, or since its tally was reset.

    Attributes:
        exits: rows that stopped at each exit, by `Prediction.exit`; the first number is that of
            exit 0 if the model has one, as in `Manifest.exits`. An engine with a quick pass has one
            more number, of the rows that were in doubt and ran the exact pass as well. Rows that
            run in the exact target only, such as those of `full_depth`, are counted at the exits
            after the same layers of the quick pass.
        truncated: rows with more tokens than the model takes.
        deadline_limited: rows that a deadline stopped before their rule did.
        deadline_missed: rows whose `Prediction.deadline_missed` is true.
    """

    exits: tuple[int, ...]
    truncated: int = 0
    deadline_limited: int = 0
    deadline_missed: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            tuple(map(sum, zip_longest(self.exits, other.exits, fillvalue=0))),
            self.truncated + other.truncated,
            self.deadline_limited + other.deadline_limited,
            self.deadline_missed + other.deadline_missed,
        )

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


class Tallies:
    """A tally for each list of exits that rows have seen. Thread-safe.

    The number of an exit means something only together with its list: exit 3 of a quick pass, and
    exit 3 of rows that run in the exact target only, are counted apart.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_quick_target: dict[str, Tally] = {}  # all other passes are the same

    def open(self, exits: Exits) -> None:
        """Show the exits in the total, also before the first row."""
        self.add(exits, Tally((0,) * len(exits)))

    def add(self, exits: Exits, counts: Tally) -> None:
        """Add the counts of rows that have seen these exits."""
        with self._lock:
            before = self._by_quick_target.get(exits.quick)
            self._by_quick_target[exits.quick] = counts if before is None else before + counts

    def of(self, exits: Exits) -> Tally:
        """Rows that have seen these exits."""
        return self._by_quick_target.get(exits.quick, Tally((0,) * len(exits)))

    @property
    def total(self) -> Tally:
        """All rows, by the number of their exit; see `Tally.exits`."""
        with self._lock:
            return sum(self._by_quick_target.values(), Tally(()))

    def reset(self) -> Tally:
        """Start again from zero; returns the total as it was."""
        with self._lock:
            before = self._by_quick_target
            self._by_quick_target = {
                target: Tally((0,) * len(tally.exits)) for target, tally in before.items()
            }
        return sum(before.values(), Tally(()))
