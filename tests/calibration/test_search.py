"""Sweeps: every setting gives the exits of `simulate`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fpabee.calibration import threshold_for_depth
from fpabee.calibration.scoring import LabelledLogits
from fpabee.calibration.search import (
    NEVER,
    StopScores,
    exits_below,
    make_families,
    stricter_early,
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
from fpabee.runtime.rules.words import rounded

from ..runtime.rules.test_rules import Logits, rules, tasks, traces
from .conftest import make_rows, with_costs

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
@pytest.mark.parametrize("task", ProblemType)
def test_families_go_from_cautious_to_bold_and_their_rules_give_their_exits(
    task: ProblemType, first_exit: int
) -> None:
    rows = dataclasses.replace(make_rows(count=200, problem_type=task), first_exit=first_exit)
    metric = "accuracy" if task is ProblemType.SINGLE_LABEL else "exact_match"
    families = make_families(with_costs(rows, metric), list(RULES))
    kinds = {family.kind for family in families}
    assert kinds - {"cascade"} == {
        *RULES,
        "confidence per exit",
        "entropy per exit",
        "fpabee per exit",
    }
    assert ("cascade" in kinds) is (first_exit == 0)
    answered = set()
    for family in families:
        depths = family.exits.mean(axis=1)
        assert (np.diff(depths) <= 0).all()
        for number in range(0, len(depths), 9):
            exits = simulate(rows.logits, family.rules[number], task, first_exit=first_exit).exits
            np.testing.assert_array_equal(family.exits[number], exits, err_msg=family.kind)
            answered.add(round(float((exits == 0).mean()), 1))
        if family.kind == "entropy per exit":
            limits = np.array([rule.stop_thresholds for rule in family.rules]).ravel().tolist()
            assert limits == [rounded(limit) for limit in limits]
        kinds_to_exit_1 = ("entropy", "confidence", "energy", "entropy per exit")
        if family.kind in kinds_to_exit_1 and first_exit == 1:
            assert (depths[0], depths[-1]) == (rows.exits[-1], 1)
    assert first_exit == 1 or len(answered) >= 9, "exit 0 answers from none to nearly all rows"
    few = make_families(with_costs(rows, metric))
    assert sum(len(family.exits) for family in few) <= (1146 if first_exit == 0 else 320)


def test_thresholds_are_stricter_at_early_exits() -> None:
    found = np.array(stricter_early([NEVER, 0.1, 0.4], 2))
    np.testing.assert_allclose(found[:, 1], [0.0, 0.1, 0.4])
    np.testing.assert_allclose(found[:, 0], [0.0, 0.4 * 0.25**1.75, 0.4], rtol=1e-3)


@pytest.mark.parametrize("first_exit", [0, 1])
def test_thresholds_of_confidences_close_to_1_stay_distinct(first_exit: int) -> None:
    rows = make_rows(count=200, labels=2)
    logits = rows.logits * 0
    logits[..., 0] = np.random.default_rng(0).uniform(9, 18, logits.shape[:2])
    rows = dataclasses.replace(rows, logits=logits, first_exit=first_exit)
    families = make_families(with_costs(rows), ["confidence"])
    rules = [rule for rule in families[0].rules if isinstance(rule, ThresholdRule)]
    assert len({rule.threshold for rule in rules}) >= 62
    if first_exit == 0:
        assert families[-1].kind == "cascade"
        assert len({rule.exit_0_threshold for rule in families[-1].rules}) >= 24


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
