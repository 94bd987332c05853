"""Label thresholds are tuned where that helps on other rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fpabee.calibration.label_thresholds import tune_label_thresholds
from fpabee.calibration.scoring import LabelledLogits, Scorer
from fpabee.runtime import ProblemType

from .conftest import make_rows


def shifted(by: float, seed: int = 0) -> LabelledLogits:
    """Multi-label rows whose first label is predicted too seldom."""
    rows = make_rows(count=2000, problem_type=ProblemType.MULTI_LABEL, seed=seed)
    logits = rows.logits.copy()
    logits[..., 0] -= by
    return LabelledLogits(logits, rows.lengths, rows.expected, rows.problem_type)


@pytest.mark.parametrize("metric", ["exact_match", "micro_f1", "macro_f1"])
def test_a_label_that_is_missed_gets_a_lower_threshold(metric: str) -> None:
    rows = shifted(1.5)
    tuned = tune_label_thresholds(rows, metric)
    assert tuned.values[0] < 0.35
    assert tuned.after > tuned.before
    # New rows get what was promised.
    new = shifted(1.5, seed=1)
    after = Scorer(replace(new, label_thresholds=tuned.values), metric).full_depth
    assert after == pytest.approx(tuned.after, abs=0.03)
    assert after > Scorer(new, metric).full_depth


def test_thresholds_that_gain_nothing_on_other_rows_are_not_kept() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2, 200, 6)).astype(np.float32)
    truth = generator.integers(0, 2, (200, 6))  # there is nothing to learn
    rows = LabelledLogits(logits, np.full(200, 5, np.intp), truth, ProblemType.MULTI_LABEL)
    tuned = tune_label_thresholds(rows, "exact_match")
    assert tuned.values == () or tuned.after > tuned.before
