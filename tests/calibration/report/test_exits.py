"""Exits on their own: scores and reliability."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fpabee.calibration import Calibration
from fpabee.calibration.outcome import exits_of, outcome
from fpabee.calibration.report.exits import exit_scores, reliability
from fpabee.runtime import Budget
from fpabee.runtime.rules.measures import Outputs

Make = Callable[..., Calibration]


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_an_exit_scores_as_a_budget_does(calibrated: Make, family: str) -> None:
    result = calibrated(family)
    rows, stopping_costs = result.rows, result.selector.stopping_costs
    for score in exit_scores(result, []):
        exits = exits_of(Budget(exit=score.exit), rows)
        found = outcome(stopping_costs.scorer, exits, stopping_costs.costs, result.layers)
        assert (score.score, score.drop) == pytest.approx((found.score, found.drop))
        assert (score.low, score.high) == found.interval
        assert score.speedup == pytest.approx(found.estimated)
        assert score.layer == found.mean_depth


def test_reliability_of_answers(calibrated: Make) -> None:
    result = calibrated(count=400)
    bins = reliability(result)
    scores = exit_scores(result, bins)
    for score, logits in zip(scores, result.rows.logits, strict=True):
        outputs = Outputs(logits, result.rows.problem_type)
        sure = outputs.probabilities.max(axis=1)
        right = outputs.answers == result.rows.expected
        mine = [bin for bin in bins if bin.exit == score.exit]
        assert sum(bin.count for bin in mine) == 400
        error = 0.0
        for bin in mine:
            here = (sure > bin.low) & (sure <= bin.high)
            assert bin.count == here.sum()
            if bin.count:
                assert bin.probability == pytest.approx(sure[here].mean())
                assert bin.correct == pytest.approx(right[here].mean())
                error += abs(sure[here].sum() - right[here].sum()) / 400
        assert score.calibration_error == pytest.approx(error)


def test_reliability_of_labels_one_by_one(calibrated: Make) -> None:
    result = calibrated("mpnet")
    assert result.rows.expected is not None
    bins = [bin for bin in reliability(result) if bin.exit == 2]
    assert sum(bin.count for bin in bins) == result.rows.expected.size
    held = sum(bin.count * bin.correct for bin in bins if bin.correct is not None)
    assert held == pytest.approx(result.rows.expected.sum())
    low = Outputs(result.rows.logits[1], result.rows.problem_type).probabilities <= 0.1
    assert bins[0].correct == pytest.approx(result.rows.expected[low].mean())


def test_without_labels_there_is_no_reliability(calibrated: Make) -> None:
    result = calibrated(unlabelled=True)
    assert reliability(result) == []
    assert [score.calibration_error for score in exit_scores(result, [])] == [None] * 3
