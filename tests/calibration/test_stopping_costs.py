"""Expected losses, their shrinkage towards observed ones, and the bound of a drop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fpabee.calibration.scoring import METRICS, LabelledLogits, Scorer
from fpabee.calibration.stopping_costs import (
    expected_losses,
    fit_temperature,
    observed_losses,
    shrunk,
    upper_bound,
)
from fpabee.runtime import ProblemType


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
    expected, observed = expected_losses(rows, scorer), observed_losses(scorer)
    np.testing.assert_allclose(expected.mean(axis=1), observed.mean(axis=1), atol=0.012)
    # Their purpose: the same mean from fewer rows.
    assert (expected[:-1].std(axis=1) < 0.8 * observed[:-1].std(axis=1)).all()


def test_the_same_answer_loses_nothing(make_rows: Callable[..., LabelledLogits]) -> None:
    rows = make_rows()
    scorer = Scorer(rows, "accuracy")
    same = scorer.answers == scorer.answers[-1]
    expected = expected_losses(rows, scorer)
    assert (expected[same] == 0).all()
    assert (expected[~same] >= 0).all()
    assert (observed_losses(scorer)[same] == 0).all()


def test_the_expected_loss_stands_unless_labels_differ_by_more_than_chance() -> None:
    # Of 1,000 rows, 10 were expected to be lost: 14 may be chance, 60 are not.
    observed, expected, squares = np.array([14.0, 60.0]), np.full(2, 10.0), np.array([20.0, 66.0])
    found = shrunk(observed, expected, squares, 1000)
    assert found[0] == pytest.approx(0.010, abs=5e-4)
    assert found[1] == pytest.approx(0.060, abs=2e-3)


def test_the_upper_bound_covers() -> None:
    generator = np.random.default_rng(3)
    for lost, won in [(0.01, 0.0), (0.02, 0.02), (0.05, 0.01)]:
        counts = generator.multinomial(900, [lost, won, 1 - lost - won], size=4000).astype(float)
        bounds = upper_bound(counts[:, 1], counts[:, 0], 900)
        assert (bounds >= lost - won).mean() >= 0.935
