"""A single row without numpy: the same decisions as the runner's, also close to a threshold."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpabee.runtime import Budget, ExitRule, FPabee, Measure, ProblemType, simulate
from fpabee.runtime.rules.measures import FLOATS, MEASURES, Outputs, RowOutputs
from fpabee.runtime.rules.one_row import OneRow
from fpabee.runtime.rules.runner import RuleRunner

from .test_rules import Logits, rules, tasks, traces


def exits_one_by_one(
    logits: Logits, rule: ExitRule, task: ProblemType, first_exit: int = 1
) -> list[int]:
    exits = range(first_exit, first_exit + len(logits))
    found = []
    for row in range(logits.shape[1]):
        one = OneRow(RuleRunner(rule, task, exits))
        each = zip(exits, logits[:, row].tolist(), strict=True)
        found.append(next(number for number, z in each if one.stops(z)))
    return found


@given(traces(least_rows=1), tasks, rules)
def test_exits_are_those_of_simulate(logits: Logits, task: ProblemType, rule: ExitRule) -> None:
    expected = simulate(logits, rule, task).exits.tolist()
    assert exits_one_by_one(logits, rule, task) == expected


@given(traces(least_rows=1), tasks, rules, st.data())
def test_exits_with_exit_0_are_those_of_simulate(
    logits: Logits, task: ProblemType, rule: ExitRule, data: st.DataObject
) -> None:
    confidences = Outputs(logits[0], task).confidence().tolist()
    threshold = data.draw(st.sampled_from([None, 0.6, *confidences]))
    rule = dataclasses.replace(
        rule, exit_0_threshold=threshold, min_exit=data.draw(st.integers(0, 1))
    )
    if isinstance(rule, Budget):
        rule = dataclasses.replace(rule, exit=data.draw(st.integers(0, len(logits) - 1)))
    expected = simulate(logits, rule, task, first_exit=0).exits.tolist()
    assert exits_one_by_one(logits, rule, task, first_exit=0) == expected


@given(traces(least_rows=1), tasks, st.sampled_from(Measure), st.integers(1, 2), st.data())
def test_a_threshold_at_or_beside_a_score_changes_nothing(
    logits: Logits, task: ProblemType, measure: Measure, patience: int, data: st.DataObject
) -> None:
    rule = FPabee(threshold=0.0, measure=measure, patience=patience)
    scores = simulate(logits, rule, task).scores[1:].ravel().tolist()
    score = data.draw(st.sampled_from(scores))
    beside = data.draw(st.sampled_from([score, np.nextafter(score, 9), np.nextafter(score, -9)]))
    near = dataclasses.replace(rule, threshold=float(beside))
    assert exits_one_by_one(logits, near, task) == simulate(logits, near, task).exits.tolist()


@pytest.mark.skipif(
    not np._core._multiarray_umath.__cpu_features__.get("AVX512_SKX"),  # type: ignore[attr-defined]
    reason="on this CPU, numpy computes as plain floats do",
)
@pytest.mark.parametrize("task", ProblemType)
def test_rounding_never_decides(task: ProblemType) -> None:
    """A threshold between the scores of numpy and of plain floats: the exits are numpy's."""
    logits = np.random.default_rng(4).normal(scale=2, size=(3, 100, 5)).astype(np.float32)
    outputs = [[RowOutputs(row, task).distributions for row in z.tolist()] for z in logits[:2]]
    differing = 0
    for measure in Measure:
        scores = simulate(logits, FPabee(threshold=0.0, measure=measure), task).scores[1].tolist()
        for row, (score, first, second) in enumerate(zip(scores, *outputs, strict=True)):
            pairs = zip(first, second, strict=True)
            plain = sum(MEASURES[measure](FLOATS, p, q) for p, q in pairs)
            if plain != score:
                differing += 1
                rule = FPabee(threshold=max(score, plain), measure=measure)
                own = logits[:, row : row + 1]
                assert exits_one_by_one(own, rule, task) == simulate(own, rule, task).exits.tolist()
    assert differing > 20, "there are too few rows whose scores differ"


@pytest.mark.parametrize("rule", [FPabee(threshold=0.3), Budget(exit=2)])
def test_a_certain_decision_does_not_need_the_runner(
    rule: ExitRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decide(*arguments: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr(RuleRunner, "decide", decide)
    one = OneRow(RuleRunner(rule, ProblemType.SINGLE_LABEL, range(1, 5)))
    assert [one.stops([3.0, -3.0]) for _ in range(2)] == [False, True]


@pytest.mark.parametrize("task", ProblemType)
def test_logits_that_are_not_numbers_give_the_same_exits(task: ProblemType) -> None:
    logits = np.array([[[1, 2]], [[np.inf, 1]], [[np.nan, 1]], [[1, 2]]], np.float32)
    rule = FPabee(threshold=0.6)
    with np.errstate(invalid="ignore"):
        expected = simulate(logits, rule, task).exits.tolist()
        assert exits_one_by_one(logits, rule, task) == expected
