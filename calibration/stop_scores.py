"""Rules as one matrix: a row stops at the first exit whose *stop score* is below the threshold.

`simulate` runs a rule for one setting. A sweep wants thousands, so everything about a rule
but its threshold is folded into `[exits, rows]` numbers: patience is the largest score of
the last exits (all of them are below the threshold if it is), what stops a row at once is
minus infinity, and what must not stop it is infinity. `simulate` stays the truth: the
tests hold the two against each other, to the last row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..runtime.rules.measures import Array, Mask, Measure
from ..runtime.rules.rules import (
    Budget,
    Confidence,
    Either,
    Energy,
    Entropy,
    Epee,
    ExitRule,
    FPabee,
    Pabee,
    Pcee,
    Threshold,
)
from ..runtime.rules.runner import simulate
from .scoring import Rows

_GRID = 200
# Of `either`, how many shares of rows its agreement lets through are tried.
_AGREEMENTS = 6


@dataclass(frozen=True)
class Family:
    """A rule with everything set but its threshold.

    Attributes:
        rule: the rule; its threshold means nothing.
        scores: `[exits, rows]` stop scores.
    """

    rule: ExitRule
    scores: Array

    @property
    def sign(self) -> float:
        """-1 if the rule stops rows above its threshold: its stop scores are negated."""
        return -1.0 if isinstance(self.rule, Confidence) else 1.0

    @cached_property
    def grid(self) -> Array:
        """Thresholds of stop scores to try, ascending; the first stops nobody early."""
        finite = self.scores[:-1][np.isfinite(self.scores[:-1])]
        if not hasattr(self.rule, "threshold") or not finite.size:
            return np.full(1, 0.5)
        lowest, highest = finite.min(), finite.max()
        values = np.quantile(finite, np.linspace(0, 1, _GRID - 2))
        inner = [float(f"{value:.4g}") for value in values]
        margin = 1e-3 * max(1.0, abs(lowest), abs(highest))
        return np.unique([lowest - margin, *inner, highest + margin])

    def with_threshold(self, threshold: float | Sequence[float]) -> ExitRule:
        """The rule at a threshold of its stop scores, one or one for each exit."""
        if not hasattr(self.rule, "threshold"):
            return self.rule
        value: Threshold
        if isinstance(threshold, float):
            value = self.sign * threshold
        else:
            value = tuple(self.sign * float(number) for number in threshold)
        return dataclasses.replace(self.rule, threshold=value)  # type: ignore[call-arg]


class StopScores:
    """Makes the families of a trace; scores that several share are computed once.

    Args:
        rows: the trace.
    """

    def __init__(self, rows: Rows) -> None:
        self.exits = rows.exits
        self._rows = rows
        self._known: dict[ExitRule, Array] = {}

    def family(self, rule: ExitRule) -> Family:
        """The family of a rule; whatever its threshold is."""
        return Family(rule, self._stop_scores(rule))

    def _stop_scores(self, rule: ExitRule) -> Array:
        patience = rule.signals_needed
        if isinstance(rule, Epee):
            scores = self._scores(Pcee(threshold=0.0)).copy()
            scores[self._streaks(self._scores(Pabee(patience=1)) < 0.5, patience)] = -np.inf
        elif isinstance(rule, Either):
            scores = self._scores(Entropy(threshold=0.0)).copy()
            similar = self._scores(FPabee(threshold=0.0, measure=rule.measure)) < rule.agreement
            scores[self._streaks(similar, patience)] = -np.inf
        elif isinstance(rule, Budget):
            before = np.arange(1, self._rows.exits + 1) < rule.exit
            scores = np.where(before[:, None], np.inf, np.full((1, len(self._rows)), -np.inf))
        elif isinstance(rule, Pabee):
            scores = _windowed(self._scores(Pabee(patience=1)), patience)
        else:
            changes: dict[str, Any] = {"min_exit": 1, "max_exit": None, "threshold": 0.0}
            changes |= {"patience": 1} if hasattr(rule, "patience") else {}
            bare = dataclasses.replace(rule, **changes)
            scores = _windowed(self._scores(bare), patience)
            scores = -scores if isinstance(rule, Confidence) else scores
        scores = np.where(np.isnan(scores), np.inf, scores)
        scores[: rule.min_exit - 1] = np.inf
        scores[(rule.max_exit or len(scores)) - 1 :] = -np.inf
        return scores

    def _scores(self, rule: ExitRule) -> Array:
        if rule not in self._known:
            result = simulate(
                self._rows.logits, rule, self._rows.problem_type, self._rows.label_thresholds
            )
            self._known[rule] = result.scores
        return self._known[rule]

    def _streaks(self, signal: Mask, patience: int) -> Mask:
        """Where as many exits in a row gave a sign."""
        return _windowed(np.where(signal, 0.0, 1.0), patience) < 0.5

    def agreements(self, measure: Measure) -> list[float]:
        """Thresholds of `either` to try: from rows that hardly differ to those that often do."""
        scores = self._scores(FPabee(threshold=0.0, measure=measure))[1:]
        if not scores.size:  # one exit has no neighbour
            return []
        shares = np.linspace(0, 0.75, _AGREEMENTS + 1)[1:]
        values = np.unique([float(f"{value:.4g}") for value in np.quantile(scores, shares)])
        return [float(value) for value in values]


def _windowed(scores: Array, patience: int) -> Array:
    """The largest of the last `patience` scores; NaN where there are not as many."""
    if patience == 1:
        return scores
    largest = np.full_like(scores, np.nan)
    if patience <= len(scores):
        windows = np.lib.stride_tricks.sliding_window_view(scores, patience, axis=0)
        largest[patience - 1 :] = windows.max(axis=-1)
    return largest


def families(
    stop: StopScores,
    names: Sequence[str],
    measures: Sequence[Measure],
    first_exits: Sequence[int] = (1,),
    patiences: Sequence[int] | None = None,
) -> Iterator[Family]:
    """Every setting but the threshold of the named rules.

    Args:
        stop: of the trace.
        names: rules, by name.
        measures: of `fpabee` and `either`.
        first_exits: values of `min_exit`.
        patiences: values of `patience`; None: all that can stop a row early.
    """
    every = range(1, stop.exits) if patiences is None else patiences
    for first in first_exits:
        for name in names:
            for rule in _templates(stop, name, measures, every):
                yield stop.family(dataclasses.replace(rule, min_exit=first))


def _templates(
    stop: StopScores, name: str, measures: Sequence[Measure], patiences: Sequence[int]
) -> Iterator[ExitRule]:
    if name == FPabee.name:
        for measure in measures:
            for patience in patiences:
                yield FPabee(threshold=0.0, measure=measure, patience=patience)
    elif name == Either.name:
        for measure in measures:
            for agreement in stop.agreements(measure):
                yield Either(threshold=0.0, agreement=agreement, measure=measure)
    elif name == Pabee.name:
        yield from (Pabee(patience=patience) for patience in patiences)
    elif name == Budget.name:
        yield from (Budget(exit=number) for number in range(1, stop.exits + 1))
    elif name in (Pcee.name, Epee.name):
        kind = Pcee if name == Pcee.name else Epee
        yield from (kind(threshold=0.0, patience=patience) for patience in patiences)
    else:
        kinds: dict[str, type[Entropy] | type[Confidence] | type[Energy]] = {
            kind.name: kind for kind in (Entropy, Confidence, Energy)
        }
        yield kinds[name](threshold=0.0)
