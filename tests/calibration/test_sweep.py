"""Sweeps: every setting gives the exits of `simulate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpabee.calibration import threshold_for_depth
from fpabee.calibration.families import CHOOSABLE_RULES, DEFAULT_MEASURES, make_families
from fpabee.calibration.scoring import LabelledLogits
from fpabee.calibration.sweep import StopScores, exits_below
from fpabee.runtime import (
    Entropy,
    ExitRule,
    FPabee,
    Pabee,
    ProblemType,
    RuleError,
    simulate,
)
from fpabee.runtime.rules.base import ThresholdRule

from ..runtime.rules.test_rules import Logits, fitting, rules, tasks, traces
from .conftest import with_costs

LAYERS = (2, 4, 6, 8, 10, 12)


@given(traces(least_rows=1), tasks, rules, st.booleans(), st.data())
def test_rows_stop_where_simulate_stops_them(
    logits: Logits, task: ProblemType, rule: ExitRule, per_exit: bool, data: st.DataObject
) -> None:
    rule = fitting(rule, logits)
    lengths = np.ones(logits.shape[1], np.intp)
    scores = StopScores(LabelledLogits(logits, lengths, None, task)).stop_scores(rule)
    finite = scores[np.isfinite(scores)].tolist()
    if isinstance(rule, ThresholdRule) and finite:
        # Thresholds that equal a score, which does not stop the row.
        # More than one signal in a row is compared with one threshold only.
        per_exit = per_exit and rule.signals_needed == 1
        count = len(logits) if per_exit else 1
        drawn = data.draw(st.lists(st.sampled_from(finite), min_size=count, max_size=count))
        rule = rule.with_stop_threshold(drawn if per_exit else drawn[0])
    found = exits_below(scores, rule.stop_thresholds.T)
    np.testing.assert_array_equal(found, simulate(logits, rule, task).exits[None])


@pytest.mark.parametrize("task", ProblemType)
def test_families_go_from_cautious_to_bold_and_their_rules_give_their_exits(
    make_rows: Callable[..., LabelledLogits], task: ProblemType
) -> None:
    rows = make_rows(count=200, problem_type=task)
    metric = "accuracy" if task is ProblemType.SINGLE_LABEL else "exact_match"
    families = make_families(with_costs(rows, metric), CHOOSABLE_RULES, DEFAULT_MEASURES)
    kinds = {family.kind for family in families}
    assert kinds == {*CHOOSABLE_RULES, "entropy per exit", "fpabee per exit"}
    for family in families:
        depths = family.exits.mean(axis=1)
        fitted = family.kind == "learned" or family.kind.endswith("per exit")
        assert fitted or (np.diff(depths) <= 0).all()
        for number in range(0, 0 if fitted else len(depths), 9):
            exits = simulate(rows.logits, family.rule(number), task).exits
            np.testing.assert_array_equal(family.exits[number], exits, err_msg=family.kind)
        if family.kind in ("entropy", "confidence", "energy"):
            assert (depths[0], depths[-1]) == (rows.exits[-1], 1)


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
