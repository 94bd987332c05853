"""The settings that calibration tries, and where each of them stops each row.

A family is one rule with a list of settings, from cautious to bold. There are few settings on
purpose. The best of many settings is the one that was lucky with the rows that chose it, and what
guards against that luck costs more speed than a finer search gains.

`simulate` applies a rule with one setting. Here every rule expresses everything but its threshold
as one matrix, see `ExitRule.stop_scores`, and many thresholds are applied to it at once. `simulate`
remains the reference: the tests compare the two row by row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ..runtime.artifact.manifest import ProblemType
from ..runtime.errors import RuleError
from ..runtime.rules.measures import Array, Integers, Measure, Outputs
from ..runtime.rules.rules import (
    RULES,
    Budget,
    Confidence,
    Entropy,
    ExitRule,
    FPabee,
    ThresholdRule,
)
from ..runtime.rules.runner import simulate
from ..runtime.rules.words import rounded
from .costs import StoppingCosts
from .scoring import LabelledLogits

CONTENDERS = (Confidence(threshold=0.0), Entropy(threshold=0.0), FPabee(threshold=0.0))
"""Rules that compete if none is named: in the study no other rule saves clearly more."""
PER_EXIT = " per exit"
"""The end of the kind of a rule with a threshold for each exit, see `stricter_early`."""
CASCADE = "cascade"
"""The kind of a rule by which exit 0 answers, or else one exit for all rows, usually the last."""
NEVER = -1.0
"""A threshold of stop scores that no row reaches, since they are not negative."""

_MEASURES = (Measure.JSKD, Measure.REKD)
_THRESHOLDS = 64
# The largest patience that is tried. PABEE has no other setting, so all its patiences are tried.
_MOST_PATIENCE = 3
# With exit 0 a setting has two thresholds. If the later exits alone stop a share s of the rows
# early, exit 0 answers the share s^power, which may be smaller or larger. So each power gives
# settings from cautious to bold, and together they cover all combinations of both shares.
_POWERS = (4.0, 2.0, 1.0, 0.5, 0.25)
# From 1 to 2, savings hardly differ.
_EARLY_POWER = 1.5
# Shares that exit 0 answers, for rules without a threshold.
_SHARES = (*(1 - np.geomspace(0.95, 0.01, 24)), 1.0)


@dataclass(frozen=True)
class Family:
    """Settings of one kind of rule, from cautious to bold.

    Attributes:
        kind: see `kind_of`.
        exits: `[settings, rows]` int16, the exit of each row.
        rules: the settings.
    """

    kind: str
    exits: NDArray[np.int16]
    rules: Sequence[ExitRule]


def kind_of(rule: ExitRule) -> str:
    """The name of a rule, with `PER_EXIT` after it if it has a threshold for each exit.

    A `Budget` with a threshold for exit 0 is a `CASCADE`.
    """
    if isinstance(rule, Budget) and rule.exit_0_threshold is not None:
        return CASCADE
    per_exit = isinstance(rule, ThresholdRule) and isinstance(rule.threshold, tuple)
    return rule.name + PER_EXIT if per_exit else rule.name


def settings_of(name: str, exits: range, measures: Sequence[Measure] = _MEASURES) -> list[ExitRule]:
    """Every combination of what a rule takes; any threshold stands for all, which are swept.

    Args:
        name: of the rule.
        exits: the numbers of the exits.
        measures: similarity measures to try.
    """
    kind = RULES[name]
    patience = exits[-1] - 1 if name == "pabee" else min(_MOST_PATIENCE, exits[-1] - 1)
    values: dict[str, Sequence[Any]] = {
        "exit": exits,
        "threshold": (0.0,),
        "measure": measures,
        "patience": range(1, patience + 1),
    }
    names = [name for name in kind.__struct_fields__ if name in values]
    combinations = itertools.product(*(values[name] for name in names))
    return [kind(**dict(zip(names, settings, strict=True))) for settings in combinations]


def make_families(costs: StoppingCosts, names: Sequence[str] = ()) -> list[Family]:
    """All settings of the named rules, or else of `CONTENDERS`; with exit 0, also the cascade.

    Confidence and entropy also get thresholds that are stricter at early exits, and so does F-PABEE
    if rules are named.
    """
    rows = costs.rows
    named = [rule for name in names for rule in settings_of(name, rows.exits)]
    stricter = (Confidence, Entropy, FPabee) if named else (Confidence, Entropy)
    return families_of(costs, named or CONTENDERS, stricter)


def families_of(
    costs: StoppingCosts, rules: Sequence[ExitRule], per_exit: tuple[type[ExitRule], ...] = ()
) -> list[Family]:
    """The settings of some rules; if there is exit 0, also those of the cascade.

    Args:
        costs: the rows, and what they cost and lose.
        rules: the rules; any threshold stands for all.
        per_exit: rules that also get a threshold for each exit, unless they have patience.
    """
    rows = costs.rows
    stop = StopScores(costs.rows)
    families = []
    for rule in (*rules, Budget(exit=rows.exits[-1])) if rows.first_exit == 0 else rules:
        scores = stop.stop_scores(rule)
        thresholds: list[Any] = threshold_grid(rule, scores[1 - rows.first_exit :])
        shapes = [thresholds]
        if isinstance(rule, per_exit) and rule.signals_needed == 1:
            shapes.append(stricter_early(thresholds, rows.exits[-1]))
        for settings in (each for shape in shapes for each in _settings(rule, shape, scores, rows)):
            families.append(Family(kind_of(settings[-1]), stop.exits(settings), settings))
    return families


def _settings(
    rule: ExitRule, thresholds: Sequence[Any], scores: Array, rows: LabelledLogits
) -> Iterator[list[ExitRule]]:
    """Lists of settings of a rule, from cautious to bold, that differ only in their thresholds.

    Args:
        rule: the rule.
        thresholds: of its stop scores, ascending: one number, or one for each exit.
        scores: `[exits, rows]` its stop scores, those of exit 0 included.
        rows: the rows.
    """
    settings = [rule.with_stop_threshold(limit) for limit in thresholds]
    yield settings
    if rows.first_exit == 1:
        return
    shares = [np.array(_SHARES)]
    if isinstance(rule, ThresholdRule):
        settings = settings[::2]  # fewer, since each is tried with every power
        early = (exits_below(scores[1:], thresholds[::2]) < rows.exits[-1]).mean(axis=1)
        shares = [early**power for power in _POWERS]
    for share in shares:
        limits = np.quantile(scores[0], share, method="higher")
        limits = np.where(share > 0, limits, NEVER)
        yield [with_exit_0(*pair) for pair in zip(itertools.cycle(settings), limits, strict=False)]


def stricter_early(thresholds: Sequence[float] | Array, exits: int) -> list[list[float]]:
    """Thresholds `[settings, exits]` of stop scores that are stricter at early exits, rounded.

    A single threshold treats a score at exit 2 like the same score at exit 9, although an early
    exit is less reliable at the same score. So at the share x of the depth, a threshold is raised
    to the power 1 + 1.5 (1 - x), relative to the largest one.

    Args:
        thresholds: those of the last exit, ascending.
        exits: the number of exits.
    """
    limits = np.maximum(thresholds, 0.0)[:, None]
    powers = 1 + _EARLY_POWER * (1 - np.arange(1, exits + 1) / exits)
    stricter = limits[-1] * (limits / limits[-1]) ** powers
    return [[*map(rounded, row)] for row in stricter]


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
    inner = map(rounded, np.quantile(finite, np.linspace(0, 1, count - 2)))
    return sorted({NEVER, *inner, 1.001 * float(finite.max()) + 1e-3})


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
        self._exit_0 = Outputs(rows.logits[0], rows.problem_type, rows.label_thresholds)

    def scores_of(self, rule: ExitRule) -> Array:
        """The scores `[exits, rows]` of a rule, see `Simulation.scores`."""
        if rule not in self._known:
            rows = self._rows
            thresholds = rows.label_thresholds
            first = rows.first_exit
            result = simulate(rows.logits, rule, rows.problem_type, thresholds, first)
            self._known[rule] = result.scores
        return self._known[rule]

    def stop_scores(self, rule: ExitRule) -> Array:
        """The stop scores `[exits, rows]` of a rule, those of exit 0 included."""
        first = self._rows.first_exit
        scores = rule.stop_scores(lambda other: self.scores_of(other)[1 - first :])
        if first == 1:
            return scores
        exit_0 = np.where(rule.ends_at_exit_0, -np.inf, rule.uncertainty(self._exit_0))
        return np.stack([np.where(rule.min_exit > 0, np.inf, exit_0), *scores])

    def exits(self, rules: Sequence[ExitRule]) -> NDArray[np.int16]:
        """The exits `[rules, rows]` of rules that differ in their thresholds only.

        They are the same as those of `simulate`.
        """
        last = self._rows.exits[-1]
        first = self._rows.first_exit
        limits = np.array([np.broadcast_to(rule.stop_thresholds, last) for rule in rules])
        if first == 0:
            thresholds = [rule.exit_0_threshold for rule in rules]
            exit_0 = [NEVER if each is None else 1 - each for each in thresholds]
            limits = np.column_stack([exit_0, limits])
        return exits_below(self.stop_scores(rules[0]), limits, first)


def with_exit_0(rule: ExitRule, limit: float) -> ExitRule:
    """A rule with a limit of the stop scores of exit 0, rounded; or without one: `NEVER`."""
    return replace(rule, exit_0_threshold=None if limit < 0 else 1 - rounded(limit))


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
    floats = logits.astype(np.float32)
    lengths = np.ones(logits.shape[1], np.intp)
    thresholds = tuple(label_thresholds)
    rows = LabelledLogits(floats, lengths, None, problem_type, thresholds, first_exit)
    stop = StopScores(rows)
    scores = stop.stop_scores(rule.with_stop_threshold(0.0))[1 - first_exit :]
    rules = [rule.with_stop_threshold(limit) for limit in threshold_grid(rule, scores, count=200)]
    layers = np.asarray(exit_layers, np.float64)
    depths = layers[rows.at(stop.exits(rules))[0]].mean(axis=1)
    return rules[int(np.abs(depths - depth).argmin())]


def exits_of(rule: ExitRule, rows: LabelledLogits) -> Integers:
    """The exits `[rows]` of a rule, the same as in a live run with these logits."""
    thresholds = rows.label_thresholds
    first = rows.first_exit
    return simulate(rows.logits, rule, rows.problem_type, thresholds, first).exits
