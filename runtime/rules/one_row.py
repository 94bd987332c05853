"""Decide for one row without numpy: what a single text waits for between two segments.

A segment streams its weights through the caches, so whatever runs after it starts cold, and
a dozen numpy calls take longer than the exit head. Plain floats take a fifth of that, but
their last digits differ from numpy's. So they decide only where that cannot matter, and
leave what is close to a threshold to the `RuleRunner`, which sees the same logits: the exits
are the `RuleRunner`'s in every case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..artifact.manifest import ProblemType
from .measures import MEASURES, TINY
from .rules import Budget, FPabee
from .runner import RuleRunner

# Far above the rounding of the two computations, far below what settings tell apart.
_MARGIN = 1e-9
_MOST_LABELS = 16

_Distribution = tuple[float, ...]


class _Floats:
    """Primitives of one distribution."""

    def mean(self, p: _Distribution, q: _Distribution) -> _Distribution:
        return tuple([(a + b) / 2 for a, b in zip(p, q, strict=True)])

    def cross_entropy(self, p: _Distribution, q: _Distribution) -> float:
        return -sum([a * math.log(max(b, TINY)) for a, b in zip(p, q, strict=True)])

    def divergence(self, p: _Distribution, q: _Distribution) -> float:
        terms = [
            a * (math.log(max(a, TINY)) - math.log(max(b, TINY))) for a, b in zip(p, q, strict=True)
        ]
        return max(sum(terms), 0.0)


_FLOATS = _Floats()


class OneRow:
    """A decider's verdicts on one row.

    Args:
        runner: the rule.
    """

    def __init__(self, runner: RuleRunner) -> None:
        self._runner = runner
        self._rule = runner.rule
        self._history: list[Sequence[float]] = []
        self._earlier: tuple[_Distribution, ...] = ()
        self._streak = 0
        self._state = runner.start(1)
        self._decided = 0

    def stops(self, logits: Sequence[float]) -> bool:
        """Whether the row stops at its next exit.

        Args:
            logits: of that exit, `labels` numbers.
        """
        self._history.append(logits)
        exit_number = len(self._history)
        if exit_number >= self._runner.last:
            return True
        signal = self._signal(exit_number, logits)
        if signal is None:
            return self._exactly()
        self._streak = self._streak + 1 if signal else 0
        return self._streak >= self._rule.signals_needed and exit_number >= self._rule.min_exit

    def _signal(self, exit_number: int, logits: Sequence[float]) -> bool | None:
        """Whether the rule gives a sign; None if that is too close, or not known here."""
        rule = self._rule
        if isinstance(rule, Budget):
            return exit_number >= rule.exit
        if not isinstance(rule, FPabee) or len(logits) > _MOST_LABELS:
            return None
        earlier, self._earlier = self._earlier, self._distributions(logits)
        if not earlier:
            return False
        measure = MEASURES[rule.measure]
        pairs = zip(earlier, self._earlier, strict=True)
        threshold = rule.threshold_at(exit_number)
        distance = sum([measure(_FLOATS, p, q) for p, q in pairs]) - threshold
        # Not `<`: a score that is not a number is nobody's sign here.
        return distance < 0 if abs(distance) > _MARGIN * (1 + abs(threshold)) else None

    def _distributions(self, logits: Sequence[float]) -> tuple[_Distribution, ...]:
        """The softmax, or both outcomes of each label."""
        if self._runner.problem_type is ProblemType.SINGLE_LABEL:
            top = max(logits)
            powers = [math.exp(z - top) for z in logits]
            total = sum(powers)
            return (tuple([power / total for power in powers]),)
        both = []
        for z in logits:
            small = math.exp(-abs(z))
            low, high = small / (1 + small), 1 / (1 + small)
            both.append((high, low) if z >= 0 else (low, high))
        return tuple(both)

    def _exactly(self) -> bool:
        """Let the decider see what it has not seen yet; it says whether the row stops."""
        stops = None
        for logits in self._history[self._decided :]:
            self._decided += 1
            stops, _ = self._runner.decide(self._decided, self._state, np.array([logits]))
        self._streak = int(self._state.streak[0])
        return stops is not None
