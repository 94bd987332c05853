"""Try every threshold of a rule on a trace at once.

`simulate` applies a rule with one setting, but a search wants thousands. So every rule can express
everything but its threshold as one matrix, see `ExitRule.stop_scores`, and a sweep over thresholds
is a cumulative histogram. `simulate` remains the reference: the tests compare the two row by row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.manifest import ProblemType
from ..runtime.errors import RuleError
from ..runtime.rules.base import ExitRule, SearchSpace, ThresholdRule
from ..runtime.rules.measures import Answers, Array, Measure
from ..runtime.rules.rules import RULES
from ..runtime.rules.runner import simulate
from .scoring import LabelledLogits

_GRID = 200


class Family:
    """All settings of a rule that differ in the threshold only, and sums over rows for each.

    As the threshold rises, a row moves from the last exit to earlier ones, each time at a known
    threshold. A sum over rows, at all thresholds, is therefore a cumulative histogram of what the
    moves change.

    Args:
        rule: one of the settings.
        scores: `[exits, rows]` stop scores of the rule.

    Attributes:
        rule: as given.
        scores: as given.
        grid: thresholds of the stop scores to try, ascending; the first stops no row early.
    """

    def __init__(self, rule: ExitRule, scores: Array) -> None:
        self.rule = rule
        self.scores = scores
        self.grid = np.full(1, 0.5)
        finite = scores[:-1][np.isfinite(scores[:-1])]
        if isinstance(rule, ThresholdRule) and finite.size:
            lowest, highest = finite.min(), finite.max()
            margin = 1e-3 * max(1.0, abs(lowest), abs(highest))
            inner = map(rounded, np.quantile(finite, np.linspace(0, 1, _GRID - 2)))
            self.grid = np.unique([lowest - margin, *inner, highest + margin])

    @cached_property
    def _reached(self) -> NDArray[np.intp]:
        """The first threshold of the grid at which a row stops at an exit or before it.

        A score that equals a threshold does not stop the row.
        """
        places = np.searchsorted(self.grid, self.scores, side="right")
        return np.asarray(np.minimum.accumulate(places, axis=0))

    def sums(self, values: Array, parts: NDArray[np.intp] | None = None) -> Array:
        """Sums over the rows of each part, at every threshold of the grid.

        Args:
            values: `[exits, rows, terms]` of a row that stops at an exit.
            parts: `[rows]` the part of each row, from 0; None means that all rows are one part.

        Returns:
            `[parts, thresholds, terms]`.
        """
        change = values.copy()
        change[:-1] -= values[1:]
        count = 1 if parts is None else int(parts.max()) + 1
        size = len(self.grid) + 1
        where = self._reached if parts is None else self._reached + parts * size
        columns = [
            np.bincount(where.ravel(), change[..., term].ravel(), minlength=count * size)
            for term in range(values.shape[2])
        ]
        moves = np.stack(columns, axis=-1).reshape(count, size, -1)
        return np.asarray(np.cumsum(moves, axis=1)[:, :-1])

    def setting(self, number: int) -> ExitRule:
        """The rule with the threshold of a number in the grid."""
        return self.rule.with_stop_threshold(float(self.grid[number]))

    def exits(self, number: int) -> Answers:
        """The exit of each row, `[rows]`, under `setting(number)`."""
        return np.asarray((self._reached <= number).argmax(axis=0) + 1)


def rounded(threshold: float) -> float:
    """A threshold with four significant digits, as people can read it."""
    return float(f"{threshold:.4g}")


class StopScores:
    """Makes the families of a trace; scores that several of them share are computed once.

    Args:
        rows: the trace.
    """

    def __init__(self, rows: LabelledLogits) -> None:
        self._rows = rows
        self._known: dict[ExitRule, Array] = {}

    def scores_of(self, rule: ExitRule) -> Array:
        """The scores `[exits, rows]` of a rule, see `Simulation.scores`."""
        if rule not in self._known:
            rows = self._rows
            result = simulate(rows.logits, rule, rows.problem_type, rows.label_thresholds)
            self._known[rule] = result.scores
        return self._known[rule]

    def family(self, rule: ExitRule) -> Family:
        """The settings that differ from a rule in the threshold only."""
        return Family(rule, rule.stop_scores(self.scores_of))

    def families(
        self,
        names: Sequence[str],
        measures: Sequence[Measure],
        first_exits: Sequence[int] = (1,),
        patiences: Sequence[int] | None = None,
    ) -> Iterator[Family]:
        """Every setting of some rules but the threshold.

        Args:
            names: names of the rules.
            measures: similarity measures to try.
            first_exits: values of `min_exit` to try.
            patiences: values of `patience` to try; None means all that can stop a row early.
        """
        exits = self._rows.exits
        every = range(1, exits) if patiences is None else patiences
        space = SearchSpace(exits, measures, every, self.scores_of)
        for first in first_exits:
            for name in names:
                for rule in RULES[name].search_grid(space):
                    yield self.family(dataclasses.replace(rule, min_exit=first))


def threshold_for_depth(
    logits: NDArray[np.floating[Any]],
    rule: ExitRule,
    problem_type: ProblemType,
    exit_layers: Sequence[int],
    depth: float,
    label_thresholds: Sequence[float] = (),
) -> ExitRule:
    """The rule with the threshold whose mean depth is closest to a given depth.

    About 200 thresholds are tried, at quantiles of the rule's scores.

    Args:
        logits: `[exits, rows, labels]` at full depth, of any floating-point type, such as
            `Trace.logits`.
        rule: the rule; its threshold is replaced by one for all exits.
        problem_type: the type of the task.
        exit_layers: the layer of each exit, such as `Manifest.exit_layers`.
        depth: the wanted mean depth in layers; every row counts the same, whatever its length.
        label_thresholds: for multi-label tasks, see `Task.label_thresholds`; empty means 0.5.

    Raises:
        RuleError: the rule has no threshold.

    Example:
        ```python
        from fpabee.calibration import threshold_for_depth
        from fpabee.runtime import Engine, FPabee

        with Engine.load("engines/") as engine:
            trace = engine.trace(["turn on the lights", "play jazz", "is it going to rain"])
            task, layers = engine.manifest.task, engine.manifest.exit_layers
            half = layers[-1] / 2
            rule = FPabee(threshold=0.0)
            rule = threshold_for_depth(trace.logits, rule, task.problem_type, layers, half)
            engine.predict(["play jazz"], rule=rule)
        ```
    """
    if not isinstance(rule, ThresholdRule):
        raise RuleError(f"rule {rule.name} has no threshold", "choose a rule that has one")
    lengths = np.ones(logits.shape[1], np.intp)
    rows = LabelledLogits(
        logits.astype(np.float32), lengths, None, problem_type, tuple(label_thresholds)
    )
    family = StopScores(rows).family(rule.with_stop_threshold(0.0))
    layers = np.repeat(np.asarray(exit_layers, np.float64)[:, None], len(rows), axis=1)
    misses = np.abs(family.sums(layers[..., None])[0, :, 0] / len(rows) - depth)
    return family.setting(int(misses.argmin()))
