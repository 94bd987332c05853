"""The settings that calibration tries, and where each of them stops each row.

A family is one rule with a list of settings, from cautious to bold. There are few settings on
purpose. The best of many settings is the one that was lucky with the rows that chose it, and what
guards against that luck costs more speed than a finer search gains.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.rules.measures import Array, Measure
from ..runtime.rules.rules import RULES, Budget, ExitRule, Pabee, ThresholdRule
from .per_exit import fit_per_exit
from .scoring import LabelledLogits
from .stopping_costs import StoppingCosts
from .sweep import (
    NEVER,
    StopScores,
    exit_0_limit,
    exits_below,
    threshold_grid,
    with_exit_0,
)

DEFAULT_RULES = ("fpabee", "pabee", "entropy", "confidence")
"""Rules that compete if none is named: in comparisons no other rule saves clearly more."""
DEFAULT_MEASURES = (Measure.JSKD, Measure.REKD)
"""Measures of F-PABEE that compete if none is named."""

PARTS = 5
"""How many parts rows are dealt into: each part is judged with what is fitted to the others."""

PER_EXIT = " per exit"
"""The end of the kind of a rule that has one fitted threshold for each exit."""
CASCADE = "cascade"
"""The kind of a rule by which exit 0 answers, or else one exit for all rows, usually the last."""

_FITTED_PER_EXIT = ("fpabee", "entropy")
# The largest patience that is tried. PABEE has no other setting, so all its patiences are tried.
_MOST_PATIENCE = 3
# With exit 0 a setting has two thresholds. If the later exits alone stop a share s of the rows
# early, exit 0 answers the share s^power, which may be smaller or larger. So each power gives
# settings from cautious to bold, and together they cover all combinations of both shares.
_POWERS = (4.0, 2.0, 1.0, 0.5, 0.25)
# Fewer than without exit 0, since each is tried with every power.
_THRESHOLDS_WITH_EXIT_0 = 32
# Shares that exit 0 answers, for rules without a threshold.
_SHARES = (*(1 - np.geomspace(0.95, 0.01, 24)), 1.0)


@dataclass(frozen=True)
class Family:
    """Settings of one kind of rule, from cautious to bold.

    Attributes:
        kind: see `kind_of`.
        exits: `[settings, rows]` int16, the exit of each row. If a rule is fitted to rows, these
            are the exits of a rule that was fitted to other rows.
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
    fitted = isinstance(rule, ThresholdRule) and isinstance(rule.threshold, tuple)
    return rule.name + PER_EXIT if fitted else rule.name


def make_families(
    costs: StoppingCosts,
    rules: Sequence[str],
    measures: Sequence[Measure],
    seed: int = 0,
    per_exit: bool = True,
) -> list[Family]:
    """The settings of some rules; if there is exit 0, also those of the cascade.

    Args:
        costs: the rows, and what they cost and lose.
        rules: names of exit rules.
        measures: similarity measures to try.
        seed: deals the rows into parts, for rules that are fitted.
        per_exit: whether some rules also get one threshold for each exit.
    """
    rows, stop, last = costs.rows, StopScores(costs.rows), costs.rows.exits[-1]
    parts = deal(len(rows), seed)
    found: list[Family] = []
    for name in rules:
        for rule in _settings(RULES[name], rows.exits, measures):
            scores = stop.stop_scores(rule)
            found += _families(rule, scores, rows)
            if not per_exit or name not in _FITTED_PER_EXIT or rule.signals_needed > 1:
                continue
            fitted = [scores]
            if rows.first_exit == 0:  # also without exit 0
                fitted.append(np.concatenate([np.full((1, len(rows)), np.inf), scores[1:]]))
            for each in fitted:
                settings, exits = fit_per_exit(rule, each, costs, parts)
                found.append(Family(name + PER_EXIT, exits, settings))
    if rows.first_exit == 0:
        cascade = Budget(exit=last)
        found += _families(cascade, stop.stop_scores(cascade), rows)
    return found


def _settings(
    kind: type[ExitRule], exits: range, measures: Sequence[Measure]
) -> Iterator[ExitRule]:
    """Every combination of what a rule takes; thresholds are swept separately, so one stands in."""
    patience = exits[-1] - 1 if kind is Pabee else min(_MOST_PATIENCE, exits[-1] - 1)
    values: dict[str, Sequence[Any]] = {
        "exit": exits,
        "threshold": (0.0,),
        "measure": measures,
        "patience": range(1, patience + 1),
    }
    names = [name for name in kind.__struct_fields__ if name in values]
    for settings in itertools.product(*(values[name] for name in names)):
        yield kind(**dict(zip(names, settings, strict=True)))


def deal(rows: int, seed: int) -> NDArray[np.intp]:
    """The part of each row, `[rows]` from 0: `PARTS` parts of equal size, dealt at random."""
    return np.random.default_rng(seed).permutation(np.arange(rows) % PARTS)


def _families(rule: ExitRule, scores: Array, rows: LabelledLogits) -> Iterator[Family]:
    """The settings of a rule that differ only in their thresholds.

    Args:
        rule: the rule.
        scores: `[exits, rows]` its stop scores, those of exit 0 included.
        rows: the rows.
    """
    if rows.first_exit == 1:
        thresholds = threshold_grid(rule, scores)
        yield _family(rule, scores, thresholds, None)
        return
    later = scores[1:]
    thresholds = threshold_grid(rule, later)
    yield _family(rule, scores, thresholds, np.full(len(thresholds), NEVER))
    if len(thresholds) == 1:
        limits = np.quantile(scores[0], _SHARES, method="higher")
        yield _family(rule, scores, thresholds * len(limits), limits)
        return
    thresholds = threshold_grid(rule, later, _THRESHOLDS_WITH_EXIT_0)
    early = (exits_below(later, thresholds) < rows.exits[-1]).mean(axis=1)
    for power in _POWERS:
        limits = np.quantile(scores[0], early**power, method="higher")
        yield _family(rule, scores, thresholds, np.where(early > 0, limits, NEVER))


def _family(
    rule: ExitRule, scores: Array, thresholds: Sequence[float], limits: Array | None
) -> Family:
    """The settings with these thresholds of stop scores and, for exit 0, with these limits."""
    rules = [rule.with_stop_threshold(threshold) for threshold in thresholds]
    if limits is None:
        return Family(kind_of(rule), exits_below(scores, thresholds), rules)
    rules = [with_exit_0(each, limit) for each, limit in zip(rules, limits, strict=True)]
    pairs = [
        [exit_0_limit(each.exit_0_threshold), *[threshold] * (len(scores) - 1)]
        for each, threshold in zip(rules, thresholds, strict=True)
    ]
    exits = exits_below(scores, np.array(pairs), first_exit=0)
    return Family(kind_of(rules[-1]), exits, rules)
