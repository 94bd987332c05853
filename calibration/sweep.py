"""Every threshold of a rule on a trace at once.

`simulate` applies a rule with one setting. Here every rule expresses everything but its threshold
as one matrix, see `ExitRule.stop_scores`, and many thresholds are applied to it at once. `simulate`
remains the reference: the tests compare the two row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ..runtime.artifact.manifest import ProblemType
from ..runtime.errors import RuleError
from ..runtime.rules.measures import Array, Integers, Outputs
from ..runtime.rules.rules import ExitRule, ThresholdRule
from ..runtime.rules.runner import simulate
from ..runtime.rules.words import rounded
from .scoring import LabelledLogits

_THRESHOLDS = 64
NEVER = -1.0
"""A limit of the stop scores of exit 0 that no row reaches, since they are not negative."""


def threshold_grid(rule: ExitRule, scores: Array, count: int = _THRESHOLDS) -> list[float]:
    """Thresholds of stop scores to try, ascending; the first stops no row early.

    Args:
        rule: the rule.
        scores: `[exits, rows]` its stop scores from exit 1 on.
        count: how many thresholds, at most.
    """
    finite = scores[:-1][np.isfinite(scores[:-1])]
    if not isinstance(rule, ThresholdRule) or not finite.size:
        return [0.5]
    lowest, highest = finite.min(), finite.max()
    margin = 1e-3 * max(1.0, abs(lowest), abs(highest))
    inner = map(rounded, np.quantile(finite, np.linspace(0, 1, count - 2)))
    return sorted({float(lowest - margin), *inner, float(highest + margin)})


def exits_below(
    scores: Array, thresholds: Sequence[float] | Array, first_exit: int = 1
) -> NDArray[np.int16]:
    """Where rows stop: at the first exit with a stop score below the threshold.

    Args:
        scores: `[exits, rows]` stop scores.
        thresholds: `[settings]`, or `[settings, exits]` with one threshold for each exit.
        first_exit: the exit of the first scores.

    Returns:
        `[settings, rows]` the exit of each row.
    """
    limits = np.asarray(thresholds, np.float64)
    limits = np.broadcast_to(limits.reshape(len(limits), -1), (len(limits), len(scores)))
    last = len(scores) - 1
    exits = np.full((len(limits), scores.shape[1]), first_exit + last, np.int16)
    for place in range(last - 1, -1, -1):
        stops = scores[place] < limits[:, place, None]
        exits[stops] = first_exit + place
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
            thresholds, first = rows.label_thresholds, rows.first_exit
            result = simulate(rows.logits, rule, rows.problem_type, thresholds, first)
            self._known[rule] = result.scores
        return self._known[rule]

    @cached_property
    def exit_0(self) -> Array:
        """The stop scores `[rows]` of exit 0: 1 - confidence."""
        rows = self._rows
        outputs = Outputs(rows.logits[0], rows.problem_type, rows.label_thresholds)
        return outputs.uncertainty()

    def stop_scores(self, rule: ExitRule) -> Array:
        """The stop scores `[exits, rows]` of a rule, those of exit 0 included."""
        first = self._rows.first_exit
        scores = rule.stop_scores(lambda other: self.scores_of(other)[1 - first :])
        if first == 1:
            return scores
        exit_0 = np.where(rule.ends_at_exit_0, -np.inf, self.exit_0)
        return np.stack([np.where(rule.min_exit > 0, np.inf, exit_0), *scores])

    def exits(self, rule: ExitRule) -> Integers:
        """The exits `[rows]` of a rule; the same as those of `simulate`."""
        scores, first = self.stop_scores(rule), self._rows.first_exit
        limits = np.broadcast_to(rule.stop_thresholds, len(scores) - (1 - first))
        if first == 0:
            limits = np.array([exit_0_limit(rule.exit_0_threshold), *limits])
        return np.asarray(exits_below(scores, limits[None], first)[0], np.int64)


def with_exit_0(rule: ExitRule, limit: float) -> ExitRule:
    """A rule with a limit of the stop scores of exit 0, rounded; or without one: `NEVER`."""
    return replace(rule, exit_0_threshold=None if limit < 0 else 1 - rounded(limit))


def exit_0_limit(threshold: float | None) -> float:
    """What the stop scores of exit 0 are compared with, see `StopScores.exit_0`."""
    return NEVER if threshold is None else 1 - threshold


def threshold_for_depth(
    logits: NDArray[np.floating[Any]],
    rule: ExitRule,
    problem_type: ProblemType,
    exit_layers: Sequence[int],
    depth: float,
    label_thresholds: Sequence[float] = (),
    first_exit: int = 1,
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
        first_exit: the exit of the first logits, see `Trace.first_exit`.

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
            rule = threshold_for_depth(
                trace.logits, rule, task.problem_type, layers, half, first_exit=trace.first_exit
            )
            engine.predict(["play jazz"], rule=rule)
        ```
    """
    if not isinstance(rule, ThresholdRule):
        raise RuleError(f"rule {rule.name} has no threshold", "choose a rule that has one")
    lengths = np.ones(logits.shape[1], np.intp)
    rows = LabelledLogits(
        logits.astype(np.float32),
        lengths,
        None,
        problem_type,
        tuple(label_thresholds),
        first_exit,
    )
    stop = StopScores(rows)
    scores = stop.stop_scores(rule.with_stop_threshold(0.0))[1 - first_exit :]
    rules = [rule.with_stop_threshold(limit) for limit in threshold_grid(rule, scores, count=200)]
    layers = np.asarray(exit_layers, np.float64)
    depths = [layers[rows.at(stop.exits(each))[0]].mean() for each in rules]
    return rules[int(np.abs(np.array(depths) - depth).argmin())]
