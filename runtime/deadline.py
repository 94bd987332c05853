"""The deepest exit that meets a deadline, according to measured times of the exits."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Sequence

import numpy as np

from .backends.shapes import Limits
from .rules.measures import Array, Floats, Integers, Mask
from .rules.runner import RuleRunner

_REPEATS = 3
_LEAST_TOKENS = 8


class ExitTimes:
    """Seconds from each exit to the next by the shape of a group, measured on first use.

    Times are interpolated between one row and a full group, and also between two measured lengths
    unless the target pads to fixed lengths. Thread-safe.

    Args:
        limits: the shapes that the target runs.
        exits: the numbers of the exits.
        measure: runs a group of (rows, tokens) once, and returns the seconds from each exit to the
            next.

    Attributes:
        lengths: the lengths that are measured, in tokens, ascending.
    """

    def __init__(
        self, limits: Limits, exits: range, measure: Callable[[int, int], Sequence[float]]
    ) -> None:
        self._limits = limits
        self._exits = exits
        self._measure = measure
        self._known: dict[tuple[int, int], Array] = {}
        self._lock = threading.Lock()
        self.lengths = limits.sequence_lengths or _powers_of_two(limits.max_sequence)

    def __call__(self, rows: int, tokens: int) -> Array:
        """Seconds from each exit to the next, `[exits]` float64.

        Args:
            rows: rows in the group.
            tokens: tokens in its longest row.
        """
        above = next((n for n in self.lengths if n >= tokens), self.lengths[-1])
        below = max((n for n in self.lengths if n <= tokens), default=above)
        if above == below or self._limits.sequence_lengths:
            return self._at(rows, above)
        share = (tokens - below) / (above - below)
        return (1 - share) * self._at(rows, below) + share * self._at(rows, above)

    def deepest(self, groups: Sequence[tuple[int, int]], seconds: float) -> int:
        """The deepest exit that all rows reach within a time even if no row stops early.

        Args:
            groups: for each group its rows, and the tokens in its longest row.
            seconds: the time, in seconds.

        Returns:
            The exit; a number below that of the first exit if even that takes longer.
        """
        if not groups:
            return self._exits[-1]
        until = np.cumsum(np.sum([self(*group) for group in groups], axis=0))
        return self._exits[0] - 1 + int(np.searchsorted(until, seconds, side="right"))

    def run(self, rows: int, tokens: int) -> None:
        """Run a group of exactly these rows, or a full one, often enough to capture its segments.

        Args:
            rows: rows in the group.
            tokens: tokens in each row.
        """
        self._measured(min(rows, self._full(tokens)), tokens)

    def _full(self, tokens: int) -> int:
        """The rows of a full group."""
        return max(1, min(self._limits.max_batch, self._limits.group_tokens // tokens))

    def _at(self, rows: int, tokens: int) -> Array:
        full = self._full(tokens)
        one = self._measured(1, tokens)
        if rows == 1 or full == 1:
            return one
        share = (rows - 1) / (full - 1)
        return (1 - share) * one + share * self._measured(full, tokens)

    def _measured(self, rows: int, tokens: int) -> Array:
        with self._lock:
            known = self._known.get((rows, tokens))
            if known is None:
                # The first run only warms up.
                runs = [self._measure(rows, tokens) for _ in range(_REPEATS + 1)][1:]
                known = np.array([statistics.median(times) for times in zip(*runs, strict=True)])
                self._known[rows, tokens] = known
        return known


def _powers_of_two(longest: int) -> tuple[int, ...]:
    steps = [min(_LEAST_TOKENS, longest)]
    while steps[-1] < longest:
        steps.append(min(2 * steps[-1], longest))
    return tuple(steps)


def deadline_limited_rows(runner: RuleRunner, exits: Integers, logits: Floats, cap: int) -> Mask:
    """Which rows the deadline stopped before their rule would have.

    Args:
        runner: the rule without the cap.
        exits: `[rows]` int64, the exit of each row.
        logits: `[exits, rows, labels]` float32 of the run.
        cap: the deepest exit that the deadline let rows reach.

    Returns:
        `[rows]` bool.
    """
    limited: Mask = np.asarray(exits == cap)
    if cap >= runner.last:
        return np.zeros(len(exits), np.bool_)
    numbers = np.flatnonzero(limited)
    state = runner.start(len(numbers))
    stops: Mask | None = None
    for place, exit_number in enumerate(range(runner.exits[0], cap + 1)):
        now = logits[place, numbers].astype(np.float64)
        stops, _ = runner.decide(exit_number, state, now)
    if stops is not None:
        limited[numbers[stops]] = False
    return limited
