"""Metrics of sums over rows are the metrics of the rows."""

from __future__ import annotations

import numpy as np
import pytest

from fpabee.calibration.scoring import METRICS, LabelledLogits, Scorer
from fpabee.runtime import ProblemType

from .conftest import make_rows

CASES = [(task, metric) for task, metrics in METRICS.items() for metric in metrics]


@pytest.mark.parametrize(("task", "metric"), CASES)
def test_a_metric_of_sums_is_the_metric_of_rows(task: ProblemType, metric: str) -> None:
    rows = make_rows(problem_type=task, labels=5)
    scorer = Scorer(rows, metric)
    for seed in range(5):
        exits = np.random.default_rng(seed).integers(1, rows.exits[-1] + 1, len(rows))
        value = float(scorer.value(scorer.at(exits).sum(axis=0)))
        assert value == pytest.approx(scorer.score(exits), abs=1e-12)
    last = np.full(len(rows), rows.exits[-1])
    assert scorer.full_depth == pytest.approx(scorer.score(last))


def test_agreement_needs_no_labels() -> None:
    rows = make_rows()
    bare = LabelledLogits(rows.logits, rows.lengths, None, rows.problem_type)
    assert Scorer(bare, "agreement").full_depth == 1.0
