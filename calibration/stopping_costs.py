"""What a row costs and loses by stopping early.

A drop of half a point on 900 rows is four or five rows, and the best of many settings is the one
that was lucky with those rows. But the last exit knows more than whether its answer was right:
where an early exit gives another answer, the calibrated probabilities of the last exit say how
likely each of the two is right. Their difference is the *expected loss*. It varies far less than
the *observed loss*, so a setting that is chosen by it keeps its promise on new rows. Where the two
differ by more than chance, the labels count, see `estimated`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.manifest import ProblemType
from ..runtime.rules.measures import TINY, Array, Integers, Mask, Outputs
from .scoring import AGREEMENT, LabelledLogits, Scorer

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
        losses: `[exits, rows]` expected losses, or observed ones if the metric has no expected
            losses.
    """

    def __init__(self, rows: LabelledLogits, metric: str, costs: Array) -> None:
        self.rows = rows
        self.scorer = Scorer(rows, metric)
        self.costs = costs
        self.observed = self.losses = observed_losses(self.scorer)
        if self.scorer.is_row_mean and metric != AGREEMENT:
            self.losses = expected_losses(self.scorer)

    @property
    def noise(self) -> float:
        """Sum of the squared losses as a share of that of the observed losses, from 0.1 to 1."""
        observed = float(np.square(self.observed).sum())
        share = float(np.square(self.losses).sum()) / observed if observed else 1.0
        return min(1.0, max(0.1, share))

    def drops(self, exits: NDArray[np.int16], weights: Array) -> Array:
        """Estimated drops of the metric as shares, `[settings, samples]`.

        Args:
            exits: `[settings, rows]` the exit of each row.
            weights: `[rows, samples]` how often a sample contains a row; all have equal sums.
        """
        at = self.rows.at(exits)
        count = float(weights[:, 0].sum())
        if self.scorer.is_row_mean:
            observed, expected = self.observed[at], self.losses[at]
            squares = np.square(observed - expected)
            return estimated(observed @ weights, expected @ weights, squares @ weights, count)
        full = self.scorer.value(weights.T @ self.scorer.sums[-1], count)
        return np.stack(
            [full - self.scorer.value(weights.T @ self.scorer.at(row), count) for row in exits]
        )

    def mean_costs(self, exits: NDArray[np.int16], weights: Array) -> Array:
        """Mean seconds of a row, `[settings, samples]`; the arguments are those of `drops`."""
        at = self.rows.at(exits)
        return np.asarray(self.costs[at] @ weights / weights[:, 0].sum())

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
    rows, differs = scorer.rows, scorer.changed
    last = rows.logits[-1] / np.float32(fit_temperature(rows))
    likely = np.exp(_log_likelihood(rows, last, scorer.answers))
    expected, observed = likely[-1] - likely, observed_losses(scorer)
    if rows.first_exit == 1:
        return recalibrated([expected], observed, differs)
    both = np.exp(_log_likelihood(rows, rows.logits[0], scorer.answers[[-1, 0]]))
    of_exit_0 = recalibrated([expected[:1], both[:1] - both[1:]], observed[:1], differs[:1])
    return np.concatenate([of_exit_0, recalibrated([expected[1:]], observed[1:], differs[1:])])


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
        _log_likelihood(rows, last / np.float32(temperature), rows.expected).mean()
        for temperature in _TEMPERATURES
    ]
    return float(_TEMPERATURES[int(np.argmax(fits))])


def _log_likelihood(rows: LabelledLogits, logits: NDArray[np.float32], answers: Integers) -> Array:
    """Log probability `[..., rows]` of answers under logits; labels as if independent."""
    logs = np.log(np.maximum(Outputs(logits, rows.problem_type).distributions, TINY))
    if rows.problem_type is ProblemType.SINGLE_LABEL:
        return np.asarray(logs[np.arange(len(rows)), answers])
    return np.asarray(np.where(answers == 1, logs[..., 0], logs[..., 1]).sum(axis=-1))


def estimated(observed: Array, expected: Array, squares: Array, rows: float) -> Array:
    """The mean loss: the expected one, plus the part of its error that is more than chance.

    The error (observed minus expected) is moved towards 0 by its standard error (soft
    thresholding, Donoho 1995).

    Args:
        observed: `[...]` sum of the observed losses over rows.
        expected: `[...]` sum of the expected losses.
        squares: `[...]` sum of the squares of their differences.
        rows: how many rows were summed.
    """
    error = (observed - expected) / rows
    chance = np.sqrt(np.maximum(squares / rows - np.square(error), 0.0) / rows)
    return np.asarray(expected / rows + np.sign(error) * np.maximum(np.abs(error) - chance, 0.0))
