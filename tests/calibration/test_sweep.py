"""Sweeps: every setting gives the exits of `simulate`, and sums of what rows give there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from fpabee.calibration import threshold_for_depth
from fpabee.calibration.scoring import METRICS, LabelledLogits, Scorer
from fpabee.calibration.sweep import StopScores
from fpabee.runtime import (
    RULES,
    Entropy,
    FPabee,
    Measure,
    Pabee,
    ProblemType,
    RuleError,
    simulate,
)
from fpabee.runtime.rules.base import ThresholdRule

LAYERS = (2, 4, 6, 8, 10, 12)


@pytest.mark.parametrize("task", ProblemType)
def test_every_family_stops_rows_where_simulate_does(
    make_rows: Callable[..., LabelledLogits], task: ProblemType
) -> None:
    rows = make_rows(count=200, problem_type=task)
    generator = np.random.default_rng(1)
    seen = set()
    for family in StopScores(rows).families(list(RULES), list(Measure), first_exits=(1, 3)):
        seen.add(family.rule.name)
        numbers = {0, len(family.grid) - 1, int(generator.integers(len(family.grid)))}
        finite = family.scores[np.isfinite(family.scores)]
        if isinstance(family.rule, ThresholdRule) and finite.size:
            # Thresholds that equal a score, which does not stop the row.
            exact = generator.choice(finite, 2)
            family.grid = np.unique([*family.grid, *exact])
            numbers |= {int(number) for number in np.searchsorted(family.grid, exact)}
        for number in numbers:
            rule = family.setting(number)
            expected = simulate(rows.logits, rule, task).exits
            np.testing.assert_array_equal(family.exits(number), expected, err_msg=str(rule))
    assert seen == set(RULES)


@pytest.mark.parametrize("task", ProblemType)
def test_sums_are_those_of_the_rows_at_their_exits(
    make_rows: Callable[..., LabelledLogits], task: ProblemType
) -> None:
    rows = make_rows(problem_type=task)
    scorer = Scorer(rows, METRICS[task][1])
    parts = np.arange(len(rows)) % 3
    family = StopScores(rows).family(FPabee(threshold=0.0, patience=2))
    sums = family.sums(scorer.sums, parts)
    for number in range(0, len(family.grid), 17):
        terms = scorer.at(family.exits(number))
        for part in range(3):
            np.testing.assert_allclose(sums[part, number], terms[parts == part].sum(axis=0))
    np.testing.assert_allclose(sums.sum(axis=0), family.sums(scorer.sums)[0])


def test_a_grid_begins_with_no_early_exit_and_ends_with_all(
    make_rows: Callable[..., LabelledLogits],
) -> None:
    rows = make_rows()
    for name in ("entropy", "confidence", "energy"):
        (family,) = StopScores(rows).families([name], [])
        assert (family.exits(0) == rows.exits).all()
        assert (family.exits(len(family.grid) - 1) == 1).all()


def test_every_patience_and_min_exit_is_a_family(make_rows: Callable[..., LabelledLogits]) -> None:
    stop = StopScores(make_rows(count=50))
    found = [f.rule for f in stop.families(["fpabee"], list(Measure), first_exits=range(1, 6))]
    assert len(set(found)) == len(found) == 8 * 5 * 5


@pytest.mark.parametrize(
    ("rule", "depth"),
    [
        (Entropy(threshold=0.0), 4.0),
        (Entropy(threshold=0.0), 7.0),
        (FPabee(threshold=0.0, patience=2, min_exit=3), 10.0),
    ],
)
def test_the_threshold_gives_the_mean_depth_and_other_settings_stay(
    make_rows: Callable[..., LabelledLogits], rule: ThresholdRule, depth: float
) -> None:
    rows = make_rows()
    found = threshold_for_depth(rows.logits, rule, rows.problem_type, LAYERS, depth)
    exits = simulate(rows.logits, found, rows.problem_type).exits
    assert np.array(LAYERS)[exits - 1].mean() == pytest.approx(depth, abs=0.15)
    assert isinstance(found, ThresholdRule)
    assert found == dataclasses.replace(rule, threshold=found.threshold)


def test_a_rule_without_threshold_is_refused(make_rows: Callable[..., LabelledLogits]) -> None:
    rows = make_rows(count=9)
    with pytest.raises(RuleError, match="has no threshold"):
        threshold_for_depth(rows.logits, Pabee(patience=1), rows.problem_type, LAYERS, 5.0)
