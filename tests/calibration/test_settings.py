"""Lists of settings go from cautious to bold, and every setting gives the exits of `simulate`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fpabee.calibration import threshold_for_depth
from fpabee.calibration.scoring import METRICS, LabelledLogits
from fpabee.calibration.settings import (
    EXIT_0_POWERS,
    StopScores,
    exits_below,
    settings_lists,
)
from fpabee.runtime import (
    RULES,
    Entropy,
    ExitRule,
    FPabee,
    ProblemType,
    simulate,
)
from fpabee.runtime.rules.measures import Outputs
from fpabee.runtime.rules.rules import ThresholdRule

from ..runtime.rules.test_rules import Logits, rules, tasks, traces
from .conftest import make_rows

LAYERS = (2, 4, 6, 8, 10, 12)


@given(traces(least_rows=1), tasks, rules, st.booleans(), st.data())
def test_rows_stop_where_simulate_stops_them(
    logits: Logits, task: ProblemType, rule: ExitRule, per_exit: bool, data: st.DataObject
) -> None:
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
    found = exits_below(scores, rule.stop_thresholds[None])
    np.testing.assert_array_equal(found, simulate(logits, rule, task).exits[None])


@given(traces(least_rows=1), tasks, rules, st.booleans(), st.data())
def test_the_same_with_exit_0(
    logits: Logits, task: ProblemType, rule: ExitRule, stops: bool, data: st.DataObject
) -> None:
    rows = LabelledLogits(logits, np.ones(logits.shape[1], np.intp), None, task, first_exit=0)
    threshold = None
    if stops:
        # A row also stops if its confidence equals the threshold.
        confidences = Outputs(logits[0], task).confidence().tolist()
        threshold = data.draw(st.sampled_from([*confidences, 0.7]))
    last = data.draw(st.sampled_from([None, None, 0, 1]))
    least = 0 if last == 0 else data.draw(st.sampled_from([0, 0, 1]))
    rule = replace(rule, exit_0_threshold=threshold, min_exit=least, max_exit=last)
    if len(logits) - 1 < getattr(rule, "exit", 1):
        return
    expected = simulate(logits, rule, task, first_exit=0).exits
    np.testing.assert_array_equal(StopScores(rows).exits([rule])[0], expected)
    later = replace(rule, min_exit=1, max_exit=None)
    assert (simulate(logits, later, task, first_exit=0).exits >= 1).all()
    np.testing.assert_array_equal(
        StopScores(rows).exits([later])[0], simulate(logits, later, task, first_exit=0).exits
    )


@pytest.mark.parametrize("first_exit", [0, 1])
@pytest.mark.parametrize("task", METRICS)
@pytest.mark.parametrize("name", RULES)
def test_each_setting_stops_at_least_what_the_one_before_stops(
    name: str, task: ProblemType, first_exit: int
) -> None:
    rows = dataclasses.replace(make_rows(count=60, problem_type=task), first_exit=first_exit)
    stop = StopScores(rows)
    depths = []
    for settings in settings_lists(rows, [name]):
        exits = stop.exits(settings)
        assert (np.diff(exits, axis=0) <= 0).all()
        for number in range(0, len(settings), 57):
            expected = simulate(rows.logits, settings[number], task, first_exit=first_exit).exits
            np.testing.assert_array_equal(exits[number], expected)
        depths.append(exits.mean(axis=1))
    shallowest = min(each.min() for each in depths)
    assert shallowest < 3
    if first_exit == 0:
        assert shallowest < 1, "exit 0 answers"
    if name in ("confidence", "entropy", "energy") and first_exit == 1:
        assert (depths[0][0] > 5.7, depths[0][-1] < 1.2) == (True, True)


@pytest.mark.parametrize(
    ("task", "thresholds", "largest"),
    [
        (ProblemType.SINGLE_LABEL, (), 1.0),
        (ProblemType.SINGLE_LABEL, (1.0, 0.7, 1.0), 0.5),
        (ProblemType.MULTI_LABEL, (), 0.5),
    ],
)
def test_doubts_are_shares_of_the_largest_doubt(
    task: ProblemType, thresholds: tuple[float, ...], largest: float
) -> None:
    rows = make_rows(count=20, exits=4, problem_type=task)  # exit 0 and three others
    rows = dataclasses.replace(rows, first_exit=0, decision_thresholds=thresholds)
    first, *others = settings_lists(rows)
    doubts = np.array([rule.stop_thresholds for rule in first]) / largest
    last = doubts[:, -1]
    assert last[[0, 60, -1]] == pytest.approx((1e-10, 1e-4, 0.999), rel=1e-3)
    np.testing.assert_allclose(doubts[:, 1], last**1.5, rtol=2e-3, atol=1e-15)
    assert {rule.exit_0_threshold for rule in first} == {None}
    for power, settings in zip(EXIT_0_POWERS, others, strict=True):
        limits = [1 - (rule.exit_0_threshold or 0) for rule in settings]
        np.testing.assert_allclose(np.array(limits) / largest, last**power, rtol=2e-3, atol=1e-15)
        assert [replace(rule, exit_0_threshold=None) for rule in settings] == first
    # Confidences close to 1 stay distinct.
    assert [len(set(settings)) for settings in (first, others[0])] == [400, 400]


def test_no_row_decides_about_the_lists_of_confidence_and_entropy() -> None:
    names = ["confidence", "entropy"]
    expected = settings_lists(make_rows(), names)
    assert settings_lists(make_rows(seed=1, count=9), names) == expected


@pytest.mark.parametrize(
    ("rule", "depth"),
    [
        (Entropy(threshold=0.0), 4.0),
        (Entropy(threshold=0.0), 7.0),
        (FPabee(threshold=0.0, patience=2, min_exit=3), 10.0),
    ],
)
def test_the_threshold_gives_the_mean_depth_and_other_settings_stay(
    rule: ThresholdRule, depth: float
) -> None:
    rows = make_rows()
    found = threshold_for_depth(rows.logits, rule, rows.problem_type, LAYERS, depth)
    exits = simulate(rows.logits, found, rows.problem_type).exits
    assert np.array(LAYERS)[exits - 1].mean() == pytest.approx(depth, abs=0.15)
    assert isinstance(found, ThresholdRule)
    assert found == replace(rule, threshold=found.threshold)
