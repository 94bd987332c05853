"""What stopping early costs and loses.

What is lost is hard to tell: a drop of half a point on 900 rows is four or five rows, and the best
of many settings is the one that was lucky with those rows. But the last exit knows more than
whether its answer was right: where an early exit gives another answer, the calibrated probabilities
of the last exit say how likely each of the two is right. Their difference is the *expected loss*.
It varies far less than the *observed loss*, so a setting that is chosen by it keeps its promise on
new rows. Where the two differ by more than chance, the labels count, see `estimated`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.rules.measures import Array, Mask
from .scoring import AGREEMENT, LabelledLogits, Scorer, exits_of_rows, task_of_rows

_TEMPERATURES = np.geomspace(0.25, 8.0, 101)
_PRIOR_ROWS = 2.0


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
        observed: `[exits, rows]` observed losses, see `observed_losses`.
        losses: `[exits, rows]` expected losses, or for agreement the observed ones.
    """

    def __init__(self, rows: LabelledLogits, metric: str, costs: Array) -> None:
        self.rows = rows
        self.scorer = Scorer(rows, metric)
        self.costs = costs
        self.observed = self.losses = observed_losses(self.scorer)
        if metric != AGREEMENT:
            self.losses = expected_losses(self.scorer)

    def drop(self, exits: NDArray[np.integer[Any]]) -> float:
        """The estimated drop of the metric as a share.

        If the metric is not a mean over rows, it is the drop on these rows, or that of the share of
        right answers if that is larger: it varies less.

        Args:
            exits: `[rows]` the exit of each row.
        """
        at = self.rows.at(exits)
        drop = float(estimated(self.observed[at], self.losses[at]))
        if self.scorer.is_row_mean:
            return drop
        return max(drop, self.scorer.full_depth - self.scorer.score(exits))

    def mean_cost(self, exits: NDArray[np.integer[Any]]) -> float:
        """Mean seconds of a row; the argument is that of `drop`."""
        return float(self.costs[self.rows.at(exits)].mean())

    def take(self, numbers: NDArray[np.intp]) -> StoppingCosts:
        """The same for some of the rows, whose probabilities are calibrated again."""
        rows = self.rows.take(numbers)
        return StoppingCosts(rows, self.scorer.metric, self.costs[:, numbers])


def observed_losses(scorer: Scorer) -> Array:
    """1 where only full depth is right, -1 where only the exit is right: `[exits, rows]`."""
    right = scorer.right().astype(np.float64)
    return np.asarray(right[-1] - right)


def expected_losses(scorer: Scorer) -> Array:
    """How much more likely the answer of full depth is than the exit's answer: `[exits, rows]`.

    Both probabilities come from the last exit, at the temperature that fits the labels best. The
    same answer loses nothing. Where the answers differ, these probabilities may still be over- or
    under-confident, which `recalibrated` corrects. Exit 0 is not part of the encoder, so the
    probabilities that it gives to both answers are used as well.
    """
    rows = scorer.rows
    task = task_of_rows(rows)
    differs = ~task.same(scorer.answers, scorer.answers[-1])
    last = rows.logits[-1] / np.float32(fit_temperature(rows))
    likely = np.exp(task.log_likelihoods(last, scorer.answers))
    expected = likely[-1] - likely
    observed = observed_losses(scorer)
    exits = exits_of_rows(rows)
    parts = []
    for place in range(len(exits.before_layers)):
        own = slice(place, place + 1)
        both = np.exp(task.log_likelihoods(rows.logits[place], scorer.answers[[-1, place]]))
        estimates = [expected[own], both[:1] - both[1:]]
        parts.append(recalibrated(estimates, observed[own], differs[own]))
    later = slice(len(exits.before_layers), None)
    parts.append(recalibrated([expected[later]], observed[later], differs[later]))
    return np.concatenate(parts)


def recalibrated(estimates: Sequence[Array], observed: Array, differs: Mask) -> Array:
    """Expected losses that fit the observed ones where answers differ: a linear combination.

    This is a ridge regression towards the first estimate alone. The answers of one row at several
    exits count as one observation together, and the prior counts as two.

    Args:
        estimates: each `[exits, rows]` expected losses.
        observed: `[exits, rows]` observed losses.
        differs: `[exits, rows]` whether the exit's answer differs from that of full depth.
    """
    weights = (differs / np.maximum(differs.sum(axis=0), 1))[differs]
    columns = [np.ones_like(observed), *estimates]
    inputs = np.stack([column[differs] for column in columns], axis=-1)
    error = observed[differs] - estimates[0][differs]
    squares = (inputs.T * weights) @ inputs + _PRIOR_ROWS * np.eye(len(columns))
    factors = np.linalg.solve(squares, (inputs.T * weights) @ error)
    mended = estimates[0] + sum(f * column for f, column in zip(factors, columns, strict=True))
    return np.where(differs, mended, 0.0)


def fit_temperature(rows: LabelledLogits) -> float:
    """The temperature of the last exit with the largest likelihood (Guo et al., 1706.04599)."""
    assert rows.expected is not None
    last = rows.logits[-1]
    fits = [
        task_of_rows(rows).log_likelihoods(last / np.float32(temperature), rows.expected).mean()
        for temperature in _TEMPERATURES
    ]
    return float(_TEMPERATURES[int(np.argmax(fits))])


def estimated(observed: Array, expected: Array) -> Array:
    """The mean loss `[...]`: the expected one, plus the part of its error that is more than chance.

    The error (observed minus expected) is moved towards 0 by its standard error (soft
    thresholding, Donoho 1995).

    Args:
        observed: `[..., rows]` observed losses.
        expected: `[..., rows]` expected losses.
    """
    errors = observed - expected
    error = errors.mean(axis=-1)
    chance = errors.std(axis=-1) / np.sqrt(errors.shape[-1])
    more = np.sign(error) * np.maximum(np.abs(error) - chance, 0.0)
    return np.asarray(expected.mean(axis=-1) + more)
