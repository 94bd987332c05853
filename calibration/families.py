"""The settings that calibration tries, and where each of them stops each row.

A family is one rule with a list of settings, from cautious to bold. There are few settings on
purpose. The best of many settings is the one that was lucky with the rows that chose it, and what
guards against that luck costs more speed than a finer search gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.rules.base import ExitRule, SearchSpace, ThresholdRule
from ..runtime.rules.measures import Array, Measure
from ..runtime.rules.rules import RULES
from .learned import fit_learned, out_of_fold_scores
from .per_exit import fit_per_exit
from .scoring import LabelledLogits
from .stopping_costs import StoppingCosts
from .sweep import StopScores, exits_below, threshold_grid

DEFAULT_RULES = ("fpabee", "pabee", "entropy", "confidence")
"""Rules that compete if none is named: in comparisons no other rule saves clearly more."""
CHOOSABLE_RULES = tuple(name for name in RULES if name != "either")
"""Rules that can be named. The rule `either` only runs where it was chosen before."""
DEFAULT_MEASURES = (Measure.JSKD, Measure.REKD)
"""Measures of F-PABEE that compete if none is named."""

PER_EXIT = " per exit"
"""The end of the kind of a rule that has one fitted threshold for each exit."""

_FITTED_PER_EXIT = ("fpabee", "entropy")
# At most this many signals in a row are tried; PABEE has nothing but its patience to choose.
_MOST_PATIENCE = 3
# Parts of the rows for scores and thresholds that are fitted: each is judged on the other parts.
_PARTS = 5


@dataclass(frozen=True)
class Family:
    """Settings of one kind of rule, from cautious to bold.

    Attributes:
        kind: see `kind_of`.
        exits: `[settings, rows]` int16, the exit of each row, counted from 1. If a rule is fitted
            to rows, these are the exits of a rule that was fitted to other rows.
        rule: gives a setting by its number.
    """

    kind: str
    exits: NDArray[np.int16]
    rule: Callable[[int], ExitRule]


def kind_of(rule: ExitRule) -> str:
    """The name of a rule, with `PER_EXIT` after it if it has a threshold for each exit."""
    fitted = isinstance(rule, ThresholdRule) and isinstance(rule.threshold, tuple)
    return rule.name + PER_EXIT if fitted else rule.name


def make_families(
    costs: StoppingCosts,
    rules: Sequence[str],
    measures: Sequence[Measure],
    seed: int = 0,
    per_exit: bool = True,
) -> list[Family]:
    """The settings of some rules.

    Args:
        costs: the rows, and what they cost and lose.
        rules: names of exit rules.
        measures: similarity measures to try.
        seed: deals the rows into parts, for rules that are fitted.
        per_exit: whether some rules also get one threshold for each exit.
    """
    rows, stop = costs.rows, StopScores(costs.rows)
    parts = deal(len(rows), _PARTS, seed)
    found: list[Family] = []
    for name in rules:
        if name == "learned":
            found += _learned(rows, parts)
            continue
        patience = rows.exits - 1 if name == "pabee" else min(_MOST_PATIENCE, rows.exits - 1)
        space = SearchSpace(rows.exits, measures, range(1, patience + 1))
        for rule in RULES[name].search_grid(space):
            scores = stop.stop_scores(rule)
            found.append(_family(rule, scores))
            if per_exit and name in _FITTED_PER_EXIT and rule.signals_needed == 1:
                settings, exits = fit_per_exit(rule, scores, costs, parts)
                found.append(Family(name + PER_EXIT, exits, settings.__getitem__))
    return found


def deal(rows: int, parts: int, seed: int) -> NDArray[np.intp]:
    """The part of each row, `[rows]` from 0: parts of equal size, dealt at random."""
    return np.random.default_rng(seed).permutation(np.arange(rows) % parts)


def _learned(rows: LabelledLogits, parts: NDArray[np.intp]) -> Iterator[Family]:
    rule, scores = fit_learned(rows), out_of_fold_scores(rows, parts)
    if rule is not None and scores is not None:
        scores[-1] = -np.inf
        yield _family(rule, scores)


def _family(rule: ExitRule, scores: Array) -> Family:
    """The settings that differ in the threshold only."""
    thresholds = threshold_grid(rule, scores)
    exits = exits_below(scores, thresholds)
    return Family(rule.name, exits, lambda number: rule.with_stop_threshold(thresholds[number]))
