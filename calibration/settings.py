"""The settings that calibration tries, and where each of them stops each row.

Settings come in lists from cautious to bold, which are known before any label is seen. A goal on
average takes the boldest setting of all lists by expected loss, see `choose`; a guarantee takes the
boldest that passes a test, see `guarantee`.

`simulate` applies a rule with one setting. Here every rule expresses everything but its threshold
as one matrix, see `ExitRule.stop_scores`, and many thresholds are applied to it at once. `simulate`
remains the reference: the tests compare the two row by row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ..runtime.artifact.manifest import ProblemType
from ..runtime.errors import InputError, RuleError
from ..runtime.rules.measures import Array, Integers, Measure
from ..runtime.rules.rules import RULES, Confidence, Entropy, ExitRule, ThresholdRule
from ..runtime.rules.words import rounded
from .goals import DEFAULT_RULE
from .scoring import LabelledLogits, exits_of_rows, task_of_rows

EXIT_0_POWERS = (0.5, 1.0, 2.0, 4.0)
"""For each, there are lists in which exit 0 answers, see `settings_lists`."""
NEVER = -1.0
"""A threshold of stop scores that no row reaches, since they are not negative."""

# The thresholds of the last exit as shares of the largest score: few where only over-confident
# models need them, then many, since a finer step is a little bolder.
_DOUBTS = np.concatenate(
    [np.geomspace(1e-10, 1e-4, 60, endpoint=False), np.geomspace(1e-4, 0.999, 340)]
)
# How much stricter early exits are; from 1 to 2, savings hardly differ.
_EARLY_POWER = 1.5
# That of the last exit of a quick pass: with 0.25 too few rows run again, with 0.5 about 3 %.
_POWER_OF_DOUBT = 0.4
_MEASURES = (Measure.JSKD, Measure.REKD)
# The largest patience that is tried. PABEE has no other setting, so all its patiences are tried.
_MOST_PATIENCE = 3
_rounded = np.vectorize(rounded)


def settings_lists(
    rows: LabelledLogits,
    names: Sequence[str] = (DEFAULT_RULE,),
    exit_0_powers: Sequence[float] = EXIT_0_POWERS,
    measures: Sequence[Measure] = _MEASURES,
) -> list[list[ExitRule]]:
    """Lists of settings, each from cautious to bold: what one stops, the next one stops as well.

    Settings of a list differ in their thresholds only. A doubt, which is a share of the largest
    score, grows in 400 geometric steps; it is the threshold of the last exit, and those of early
    exits are stricter. Exit 0 is not used in the first list. If there is one, each power gives
    another list, in which the doubt to this power, as a share of the largest 1 - confidence, is the
    threshold of exit 0. A rule has such lists for every patience, measure or exit that it takes.

    The lists of confidence and entropy do not depend on the rows. For other rules, the largest
    score is that of the rows.

    Args:
        rows: the rows; their labels are not used.
        names: names of the rules.
        exit_0_powers: the powers.
        measures: similarity measures of F-PABEE to try.
    """
    lists = []
    for name in names:
        for rule in _every_combination(name, rows, measures):
            settings = _with_doubts(rule, rows)
            lists.append(settings)
            before = exits_of_rows(rows).before_layers
            for _, power in itertools.product(before, exit_0_powers):
                limits = _largest_doubt(rows) * _DOUBTS**power
                lists.append([*map(with_exit_0, settings, limits)])
    # Rules without a threshold are the same at every doubt.
    return [[*dict.fromkeys(settings)] for settings in lists]


def _every_combination(
    name: str, rows: LabelledLogits, measures: Sequence[Measure]
) -> list[ExitRule]:
    """Every combination of what a rule takes; any threshold stands for all.

    Args:
        name: of the rule.
        rows: the rows; only their exits and thresholds count.
        measures: similarity measures to try.
    """
    kind = RULES[name]
    patience = rows.exits[-1] - 1
    if name != "pabee":
        patience = min(patience, _MOST_PATIENCE)
    values: dict[str, Sequence[Any]] = {
        "exit": rows.exits,
        "threshold": (0.0,),
        "measure": measures,
        "patience": range(1, max(patience, 1) + 1),
        "label_thresholds": (rows.decision_thresholds,),
    }
    fields = [field for field in kind.__struct_fields__ if field in values]
    combinations = itertools.product(*(values[field] for field in fields))
    return [kind(**dict(zip(fields, combination, strict=True))) for combination in combinations]


def _with_doubts(rule: ExitRule, rows: LabelledLogits) -> list[ExitRule]:
    """A rule with each of the doubts, from cautious to bold.

    A single threshold treats a score at exit 2 like the same score at exit 9, although an early
    exit is less reliable at the same score. So at the share x of the depth, a doubt is raised to
    the power 1 + 1.5 (1 - x). Rules with patience have one threshold for all exits.

    The last exit of a quick pass is far more reliable than those before it, so its power is 0.4:
    with 1, up to a tenth of the rows run again. The end of the exact pass stops all rows, whatever
    its threshold is.
    """
    limits = _DOUBTS
    if rule.signals_needed == 1:
        exits = rows.exits[-1] - rows.has_quick_pass
        depth = np.arange(1, exits + 1) / exits
        powers = 1 + _EARLY_POWER * (1 - depth)
        if rows.has_quick_pass:
            powers[-1] = _POWER_OF_DOUBT
            powers = np.append(powers, 1.0)
        limits = limits[:, None] ** powers
    thresholds = _rounded(_largest_score(rule, rows) * limits)
    return [rule.with_stop_threshold(each) for each in thresholds]


def _largest_score(rule: ExitRule, rows: LabelledLogits) -> float:
    """The largest score of a rule: that there can be, or else that these rows have."""
    if isinstance(rule, Confidence):
        return _largest_doubt(rows)
    if isinstance(rule, Entropy):
        return task_of_rows(rows).largest_entropy()
    scores = StopScores(rows).scores_of(rule)
    return float(scores[np.isfinite(scores)].max(initial=0.0))


def _largest_doubt(rows: LabelledLogits) -> float:
    """The largest 1 - confidence: where every label is a yes or no, it is a half."""
    return 0.5 if task_of_rows(rows).flags or rows.decision_thresholds else 1.0


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
        self._exits = exits_of_rows(rows)
        self._exit_0 = task_of_rows(rows).outputs(rows.logits[0])

    def scores_of(self, rule: ExitRule) -> Array:
        """The scores `[exits, rows]` of a rule, see `Simulation.scores`."""
        if rule not in self._known:
            rows = self._rows
            self._known[rule] = (
                task_of_rows(rows).simulate(rows.logits, rule, rows.first_exit).scores
            )
        return self._known[rule]

    def stop_scores(self, rule: ExitRule) -> Array:
        """The stop scores `[exits, rows]` of a rule, those of exit 0 included."""
        count = len(self._exits.before_layers)
        scores = rule.stop_scores(lambda other: self.scores_of(other)[count:])
        before = [self._exit_0_scores(rule)] * count
        return np.stack([*before, *scores])

    def _exit_0_scores(self, rule: ExitRule) -> Array:
        """The stop scores `[rows]` of exit 0."""
        exit_0 = np.where(rule.ends_at_exit_0, -np.inf, rule.uncertainty(self._exit_0))
        return np.where(rule.min_exit > 0, np.inf, exit_0)

    def exits(self, rules: Sequence[ExitRule]) -> NDArray[np.int16]:
        """The exits `[rules, rows]` of rules that differ in their thresholds only.

        They are the same as those of `simulate`.
        """
        exits = self._exits
        limits = np.array([np.broadcast_to(rule.stop_thresholds, exits.last) for rule in rules])
        thresholds = [rule.exit_0_threshold for rule in rules]
        exit_0 = [NEVER if each is None else 1 - each for each in thresholds]
        before = [exit_0] * len(exits.before_layers)
        limits = np.column_stack([*before, limits])
        return exits_below(self.stop_scores(rules[0]), limits, exits.first)


def with_exit_0(rule: ExitRule, limit: float) -> ExitRule:
    """A rule by which exit 0 answers where its 1 - confidence is below a limit, rounded."""
    return replace(rule, exit_0_threshold=1 - rounded(limit))


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
            `Trace.logits` of an engine with a rule of your own, which runs in one pass.
        rule: the rule; its threshold is replaced by one for all exits.
        problem_type: the type of the task.
        exit_layers: the layer of each exit, such as `Manifest.exit_layers`.
        depth: the wanted mean depth in layers; every row counts the same, whatever its length.
        label_thresholds: for multi-label tasks, see `Task.label_thresholds`; empty means 0.5.
        first_exit: the exit of the first logits, see `Trace.first_exit`.

    Raises:
        RuleError: the rule has no threshold.
        InputError: the logits are of more or fewer exits than `exit_layers`.

    Example:
        ```python
        from fpabee.calibration import threshold_for_depth
        from fpabee.runtime import Engine, FPabee

        rule = FPabee(threshold=0.0)
        with Engine.load("engines/", rule=rule) as engine:
            trace = engine.trace(["turn on the lights", "play jazz", "is it going to rain"])
            task, layers = engine.manifest.task, engine.manifest.exit_layers
            half = layers[-1] / 2
            rule = threshold_for_depth(
                trace.logits, rule, task.problem_type, layers, half, first_exit=trace.first_exit
            )
            engine.predict(["play jazz"], rule=rule)
        ```
    """
    if not isinstance(rule, ThresholdRule):
        raise RuleError(f"rule {rule.name} has no threshold", "choose a rule that has one")
    if len(logits) != len(exit_layers):
        raise InputError(
            f"the logits are of {len(logits)} exits, and `exit_layers` has {len(exit_layers)}",
            "if they are of a point with a quick pass, trace with an engine that has a `rule`",
        )
    floats = logits.astype(np.float32)
    lengths = np.ones(logits.shape[1], np.intp)
    thresholds = tuple(label_thresholds)
    rows = LabelledLogits(floats, lengths, None, problem_type, thresholds, first_exit)
    stop = StopScores(rows)
    scores = stop.stop_scores(rule.with_stop_threshold(0.0))[1 - first_exit : -1]
    finite = scores[np.isfinite(scores)]
    limits = [NEVER]
    if finite.size:
        limits += map(rounded, np.quantile(finite, np.linspace(0, 1, 198)))
        limits.append(1.001 * float(finite.max()) + 1e-3)
    rules = [rule.with_stop_threshold(limit) for limit in limits]
    layers = np.asarray(exit_layers, np.float64)
    depths = layers[rows.at(stop.exits(rules))[0]].mean(axis=1)
    return rules[int(np.abs(depths - depth).argmin())]


def exits_of(rule: ExitRule, rows: LabelledLogits) -> Integers:
    """The exits `[rows]` of a rule, the same as in a live run with these logits."""
    return task_of_rows(rows).simulate(rows.logits, rule, rows.first_exit).exits
