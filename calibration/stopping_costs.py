"""What stopping a row early costs and loses: the terms that are summed for every setting."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.operating_point import Goal
from ..runtime.rules.measures import Array
from .losses import expected_losses, observed_losses, shrunk, upper_bound
from .scoring import AGREEMENT, Rows, Scorer

COST, OBSERVED, EXPECTED, SQUARES, LOST, WON, METRIC = range(7)
"""The terms of `StoppingCosts.terms`; those of the metric follow from `METRIC` on."""


class StoppingCosts:
    """What stopping a row at an exit costs and loses.

    Args:
        rows: the rows.
        metric: the score, see `scoring.METRICS`.
        costs: `[exits, rows]` time until an exit.

    Attributes:
        rows: the rows.
        scorer: the metric of them.
        costs: as given.
        losses: `[exits, rows]` that settings are fitted to: expected ones where the metric
            has them.
        terms: `[exits, rows, terms]` that settings are chosen by.
    """

    def __init__(self, rows: Rows, metric: str, costs: Array) -> None:
        self.rows = rows
        self.scorer = Scorer(rows, metric)
        self.costs = costs
        observed = observed_losses(self.scorer)
        if self.scorer.is_row_mean and metric != AGREEMENT:
            self.losses = expected_losses(rows, self.scorer)
        else:
            self.losses = observed
        terms = [
            costs,
            observed,
            self.losses,
            np.square(observed - self.losses),
            (observed > 0).astype(np.float64),
            (observed < 0).astype(np.float64),
        ]
        self.terms = np.concatenate([np.stack(terms, axis=-1), self.scorer.sums], axis=-1)

    def drops(self, sums: Array, numbers: NDArray[np.intp]) -> Array:
        """Estimated drops as shares, of sums `[settings, terms]` over the rows of some numbers."""
        rows = len(numbers)
        if self.scorer.is_row_mean:
            return shrunk(sums[:, OBSERVED], sums[:, EXPECTED], sums[:, SQUARES], rows)
        full_depth = self.terms[-1, numbers, METRIC:].sum(axis=0)
        return self.scorer.value(full_depth, rows) - self.scorer.value(sums[:, METRIC:], rows)

    def bounds(self, goal: Goal, sums: Array, numbers: NDArray[np.intp]) -> Array:
        """What of each setting must be within the drop wished for: its drop, or a sure bound.

        A sure bound of a metric that is no mean over rows cannot be told from sums: then it is
        the drop, see `is_summed`.
        """
        drops = self.drops(sums, numbers)
        if goal.guaranteed and self.scorer.is_row_mean:
            return np.maximum(drops, upper_bound(sums[:, WON], sums[:, LOST], len(numbers)))
        return drops

    def is_summed(self, goal: Goal) -> bool:
        """Whether sums over rows tell if a drop is granted."""
        return self.scorer.is_row_mean or not goal.guaranteed
