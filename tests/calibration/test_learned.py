"""The learned rule knows which answers change, from rows whose labels it does not need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fpabee.calibration.families import deal
from fpabee.calibration.learned import fit_learned, out_of_fold_scores, scores_of
from fpabee.calibration.scoring import same_answers
from fpabee.calibration.sweep import StopScores
from fpabee.runtime import ExitRule, ProblemType

from .conftest import make_rows


@pytest.mark.parametrize("task", ProblemType)
def test_answers_that_change_get_higher_scores_on_new_rows(task: ProblemType) -> None:
    rows = make_rows(problem_type=task)
    rule = fit_learned(rows)
    assert rule is not None
    assert fit_learned(replace(rows, expected=None)) == rule, "labels are not used"
    assert ExitRule.from_dict(rule.to_dict()) == rule
    new = make_rows(problem_type=task, seed=1)
    answers, scores = new.answers(), scores_of(rule, new)
    changes = ~same_answers(answers, answers[-1], task)
    for score, change in zip(scores[:-1], changes, strict=False):
        assert score[change].mean() > score[~change].mean() + 0.05
        assert score.mean() == pytest.approx(change.mean(), abs=0.1)
    np.testing.assert_array_equal(scores[:-1], StopScores(new).scores_of(rule)[:-1])


def test_scores_come_from_rules_that_were_fitted_to_other_rows() -> None:
    rows = make_rows(count=200)
    parts = deal(len(rows), seed=0)
    before = out_of_fold_scores(rows, parts)
    logits = rows.logits.copy()
    logits[-1] = np.where((parts == 0)[:, None], logits[-1][:, ::-1], logits[-1])
    after = out_of_fold_scores(replace(rows, logits=logits), parts)
    assert before is not None
    assert after is not None
    np.testing.assert_array_equal(after[:-1, parts == 0], before[:-1, parts == 0])
    assert (after[:-1, parts != 0] != before[:-1, parts != 0]).all()


def test_too_few_changes_teach_nothing() -> None:
    rows = make_rows(count=100)
    rows.logits[...] = rows.logits[-1]
    assert fit_learned(rows) is None
    assert out_of_fold_scores(rows, deal(100, seed=0)) is None
