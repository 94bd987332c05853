"""The rules on a trace, each as one matrix of *stop scores*, so that all thresholds are one sweep.

`simulate` applies a rule with one setting, but a sweep wants thousands. So every rule can express
everything but its threshold as `[exits, rows]` numbers, see `ExitRule.stop_scores`. `simulate`
remains the reference: the tests compare the two for every row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..runtime.rules.base import SearchSpace, ThresholdRule
from ..runtime.rules.measures import Array, Measure
from ..runtime.rules.rules import RULES, ExitRule
from ..runtime.rules.runner import simulate
from .scoring import Rows

_GRID = 200


@dataclass(frozen=True)
class Family:
    """All settings of a rule that differ in the threshold only.

    Attributes:
        rule: one of them.
        scores: `[exits, rows]` stop scores.
    """

    rule: ExitRule
    scores: Array

    @cached_property
    def grid(self) -> Array:
        """Thresholds of the stop scores to try, ascending; the first stops no row early."""
        finite = self.scores[:-1][np.isfinite(self.scores[:-1])]
        if not isinstance(self.rule, ThresholdRule) or not finite.size:
            return np.full(1, 0.5)
        lowest, highest = finite.min(), finite.max()
        values = np.quantile(finite, np.linspace(0, 1, _GRID - 2))
        margin = 1e-3 * max(1.0, abs(lowest), abs(highest))
        return np.unique([lowest - margin, *map(rounded, values), highest + margin])

    def with_threshold(self, threshold: float | Sequence[float]) -> ExitRule:
        """The rule with a threshold of its stop scores: one, or one for each exit."""
        return self.rule.with_stop_threshold(threshold)


def rounded(threshold: float) -> float:
    """A threshold with four significant digits, as people can read it."""
    return float(f"{threshold:.4g}")


class StopScores:
    """Makes the families of a trace; scores that several of them share are computed once.

    Args:
        rows: the trace.
    """

    def __init__(self, rows: Rows) -> None:
        self.exits = rows.exits
        self._rows = rows
        self._known: dict[ExitRule, Array] = {}

    def family(self, rule: ExitRule) -> Family:
        """The settings that differ from a rule in the threshold only."""
        return Family(rule, rule.stop_scores(self.scores_of))

    def scores_of(self, rule: ExitRule) -> Array:
        """The scores `[exits, rows]` of a rule, see `Simulation.scores`."""
        if rule not in self._known:
            rows = self._rows
            result = simulate(rows.logits, rule, rows.problem_type, rows.label_thresholds)
            self._known[rule] = result.scores
        return self._known[rule]


def families(
    stop: StopScores,
    names: Sequence[str],
    measures: Sequence[Measure],
    first_exits: Sequence[int] = (1,),
    patiences: Sequence[int] | None = None,
) -> Iterator[Family]:
    """Every setting of some rules but the threshold.

    Args:
        stop: the stop scores of the trace.
        names: names of the rules.
        measures: similarity measures to try.
        first_exits: values of `min_exit` to try.
        patiences: values of `patience` to try; None means all that can stop a row early.
    """
    every = range(1, stop.exits) if patiences is None else patiences
    space = SearchSpace(stop.exits, measures, every, stop.scores_of)
    for first in first_exits:
        for name in names:
            for rule in RULES[name].search_grid(space):
                yield stop.family(dataclasses.replace(rule, min_exit=first))
