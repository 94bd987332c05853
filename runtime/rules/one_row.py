"""Decide for a single row without numpy, since its answer is waited for between two segments.

A segment streams its weights through the caches, so whatever runs after it starts cold, and a
dozen numpy calls take longer than the exit head. Plain floats take a fifth of that time, but their
last digits differ from numpy's. They therefore decide only where that cannot matter. A score that
is close to a threshold is left to the `RuleRunner`, which sees the same logits, so the exits are
always those of the `RuleRunner`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .measures import RowOutputs
from .runner import RuleRunner


class OneRow:
    """What a rule decides for one row.

    Args:
        runner: the rule.
    """

    def __init__(self, runner: RuleRunner) -> None:
        self._runner = runner
        self._rule = runner.rule
        self._history: list[Sequence[float]] = []
        self._earlier: RowOutputs | None = None
        self._streak = 0
        self._state = runner.start(1)
        self._replayed = 0

    def stops(self, logits: Sequence[float]) -> bool:
        """Whether the row stops at its next exit.

        Args:
            logits: the logits of that exit, one for each label.
        """
        self._history.append(logits)
        exit_number = self._runner.exits[len(self._history) - 1]
        if exit_number >= self._runner.last:
            return True
        now = RowOutputs(logits, self._runner.problem_type)
        if exit_number == 0:
            signal = self._rule.row_stops_at_exit_0(now)
        else:
            signal = self._rule.row_signal(exit_number, self._earlier, now)
        self._earlier = now
        if signal is None:
            return self._replay()
        if exit_number == 0:
            return signal and self._rule.min_exit == 0
        self._streak = self._streak + 1 if signal else 0
        return self._streak >= self._rule.signals_needed and exit_number >= self._rule.min_exit

    def _replay(self) -> bool:
        """Show the runner the exits that it has not seen yet; it says whether the row stops."""
        stops = None
        for logits in self._history[self._replayed :]:
            exit_number = self._runner.exits[self._replayed]
            stops, _ = self._runner.decide(exit_number, self._state, np.array([logits]))
            self._replayed += 1
        self._streak = int(self._state.streak[0])
        return stops is not None
