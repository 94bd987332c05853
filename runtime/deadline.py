"""The deepest exit that fits a time, by measured times of the segments."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .backends.base import Limits
from .rules.measures import Answers, Array, Floats, Mask
from .rules.runner import RuleRunner

_REPEATS = 3
_LEAST_TOKENS = 8


@dataclass(frozen=True)
class Cap:
    """How deep a deadline lets rows go.

    Attributes:
        exit: the deepest exit that fits, at least 1.
        deadline_missed: whether even exit 1 does not fit.
    """

    exit: int
    deadline_missed: bool


class SegmentTimes:
    """Seconds of each segment by the shape of a group, measured once when first asked for.

    Lengths between two measured ones are interpolated, and so are the rows between one and a
    full group. Thread-safe.

    Args:
        limits: the shapes that the target runs.
        measure: runs a group of (rows, tokens) once; gives the seconds of each segment.
    """

    def __init__(self, limits: Limits, measure: Callable[[int, int], Sequence[float]]) -> None:
        self._limits = limits
        self._measure = measure
        self._known: dict[tuple[int, int], Array] = {}
        self._lock = threading.Lock()
        steps = limits.sequence_lengths or _powers_of_two(limits.max_sequence)
        self.lengths = tuple(steps)
        """Tokens a row that are measured, ascending."""

    def __call__(self, rows: int, tokens: int) -> Array:
        """`[segments]` seconds on a group of rows, the longest of so many tokens."""
        above = next((n for n in self.lengths if n >= tokens), self.lengths[-1])
        below = max((n for n in self.lengths if n <= tokens), default=above)
        if above == below or self._limits.sequence_lengths:
            return self._at(rows, above)
        share = (tokens - below) / (above - below)
        return (1 - share) * self._at(rows, below) + share * self._at(rows, above)

    def deepest(self, groups: Sequence[tuple[int, int]], seconds: float) -> Cap:
        """The deepest exit that groups reach within a time, as if no row stopped before it.

        Args:
            groups: rows and longest row in tokens of each.
            seconds: the time.
        """
        if not groups:
            return Cap(len(self(1, 1)), False)
        until = np.cumsum(np.sum([self(*group) for group in groups], axis=0))
        fits = int(np.searchsorted(until, seconds, side="right"))
        return Cap(max(1, fits), fits == 0)

    def _at(self, rows: int, tokens: int) -> Array:
        full = max(1, min(self._limits.max_batch, self._limits.group_tokens // tokens))
        one = self._measured(1, tokens)
        if rows == 1 or full == 1:
            return one
        share = (rows - 1) / (full - 1)
        return (1 - share) * one + share * self._measured(full, tokens)

    def _measured(self, rows: int, tokens: int) -> Array:
        with self._lock:
            known = self._known.get((rows, tokens))
            if known is None:
                # The first run warms up.
                runs = [self._measure(rows, tokens) for _ in range(_REPEATS + 1)][1:]
                known = np.array([statistics.median(times) for times in zip(*runs, strict=True)])
                self._known[rows, tokens] = known
        return known


def _powers_of_two(longest: int) -> list[int]:
    steps = [min(_LEAST_TOKENS, longest)]
    while steps[-1] < longest:
        steps.append(min(2 * steps[-1], longest))
    return steps


def deadline_limited_rows(runner: RuleRunner, exits: Answers, logits: Floats, cap: Cap) -> Mask:
    """`[rows]`: which rows the cap stopped, and not their rule.

    Args:
        runner: the rule without the cap.
        exits: `[rows]` exit of each row, counted from 1.
        logits: `[exits, rows, labels]` of the run.
        cap: what the deadline let rows do.
    """
    deadline_limited: Mask = np.asarray(exits == cap.exit)
    if not deadline_limited.any() or cap.exit >= runner.last:
        return np.zeros(len(exits), np.bool_)
    numbers = np.flatnonzero(deadline_limited)
    state = runner.start(len(numbers))
    stops: Mask | None = None
    for exit_number in range(1, cap.exit + 1):
        now = logits[exit_number - 1, numbers].astype(np.float64)
        stops, _ = runner.decide(exit_number, state, now)
    if stops is not None:
        deadline_limited[numbers[stops]] = False
    return deadline_limited
