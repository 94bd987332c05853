"""Expected losses, and where labels count more."""

from __future__ import annotations

import numpy as np
import pytest

from fpabee.calibration.costs import (
    estimated,
    expected_losses,
    fit_temperature,
    observed_losses,
)
from fpabee.calibration.scoring import METRICS, LabelledLogits, Scorer
from fpabee.runtime import ProblemType

from ..conftest import CLASSIFICATION
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


@pytest.mark.parametrize("task", CLASSIFICATION)
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_expected_losses_are_right_on_average_at_any_temperature(
    task: ProblemType, scale: float
) -> None:
    rows = calibrated(task, 20_000, scale)
    assert fit_temperature(rows) == pytest.approx(scale, rel=0.07)
    scorer = Scorer(rows, METRICS[task][0])
    expected = expected_losses(scorer)
    observed = observed_losses(scorer)
    np.testing.assert_allclose(expected.mean(axis=1), observed.mean(axis=1), atol=0.012)
    # Their purpose: the same mean from fewer rows.
    assert (expected[:-1].std(axis=1) < 0.8 * observed[:-1].std(axis=1)).all()


def test_the_expected_loss_stands_unless_labels_differ_by_more_than_chance() -> None:
    # Of 1,000 rows, 10 were expected to be lost: 14 may be chance, 60 are not.
    expected = np.where(np.arange(1000) < 20, 0.5, 0.0)
    numbers = np.arange(1000) - 100
    observed = np.stack([(numbers >= 0) & (numbers < n) for n in (14, 60)]).astype(float)
    found = estimated(observed, np.stack([expected, expected]))
    assert found[0] == pytest.approx(0.010)
    assert found[1] == pytest.approx(0.060 - 0.0081, abs=5e-4), "less the standard error"


@pytest.mark.parametrize("metric", ["agreement", "macro_f1", "matthews"])
def test_drops_of_other_metrics_are_those_of_the_rows(metric: str) -> None:
    rows = make_rows(count=200)
    costs = with_costs(rows, metric)
    for exits in np.random.default_rng(0).integers(1, 7, (3, 200)):
        drop = costs.scorer.full_depth - costs.scorer.score(exits)
        expected = drop if metric == "agreement" else max(drop, with_costs(rows).drop(exits))
        assert costs.drop(exits) == pytest.approx(expected, abs=1e-12)
        assert costs.mean_cost(exits) == pytest.approx(exits.mean())


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
