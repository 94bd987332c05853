"""Expected losses, where labels count more, and drops in samples of the rows."""

from __future__ import annotations

from copy import copy

import numpy as np
import pytest

from fpabee.calibration.scoring import METRICS, LabelledLogits, Scorer
from fpabee.calibration.stopping_costs import (
    estimated,
    expected_losses,
    fit_temperature,
    observed_losses,
)
from fpabee.runtime import ProblemType

from .conftest import make_rows, with_costs


def calibrated(problem_type: ProblemType, rows: int, scale: float) -> LabelledLogits:
    """Rows whose last exit has true probabilities, before its logits are scaled."""
    generator = np.random.default_rng(5)
    logits = generator.normal(scale=2, size=(4, rows, 3))
    last = logits[-1]
    if problem_type is ProblemType.SINGLE_LABEL:
        p = np.exp(last) / np.exp(last).sum(axis=1, keepdims=True)
        truth = (generator.random((rows, 1)) < p.cumsum(axis=1)).argmax(axis=1)
    else:
        truth = (generator.random(last.shape) < 1 / (1 + np.exp(-last))).astype(np.int64)
    scaled = (logits * scale).astype(np.float32)
    return LabelledLogits(scaled, np.full(rows, 9, np.intp), truth, problem_type)


@pytest.mark.parametrize("task", ProblemType)
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_expected_losses_are_right_on_average_at_any_temperature(
    task: ProblemType, scale: float
) -> None:
    rows = calibrated(task, 20_000, scale)
    assert fit_temperature(rows) == pytest.approx(scale, rel=0.07)
    scorer = Scorer(rows, METRICS[task][0])
    expected, observed = expected_losses(scorer), observed_losses(scorer)
    np.testing.assert_allclose(expected.mean(axis=1), observed.mean(axis=1), atol=0.012)
    # Their purpose: the same mean from fewer rows.
    assert (expected[:-1].std(axis=1) < 0.8 * observed[:-1].std(axis=1)).all()


def test_the_same_answer_loses_nothing() -> None:
    rows = make_rows()
    scorer = Scorer(rows, "accuracy")
    same = scorer.answers == scorer.answers[-1]
    expected = expected_losses(scorer)
    assert (expected[same] == 0).all()
    assert (expected[~same] >= 0).all()
    assert (observed_losses(scorer)[same] == 0).all()


def test_the_expected_loss_stands_unless_labels_differ_by_more_than_chance() -> None:
    # Of 1,000 rows, 10 were expected to be lost: 14 may be chance, 60 are not.
    observed, expected, squares = np.array([14.0, 60.0]), np.full(2, 10.0), np.array([20.0, 66.0])
    found = estimated(observed, expected, squares, 1000)
    assert found[0] == pytest.approx(0.010)
    assert found[1] == pytest.approx(0.060 - 0.0081, abs=5e-4), "less the standard error"


@pytest.mark.parametrize("metric", METRICS[ProblemType.SINGLE_LABEL])
def test_samples_weigh_rows(metric: str) -> None:
    rows = make_rows(count=200)
    generator = np.random.default_rng(0)
    exits = generator.integers(1, 7, (3, 200)).astype(np.int16)
    drawn = generator.integers(0, 200, 200)
    weights = np.stack([np.ones(200), np.bincount(drawn, minlength=200)], axis=1)
    costs = with_costs(rows, metric)
    # The rows of the sample themselves, with the losses that are expected of them.
    sample = copy(costs.take(drawn))
    sample.losses = costs.losses[:, drawn]
    once = np.ones((200, 1))
    for method in ("drops", "mean_costs"):
        found = getattr(costs, method)(exits, weights)
        expected = getattr(sample, method)(exits[:, drawn], once)
        np.testing.assert_allclose(found[:, 1:], expected, atol=1e-12)
    if not costs.scorer.is_row_mean or metric == "agreement":
        scores = np.array([costs.scorer.score(row.astype(np.int64)) for row in exits])
        np.testing.assert_allclose(
            costs.drops(exits, once)[:, 0], costs.scorer.full_depth - scores, atol=1e-12
        )


def test_what_exit_0_makes_of_both_answers_counts() -> None:
    # Exit 0 differs from the last exit on every row. It is right where it is sure of its answer,
    # and wrong where it is not; the last exit is equally sure of all rows.
    sure = np.arange(400) % 2 == 0
    truth = np.where(sure, 1, 0)
    exit_0 = np.stack([np.zeros(400), np.where(sure, 4.0, 0.2)], axis=-1)
    last = np.tile([2.0, 0.0], (400, 1))
    logits = np.stack([exit_0, last]).astype(np.float32)
    lengths = np.full(400, 9, np.intp)
    rows = LabelledLogits(logits, lengths, truth, ProblemType.SINGLE_LABEL, (), 0)
    expected = expected_losses(Scorer(rows, "accuracy"))
    assert expected[0][sure].mean() < -0.7
    assert expected[0][~sure].mean() > 0.7
