"""Every threshold of a rule on a trace at once.

`simulate` applies a rule with one setting. Here every rule expresses everything but its threshold
as one matrix, see `ExitRule.stop_scores`, and many thresholds are applied to it at once. `simulate`
remains the reference: the tests compare the two row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.manifest import ProblemType
from ..runtime.errors import RuleError
from ..runtime.rules.base import ExitRule, ThresholdRule
from ..runtime.rules.measures import Answers, Array
from ..runtime.rules.runner import simulate
from .scoring import LabelledLogits

_THRESHOLDS = 64


def threshold_grid(rule: ExitRule, scores: Array, count: int = _THRESHOLDS) -> list[float]:
    """Thresholds of stop scores `[exits, rows]` to try, ascending; the first stops no row early."""
    finite = scores[:-1][np.isfinite(scores[:-1])]
    if not isinstance(rule, ThresholdRule) or not finite.size:
        return [0.5]
    lowest, highest = finite.min(), finite.max()
    margin = 1e-3 * max(1.0, abs(lowest), abs(highest))
    inner = map(rounded, np.quantile(finite, np.linspace(0, 1, count - 2)))
    return sorted({float(lowest - margin), *inner, float(highest + margin)})


def rounded(threshold: float) -> float:
    """A threshold with four significant digits, as people can read it."""
    return float(f"{threshold:.4g}")


def exits_below(scores: Array, thresholds: Sequence[float] | Array) -> NDArray[np.int16]:
    """Where rows stop: at the first exit with a stop score below the threshold.

    Args:
        scores: `[exits, rows]` stop scores.
        thresholds: `[settings]`, or `[settings, exits]` with one threshold for each exit.

    Returns:
        `[settings, rows]`, counted from 1.
    """
    limits = np.asarray(thresholds, np.float64)
    limits = np.broadcast_to(limits.reshape(len(limits), -1), (len(limits), len(scores)))
    exits = np.full((len(limits), scores.shape[1]), len(scores), np.int16)
    for number in range(len(scores) - 1, 0, -1):
        stops = scores[number - 1] < limits[:, number - 1, None]
        exits[stops] = number
    return exits


class StopScores:
    """Stop scores on some rows; scores that several rules share are computed once.

    Args:
        rows: the rows.
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

    def stop_scores(self, rule: ExitRule) -> Array:
        """The stop scores `[exits, rows]` of a rule."""
        return rule.stop_scores(self.scores_of)

    def exits(self, rule: ExitRule) -> Answers:
        """The exits `[rows]` of a rule, counted from 1; the same as those of `simulate`."""
        limits = np.ravel(rule.stop_thresholds)[None]
        return np.asarray(exits_below(self.stop_scores(rule), limits)[0], np.int64)


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
    scores = StopScores(rows).stop_scores(rule.with_stop_threshold(0.0))
    thresholds = threshold_grid(rule, scores, count=200)
    depths = np.asarray(exit_layers, np.float64)[exits_below(scores, thresholds) - 1].mean(axis=1)
    return rule.with_stop_threshold(thresholds[int(np.abs(depths - depth).argmin())])
