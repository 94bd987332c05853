"""What a row costs and loses by stopping early.

A drop of half a point on 900 rows is four or five rows, and choosing among thousands of settings
finds the settings that were lucky with those rows. But the last exit knows more than whether its
answer was right: where an early exit gives another answer, the calibrated probabilities of the
last exit say how likely each of the two is right. Their difference is the *expected loss*. It
varies far less than the *observed loss*, so a setting that is chosen by it keeps its promise on
new rows. Where the two differ by more than chance, the labels win.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.manifest import ProblemType
from ..runtime.artifact.operating_point import Goal
from ..runtime.rules.measures import TINY, Answers, Array, Outputs
from .scoring import AGREEMENT, LabelledLogits, Scorer

COST, OBSERVED, EXPECTED, SQUARES, LOST, WON, METRIC = range(7)
"""The terms of `StoppingCosts.terms`. From `METRIC` on they are the terms of the metric."""

_TEMPERATURES = np.geomspace(0.25, 8.0, 101)


class StoppingCosts:
    """What each row costs and loses if it stops at an exit.

    Args:
        rows: the rows.
        metric: the metric, see `scoring.METRICS`.
        costs: `[exits, rows]` seconds until an exit.

    Attributes:
        rows: the rows.
        scorer: the metric of these rows.
        costs: `[exits, rows]` as given.
        losses: `[exits, rows]` what settings are fitted to: expected losses, or observed ones if
            the metric has no expected losses.
        terms: `[exits, rows, terms]` what settings are chosen by, summed over rows.
    """

    def __init__(self, rows: LabelledLogits, metric: str, costs: Array) -> None:
        self.rows = rows
        self.scorer = Scorer(rows, metric)
        self.costs = costs
        observed = self.losses = observed_losses(self.scorer)
        if self.scorer.is_row_mean and metric != AGREEMENT:
            self.losses = expected_losses(rows, self.scorer)
        squares = np.square(observed - self.losses)
        terms = [costs, observed, self.losses, squares, observed > 0, observed < 0]
        self.terms = np.concatenate([np.stack(terms, axis=-1), self.scorer.sums], axis=-1)

    def drops(self, sums: Array, numbers: NDArray[np.intp]) -> Array:
        """Estimated drops `[settings]`, as shares.

        Args:
            sums: `[settings, terms]` over some rows.
            numbers: the numbers of those rows.
        """
        rows = len(numbers)
        if self.scorer.is_row_mean:
            return shrunk(sums[:, OBSERVED], sums[:, EXPECTED], sums[:, SQUARES], rows)
        full_depth = self.terms[-1, numbers, METRIC:].sum(axis=0)
        return self.scorer.value(full_depth, rows) - self.scorer.value(sums[:, METRIC:], rows)

    def bounds(self, goal: Goal, sums: Array, numbers: NDArray[np.intp]) -> Array:
        """What must not exceed the drop of a goal: the estimate, or its upper bound; `[settings]`.

        If the metric is not a mean over rows, its upper bound does not follow from sums: then this
        is always the estimate, see `is_summed`.

        Args:
            goal: the goal.
            sums: `[settings, terms]` over some rows.
            numbers: the numbers of those rows.
        """
        drops = self.drops(sums, numbers)
        if goal.guaranteed and self.scorer.is_row_mean:
            return np.maximum(drops, upper_bound(sums[:, WON], sums[:, LOST], len(numbers)))
        return drops

    def is_summed(self, goal: Goal) -> bool:
        """Whether sums over rows are enough to tell if a setting meets a goal."""
        return self.scorer.is_row_mean or not goal.guaranteed


def observed_losses(scorer: Scorer) -> Array:
    """1 where only full depth is right, -1 where only the exit is right: `[exits, rows]`."""
    right = scorer.right().astype(np.float64)
    return np.asarray(right[-1] - right)


def expected_losses(rows: LabelledLogits, scorer: Scorer) -> Array:
    """How much more likely the answer of full depth is than the exit's answer: `[exits, rows]`.

    Both probabilities come from the last exit, at the temperature that fits the labels best (or
    without a temperature if there are no labels). The same answer loses nothing.
    """
    temperature = 1.0 if rows.expected is None else fit_temperature(rows)
    likely = np.exp(_log_likelihood(rows, temperature, scorer.answers))
    return np.asarray(likely[-1] - likely)


def fit_temperature(rows: LabelledLogits) -> float:
    """The temperature of the last exit with the largest likelihood (Guo et al., 1706.04599)."""
    assert rows.expected is not None
    fits = [_log_likelihood(rows, t, rows.expected).mean() for t in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmax(fits))])


def _log_likelihood(rows: LabelledLogits, temperature: float, answers: Answers) -> Array:
    """Log probability `[..., rows]` of answers at the last exit; labels as if independent."""
    last = Outputs(rows.logits[-1] / np.float32(temperature), rows.problem_type)
    logs = np.log(np.maximum(last.distributions, TINY))
    if rows.problem_type is ProblemType.SINGLE_LABEL:
        return np.asarray(logs[np.arange(len(rows)), answers])
    return np.asarray(np.where(answers == 1, logs[..., 0], logs[..., 1]).sum(axis=-1))


def shrunk(observed: Array, expected: Array, squares: Array, rows: float) -> Array:
    """The mean loss: the expected one, plus the part of its error that is not chance.

    The error (observed minus expected) is known to within its standard error, and is shrunk
    towards 0 as James and Stein do.

    Args:
        observed: `[...]` sum of the observed losses over rows.
        expected: `[...]` sum of the expected losses.
        squares: `[...]` sum of the squares of their differences.
        rows: how many rows were summed.
    """
    error = (observed - expected) / rows
    chance = np.maximum(squares / rows - np.square(error), 0.0) / rows
    share = np.maximum(1 - chance / np.maximum(np.square(error), 1e-12), 0.0)
    return np.asarray(expected / rows + share * error)


def upper_bound(won: Array, lost: Array, rows: float, z: float = 1.645) -> Array:
    """Upper bound of the paired drop, as a share of rows.

    This is the adjusted Wald interval for paired proportions of Bonett & Price (2012), which adds
    one row to either kind of change.

    Args:
        won: `[...]` rows that only the early answer gets right.
        lost: `[...]` rows that only full depth gets right.
        rows: how many rows there are in all.
        z: normal quantile; 1.645 gives a one-sided 95 % bound.
    """
    lost, won, total = (lost + 1) / (rows + 2), (won + 1) / (rows + 2), rows + 2
    variance = (lost + won - np.square(lost - won)) / total
    return np.asarray(lost - won + z * np.sqrt(variance))
