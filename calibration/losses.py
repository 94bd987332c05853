"""What a row loses by stopping early: as its label says, and as the last exit expects.

A drop of half a point on 900 rows is four or five rows, and choosing among thousands of
settings finds those that were lucky with them. The last exit knows more than whether its
answer was right: where an early exit answers differently, its calibrated probabilities say
how likely each of the two is right. The expected loss is the difference of the two
probabilities; it varies far less than the loss itself, so that what is chosen by it keeps
its promise on new rows. Where the two disagree by more than chance, the labels win.
"""

from __future__ import annotations

import numpy as np

from ..runtime.artifact.manifest import ProblemType
from ..runtime.rules.measures import Array, Outputs
from .scoring import Rows, Scorer

_TEMPERATURES = np.geomspace(0.25, 8.0, 101)


def observed_losses(scorer: Scorer) -> Array:
    """`[exits, rows]`: 1 where only full depth is right, -1 where only the exit is."""
    right = scorer.right().astype(np.float64)
    return np.asarray(right[-1] - right)


def expected_losses(rows: Rows, scorer: Scorer) -> Array:
    """`[exits, rows]`: probability that full depth is right, minus that of the exit's answer.

    Both by the last exit, at the temperature that fits the rows' labels best; without labels,
    as it is. Answers that agree lose nothing.
    """
    temperature = 1.0 if rows.expected is None else fit_temperature(rows)
    last = Outputs(rows.logits[-1] / np.float32(temperature), rows.problem_type)
    logs = np.log(np.maximum(last.distributions, 1e-12))
    answers = scorer.answers
    if rows.problem_type is ProblemType.SINGLE_LABEL:
        likely = np.take_along_axis(logs[None], answers[..., None], axis=-1)[..., 0]
    else:
        # The set is right if every label is; labels as if independent, given the text.
        likely = np.where(answers == 1, logs[None, ..., 0], logs[None, ..., 1]).sum(axis=-1)
    return np.asarray(np.exp(likely[-1]) - np.exp(likely))


def fit_temperature(rows: Rows) -> float:
    """The temperature of the last exit with the largest likelihood (Guo et al., 1706.04599)."""
    assert rows.expected is not None
    losses = [_negative_log_likelihood(rows, temperature) for temperature in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def _negative_log_likelihood(rows: Rows, temperature: float) -> float:
    assert rows.expected is not None
    outputs = Outputs(rows.logits[-1] / np.float32(temperature), rows.problem_type)
    logs = np.log(np.maximum(outputs.distributions, 1e-12))
    if rows.problem_type is ProblemType.SINGLE_LABEL:
        return -float(logs[np.arange(len(rows)), rows.expected].mean())
    return -float(np.where(rows.expected == 1, logs[..., 0], logs[..., 1]).mean())


def shrunk(observed: Array, expected: Array, squares: Array, rows: float) -> Array:
    """The mean loss: the expected one, and as much of its error as is not chance.

    The error, observed minus expected, is known to within its standard error; it is shrunk
    towards 0 as James and Stein do.

    Args:
        observed: `[...]` sum of observed losses over rows.
        expected: `[...]` sum of expected losses.
        squares: `[...]` sum of the squares of their differences.
        rows: how many rows were summed.
    """
    error = (observed - expected) / rows
    chance = np.maximum(squares / rows - np.square(error), 0.0) / rows
    share = np.maximum(1 - chance / np.maximum(np.square(error), 1e-12), 0.0)
    return np.asarray(expected / rows + share * error)


def upper_bound(gains: Array, losses: Array, rows: float, z: float = 1.645) -> Array:
    """Upper bound of the paired drop, as a share of rows.

    The adjusted Wald interval for paired proportions of Bonett & Price (2012): one row is
    added to either kind of change.

    Args:
        gains: `[...]` rows that only the early answer gets right.
        losses: `[...]` rows that only full depth gets right.
        rows: how many rows in all.
        z: normal quantile; 1.645 is one-sided 95 %.
    """
    lost, won, total = (losses + 1) / (rows + 2), (gains + 1) / (rows + 2), rows + 2
    variance = (lost + won - np.square(lost - won)) / total
    return np.asarray(lost - won + z * np.sqrt(variance))
