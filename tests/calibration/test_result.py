"""Metrics of sums over rows are the metrics of the rows; intervals cover the drop."""

from __future__ import annotations

import numpy as np
import pytest

from fpabee.calibration.evidence import TextEvidence
from fpabee.calibration.result import drop_interval
from fpabee.calibration.scoring import METRICS, LabelledLogits, Scorer
from fpabee.calibration.settings import exits_of
from fpabee.runtime import Entropy, ProblemType
from fpabee.runtime.artifact.exits import Exits
from fpabee.runtime.quality import evaluate

from ..conftest import CLASSIFICATION
from .conftest import make_rows, two_exits

CASES = [(task, metric) for task, metrics in METRICS.items() for metric in metrics]


@pytest.mark.parametrize(("task", "metric"), CASES)
def test_a_metric_of_sums_is_the_metric_of_rows(task: ProblemType, metric: str) -> None:
    rows = make_rows(problem_type=task, labels=5)
    scorer = Scorer(rows, metric)
    for seed in range(5):
        exits = np.random.default_rng(seed).integers(1, rows.exits[-1] + 1, len(rows))
        if metric == "agreement":
            assert scorer.score(exits) == pytest.approx(1 - scorer.changed[rows.at(exits)].mean())
            continue
        predicted = scorer.answers[rows.at(exits)]
        assert rows.expected is not None
        expected = evaluate(predicted, rows.expected, 5)[metric]
        assert scorer.score(exits) == pytest.approx(expected, abs=1e-12)
    last = np.full(len(rows), rows.exits[-1])
    assert scorer.full_depth == pytest.approx(scorer.score(last))


@pytest.mark.parametrize(("metric", "samples"), [("accuracy", 100), ("macro_f1", 25)])
def test_intervals_cover_the_drop(metric: str, samples: int) -> None:
    population = make_rows(count=50_000, seed=4)
    generator = np.random.default_rng(0)
    scorer = Scorer(population, metric)
    exits = exits_of(Entropy(threshold=0.5), population)
    drop = 100 * (scorer.full_depth - scorer.score(exits))
    covered = 0
    for _ in range(samples):
        part = generator.integers(0, len(population), 800)
        low, high = drop_interval(Scorer(population.take(part), metric), exits[part])
        covered += low <= drop <= high
    assert covered >= 0.85 * samples


def test_no_change_in_some_rows_does_not_mean_that_there_is_none() -> None:
    rows = two_exits(np.zeros(800, bool))
    early = np.ones(800, np.int64)
    full = np.full(800, 2)
    # The exact (Clopper-Pearson) bound for 0 of 800, by scipy.stats.binomtest.
    scorer = Scorer(rows, "accuracy")
    assert drop_interval(scorer, early) == pytest.approx((-0.46004845, 0.46004845))
    assert drop_interval(scorer, early, level=0.9)[1] == pytest.approx(0.37376628)
    assert drop_interval(scorer, full) == (0.0, 0.0), "full depth is full depth"
    agreement = drop_interval(Scorer(rows, "agreement"), early)
    assert agreement == pytest.approx((0.0, 0.46004845))
    for metric in ("macro_f1", "matthews"):
        assert drop_interval(Scorer(rows, metric), early) != (0.0, 0.0)


@pytest.mark.parametrize("task", CLASSIFICATION)
def test_a_label_that_loses_most_of_its_rows_is_named(task: ProblemType) -> None:
    """Full depth gives ten of a thousand rows the label c, and exit 1 gives it none."""
    full = np.tile(np.array([2.0, -1.0, -1.0], np.float32), (1000, 1))
    full[:10], full[10:500] = [-1.0, -1.0, 2.0], [-1.0, 2.0, -1.0]
    early = full.copy()
    early[:10, 2] = -2.0
    rows = LabelledLogits(np.stack([early, full]), np.ones(1000, np.intp), None, task)
    scorer = Scorer(rows, "agreement")
    labels = ("a", "b", "c")

    def lost(kept: int) -> str:
        exits = np.ones(1000, np.int64)
        exits[:kept] = 2
        return scorer.lost_label(exits, labels)

    assert scorer.score(np.ones(1000, np.int64)) == 0.99
    assert lost(0) == "0 of the 10 texts to which all layers give the label 'c' keep it"
    assert lost(4).startswith("4 of the 10")
    assert lost(5) == lost(10) == ""
    few = Scorer(rows.take(np.arange(6, 1000)), "agreement")
    assert few.lost_label(np.ones(994, np.int64), labels) == "", "four rows may be chance"


def test_an_outcome_counts_layers() -> None:
    rows = make_rows(count=400)
    exits = np.random.default_rng(0).integers(1, 7, 400)
    of_model = Exits.of_layers(range(2, 13, 2))
    found = TextEvidence(Scorer(rows, "accuracy"), "abc", exits=of_model).outcome(exits)
    assert found.mean_depth == pytest.approx(2 * exits.mean())
    assert sum(found.exits) == found.rows == 400
    assert found.interval[0] < found.drop < found.interval[1]
