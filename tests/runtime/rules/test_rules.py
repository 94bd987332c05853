"""Exit rules: the golden vectors, and what must hold for any logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

from fpabee.runtime import (
    RULES,
    Budget,
    Confidence,
    Energy,
    Entropy,
    Epee,
    ExitRule,
    FPabee,
    Measure,
    Outputs,
    Pabee,
    Pcee,
    ProblemType,
    RuleError,
    Signal,
    TopK,
    simulate,
)
from fpabee.runtime.check import shifted
from fpabee.runtime.rules.rules import ThresholdRule
from fpabee.runtime.rules.runner import PatienceState
from fpabee.runtime.tasks import unnamed_task

from ...conftest import CLASSIFICATION

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "exit_rules.json").read_text(encoding="utf-8")
)
SINGLE = ProblemType.SINGLE_LABEL
MULTI = ProblemType.MULTI_LABEL

Logits = NDArray[np.float32]

tasks = st.sampled_from(CLASSIFICATION)
thresholds = st.floats(-1.0, 8.0, width=32)
shares = st.floats(0.0, 1.5)
patiences = st.integers(1, 4)
_SETTINGS: dict[type[ExitRule], dict[str, st.SearchStrategy[Any]]] = {
    FPabee: {
        "threshold": thresholds,
        "measure": st.sampled_from(Measure),
        "patience": patiences,
    },
    Pabee: {"patience": patiences},
    Entropy: {"threshold": thresholds},
    Confidence: {"threshold": shares},
    Energy: {"threshold": shares},
    Pcee: {"threshold": shares, "patience": patiences},
    Epee: {"threshold": shares, "patience": patiences},
    Budget: {"exit": st.integers(1, 2)},
}
_kinds = {
    kind: st.builds(kind, min_exit=st.integers(1, 2), **strategies)
    for kind, strategies in _SETTINGS.items()
}
rules: st.SearchStrategy[ExitRule] = st.one_of(*_kinds.values())


@st.composite
def traces(draw: st.DrawFn, least_rows: int = 0) -> Logits:
    """Logits `[exits, rows, labels]`: ordinary ones, ones full of ties, and saturated ones."""
    shape = draw(st.integers(2, 6)), draw(st.integers(least_rows, 12)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["ordinary", "ties", "any"]))
    if kind == "any":
        return draw(hnp.arrays(np.float32, shape, elements=st.floats(-1e4, 1e4, width=32)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = generator.normal(scale=draw(st.sampled_from([0.1, 2.0, 20.0])), size=shape)
    return (logits if kind == "ordinary" else np.round(logits)).astype(np.float32)


def stops(signal: NDArray[np.bool_], patience: int, min_exit: int = 1) -> list[int]:
    """The definition, row by row: the first exit with `patience` signals in a row."""
    exits = []
    for row in signal.T:
        count = 0
        for number, agrees in enumerate(row, start=1):
            count = count + 1 if agrees else 0
            if number == len(row) or (count >= patience and number >= min_exit):
                exits.append(number)
                break
    return exits


def matches(vector: dict[str, Any]) -> bool:
    """Whether `simulate` reproduces a golden vector; the file holds eight decimals."""
    logits = np.asarray(vector["logits"], np.float32)[:, None]
    result = simulate(logits, ExitRule.from_dict(vector["rule"]), vector["task"])
    scores = np.asarray(vector["scores"], np.float64)
    return (
        np.allclose(result.scores[:, 0], scores, rtol=1e-5, atol=6e-9, equal_nan=True)
        and result.exits.tolist() == [vector["exit"]]
        and result.predictions[0].tolist() == vector["prediction"]
    )


def test_golden_vectors() -> None:
    failed = {i: (v["task"], v["rule"]) for i, v in enumerate(GOLDEN) if not matches(v)}
    assert failed == {}
    assert len(GOLDEN) == 270
    assert {vector["rule"]["name"] for vector in GOLDEN} == set(RULES)
    measures = {vector["rule"].get("measure") for vector in GOLDEN} - {None}
    assert measures == {measure.value for measure in Measure}


@given(traces(), tasks, st.one_of(*(_kinds[kind] for kind in _kinds if kind not in (Epee, Budget))))
def test_a_row_stops_after_so_many_scores_strictly_beyond_the_threshold(
    logits: Logits, task: ProblemType, rule: ExitRule
) -> None:
    scores = simulate(logits, rule, task).scores
    threshold = getattr(rule, "threshold", 0.5)
    beyond = scores > threshold if isinstance(rule, Confidence) else scores < threshold
    assert np.isnan(scores[0]).all() == rule.compares_exits or not scores.size
    expected = stops(beyond, rule.signals_needed, rule.min_exit)
    assert simulate(logits, rule, task).exits.tolist() == expected


@given(traces(), tasks, _kinds[Epee])
def test_epee_stops_at_the_earlier_of_two_rules(
    logits: Logits, task: ProblemType, rule: Epee
) -> None:
    sure = Pcee(threshold=rule.threshold, min_exit=rule.min_exit)
    settled = Pabee(patience=rule.patience, min_exit=rule.min_exit)
    both, one, other = (simulate(logits, each, task) for each in (rule, sure, settled))
    np.testing.assert_array_equal(both.exits, np.minimum(one.exits, other.exits))
    np.testing.assert_array_equal(both.scores, one.scores)


@given(traces(), tasks, st.sampled_from([Entropy, Confidence]), st.data())
def test_a_threshold_for_each_exit_is_compared_at_its_exit(
    logits: Logits, task: ProblemType, kind: type[ThresholdRule], data: st.DataObject
) -> None:
    each = data.draw(st.lists(thresholds, min_size=len(logits), max_size=len(logits)))
    result = simulate(logits, kind(threshold=tuple(each)), task)
    beyond = np.less if kind is Entropy else np.greater
    assert result.exits.tolist() == stops(beyond(result.scores, np.array(each)[:, None]), 1)


@given(traces(), tasks, rules, st.integers(1, 6), st.integers(0, 5))
def test_min_exit_counts_from_the_first_exit_and_max_exit_stops_every_row(
    logits: Logits, task: ProblemType, rule: ExitRule, low: int, more: int
) -> None:
    min_exit = min(low, len(logits))
    max_exit = min(min_exit + more, len(logits))
    free = simulate(logits, replace(rule, min_exit=1), task)
    late = simulate(logits, replace(rule, min_exit=min_exit), task)
    both = simulate(logits, replace(rule, min_exit=min_exit, max_exit=max_exit), task)
    assert (late.exits >= min_exit).all()
    # Counts run on, so a row that would have stopped later anyway is not touched.
    later = free.exits >= min_exit
    np.testing.assert_array_equal(late.exits[later], free.exits[later])
    np.testing.assert_array_equal(both.exits, np.minimum(late.exits, max_exit))
    np.testing.assert_array_equal(both.scores, free.scores)


@pytest.mark.parametrize(
    ("max_exit", "cap", "expected"),
    [(None, 4, (3, 4)), (4, 5, (3, 4)), (5, 4, (3, 4)), (4, 4, (3, 4)), (4, 2, (2, 2))],
)
def test_a_cap_never_lets_rows_go_deeper(
    max_exit: int | None, cap: int, expected: tuple[int, int]
) -> None:
    capped = Entropy(threshold=0.1, min_exit=3, max_exit=max_exit).capped(cap)
    assert (capped.min_exit, capped.max_exit) == expected
    assert capped.capped(0).ends_at_exit_0
    with pytest.raises(RuleError, match="max_exit is -1"):
        capped.capped(-1)


@pytest.mark.parametrize("measure", Measure)
@pytest.mark.parametrize("task", CLASSIFICATION)
def test_scores_of_many_labels_do_not_depend_on_the_batch(
    task: ProblemType, measure: Measure
) -> None:
    logits = np.random.default_rng(1).normal(scale=3, size=(3, 70, 150)).astype(np.float32)
    rule = FPabee(threshold=1.0, measure=measure)
    whole = simulate(logits, rule, task).scores
    for start, size in [(0, 1), (3, 2), (5, 33), (69, 1)]:
        part = simulate(logits[:, start : start + size], rule, task).scores
        np.testing.assert_array_equal(part, whole[:, start : start + size])


@given(traces(least_rows=1), tasks, rules, st.randoms(use_true_random=False))
def test_any_grouping_of_the_rows_gives_the_same_exits(
    logits: Logits, task: ProblemType, rule: ExitRule, random: Any
) -> None:
    exits, rows, _ = logits.shape
    runner = unnamed_task(task, logits.shape[2]).runner(rule, range(1, exits + 1))
    found = np.zeros(rows, np.int64)
    groups = [(np.arange(rows), runner.start(np.arange(rows)))]
    for number in range(1, exits + 1):
        # Deal all rows out into new groups, whatever groups they came from.
        everyone = np.concatenate([group for group, _ in groups])
        state = PatienceState.join([part for _, part in groups])
        order = list(range(len(everyone)))
        random.shuffle(order)
        groups = []
        while order:
            size = random.randint(1, len(order))
            taken = np.array(order[:size])
            order = order[size:]
            group = everyone[taken]
            part = state.take(taken)
            at_exit = logits[number - 1, group].astype(np.float32)
            settled, going = runner.settle(number, part, group, at_exit)
            if settled is not None and going is not None:
                found[settled.rows] = settled.exits
                np.testing.assert_array_equal(settled.logits, at_exit[~going])
            left = np.arange(size) if going is None else np.flatnonzero(going)
            if len(left):
                groups.append((group[left], part.take(left)))
        if not groups:
            break
    assert groups == []
    np.testing.assert_array_equal(found, simulate(logits, rule, task).exits)


@given(traces(least_rows=1), tasks, rules)
def test_scores_are_finite_numbers_without_warnings(
    logits: Logits, task: ProblemType, rule: ExitRule
) -> None:
    scores = simulate(logits, rule, task).scores
    if not isinstance(rule, Budget):
        assert np.isfinite(scores[int(rule.compares_exits) :]).all()
    assert not (scores < 0).any()


@pytest.mark.parametrize("task", CLASSIFICATION)
@pytest.mark.parametrize(
    "rule",
    [kind(threshold=0.0) for kind in (FPabee, Entropy, Energy, Pcee)]
    + [Epee(threshold=0.0, patience=3)],
    ids=lambda rule: rule.name,
)
def test_a_score_equal_to_the_threshold_does_not_stop(
    rule: ThresholdRule, task: ProblemType
) -> None:
    logits = np.random.default_rng(5).normal(size=(3, 1, 4)).astype(np.float32)
    at = 2 if rule.compares_exits else 1
    score = simulate(logits, rule, task).scores[at - 1, 0]
    beyond = np.nextafter(score, np.inf)
    equal = simulate(logits, replace(rule, threshold=float(score)), task)
    passed = simulate(logits, replace(rule, threshold=float(beyond)), task)
    assert equal.exits[0] > at
    assert passed.exits[0] == at


@pytest.mark.parametrize(("labels", "task", "confidence"), [(4, SINGLE, 0.25), (3, MULTI, 0.5)])
def test_a_confidence_equal_to_the_threshold_does_not_stop(
    labels: int, task: ProblemType, confidence: float
) -> None:
    logits = np.zeros((3, 1, labels), np.float32)
    for threshold, expected in [(confidence, 2), (confidence - 1e-15, 0)]:
        rule = Confidence(threshold=2.0, exit_0_threshold=threshold)
        assert simulate(logits, rule, task, first_exit=0).exits.tolist() == [expected]
        plain = Confidence(threshold=threshold)
        assert simulate(logits, plain, task).exits.tolist() == [expected + 1]


@pytest.mark.parametrize("task", CLASSIFICATION)
def test_confidences_close_to_1_stay_distinct(task: ProblemType) -> None:
    # In float32, 1 - p is 0 from 17 on, and in float64 from 37 on.
    gaps = np.array([14, 18, 22, 26, 30, 34, 38, 42], np.float32)
    logits = np.zeros((1, len(gaps), 2 if task is SINGLE else 1), np.float32)
    logits[..., 0] = gaps
    uncertainty = Outputs(logits[0], task).uncertainty()
    np.testing.assert_allclose(uncertainty, 1 / (1 + np.exp(gaps.astype(np.float64))), rtol=1e-12)
    for row, between in enumerate(np.exp(-gaps[:5] - 2.0)):
        rule = Confidence(threshold=0.0).with_stop_threshold(float(between))
        found = simulate(np.tile(logits, (2, 1, 1)), rule, task).exits
        assert found.tolist() == [2] * (row + 1) + [1] * (len(gaps) - row - 1)
        assert rule.stop_thresholds == pytest.approx(between, rel=1e-2)
        assert ExitRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


def test_a_moved_threshold_of_rankings_stays_below_0() -> None:
    rule = TopK(top=3, threshold=(-1.0, 0.0))
    assert rule.with_stop_threshold([-0.5, 0.5]) == TopK(top=3, threshold=(-0.5, 0.0))
    assert shifted(rule, 2.0) == TopK(top=3, threshold=(0.0, 0.0))


@pytest.mark.parametrize("task", CLASSIFICATION)
def test_a_row_near_a_label_threshold_is_not_certain(task: ProblemType) -> None:
    """Of three labels only the second one decides; its probabilities are from 1 % to 99 %."""
    p = np.array([0.72, 0.2, 0.01, 0.99])
    logits = np.zeros((2, 4, 3), np.float32)
    logits[..., 1] = np.log(p / (1 - p)) + (np.log(2.0) if task is SINGLE else 0.0)
    decides = (1.0, 0.7, 1.0)
    q = 1 / (1 + np.exp(-(np.log(p / (1 - p)) - np.log(0.7 / 0.3))))
    outputs = Outputs(logits[0], task)
    margins = outputs.margins(decides)
    np.testing.assert_allclose(1 / (1 + np.exp(-margins[:, 1])), q, rtol=1e-6)
    assert (margins[:, [0, 2]] == -np.inf).all()
    np.testing.assert_allclose(outputs.uncertainty(decides), np.minimum(q, 1 - q), rtol=1e-5)
    for rule in (
        Confidence(threshold=0.95, label_thresholds=decides),
        Confidence(threshold=2.0, exit_0_threshold=0.95, label_thresholds=decides),
    ):
        first = 0 if rule.exit_0_threshold else 1
        exits = simulate(logits, rule, task, first_exit=first).exits - first
        assert exits.tolist() == [1, 1, 0, 0]
        assert ExitRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    plain = Confidence(threshold=0.5)
    assert "label_thresholds" not in plain.to_dict()
    with pytest.raises(RuleError, match="2 label thresholds, but 3 labels"):
        simulate(logits, replace(rule, label_thresholds=(0.5, 0.5)), task, first_exit=0)
    with pytest.raises(RuleError, match="label_thresholds"):
        Confidence(threshold=0.9, label_thresholds=(0.0, 0.5))


def test_single_label_ties_take_the_lowest_index() -> None:
    logits = np.array([[[1.0, 3.0, 3.0]]], np.float32)
    assert simulate(logits, Budget(exit=1), SINGLE).predictions.tolist() == [1]


def test_label_thresholds_move_answers_and_the_rules_that_compare_them() -> None:
    # Probabilities .5 (not above the threshold), .27 then .73.
    logits = np.array([[[0.0, -1.0]], [[0.0, 1.0]], [[0.0, 1.0]]], np.float32)
    rule = Pabee(patience=1)
    plain = simulate(logits, rule, MULTI)
    assert (plain.exits.tolist(), plain.predictions.tolist()) == ([3], [[0, 1]])
    tuned = simulate(logits, rule, MULTI, label_thresholds=(0.4, 0.2))
    assert (tuned.exits.tolist(), tuned.predictions.tolist()) == ([2], [[1, 1]])


@given(rules, st.none() | st.integers(2, 9))
def test_rules_survive_their_dictionary(rule: ExitRule, max_exit: int | None) -> None:
    rule = replace(rule, max_exit=max_exit)
    stored = rule.to_dict()
    assert ExitRule.from_dict(json.loads(json.dumps(stored))) == rule
    assert ("max_exit" in stored, "min_exit" in stored) == (max_exit is not None, True)
    assert "exit_0_threshold" not in stored


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({}, "exit rule None does not exist"),
        ({"name": "berxit", "threshold": 0.1}, "choose from fpabee, pabee"),
        ({"name": "fpabee"}, "Missing required"),
        ({"name": "pabee"}, "`patience`"),
        ({"name": "pabee", "patience": 1, "threshold": 1.0}, "Unexpected keyword"),
        ({"name": "fpabee", "threshold": 1.0, "measure": "cosine"}, "choose from kd, rekd"),
        ({"name": "fpabee", "threshold": 1.0, "measure": ["kd"]}, "choose from kd, rekd"),
        ({"name": "fpabee", "threshold": "0.1"}, "threshold is '0.1'"),
        ({"name": "entropy", "threshold": True}, "threshold is True"),
        ({"name": "entropy", "threshold": []}, "threshold is []"),
        ({"name": "entropy", "threshold": [0.1, "x"]}, "one for each exit"),
        ({"name": "entropy", "threshold": [0.1, float("inf")]}, "finite"),
        ({"name": "entropy", "threshold": [0.1, 0.2]}, "2 thresholds, but the model has 3 exits"),
        ({"name": "pabee", "patience": 0}, "patience is 0"),
        ({"name": "pabee", "patience": 1.5}, "patience is 1.5"),
        ({"name": "pabee", "patience": True}, "patience is True"),
        ({"name": "budget", "exit": -1}, "exit is -1"),
        ({"name": "budget", "exit": 4}, "exit is 4, but the exits of the model are 1 to 3"),
        ({"name": "pabee", "patience": 1, "min_exit": -1}, "min_exit is -1"),
        ({"name": "pabee", "patience": 1, "min_exit": 3, "max_exit": 2}, "before min_exit 3"),
        ({"name": "pabee", "patience": 1, "min_exit": 4}, "min_exit is 4, but the exits of"),
        ({"name": "pabee", "patience": 1, "exit_0_threshold": 90}, "exit_0_threshold is 90"),
        ({"name": "pabee", "patience": 1, "exit_0_threshold": -1}, "from 0 to 1, or 2 for never"),
        ({"name": "top-k", "top": 3, "threshold": -1, "exit_0_threshold": float("inf")}, "finite"),
        # A document that is among the best would leave.
        ({"name": "top-k", "top": 3, "threshold": 0.5}, "at most 0"),
        ({"name": "top-k", "top": 3, "threshold": [-1, 0.5]}, "at most 0"),
        ({"name": "top-k", "top": 3, "threshold": -1, "exit_0_threshold": 0.5}, "at most 0"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(given_: dict[str, Any], says: str) -> None:
    with pytest.raises(RuleError) as caught:
        unnamed_task(SINGLE, 2).runner(ExitRule.from_dict(given_), range(1, 4))
    assert says in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(("threshold", "moved"), [(0.0, (0.3, 0.0)), (2.0, (2.0, 1.7))])
def test_a_threshold_of_exit_0_moves_within_its_limits(
    threshold: float, moved: tuple[float, float]
) -> None:
    rule = Pabee(patience=1, exit_0_threshold=threshold)
    assert (shifted(rule, -0.3).exit_0_threshold, shifted(rule, 0.3).exit_0_threshold) == moved


@pytest.mark.parametrize("make", [np.array, list, lambda numbers: (np.float32(0.5), 2)])
def test_settings_may_come_from_numpy_and_lists(make: Callable[[list[float]], Any]) -> None:
    values: dict[str, Any] = {"measure": "kd", "patience": np.int64(2), "max_exit": np.int8(2)}
    rule = FPabee(threshold=make([0.5, 2.0]), **values)
    assert rule == FPabee(threshold=(0.5, 2.0), measure=Measure.KD, patience=2, max_exit=2)
    assert repr(rule.threshold) == "(0.5, 2.0)"


@pytest.mark.parametrize("shape", [(3, 2), (0, 1, 2), (1, 2, 3, 4)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuleError, match=r"expected \[exits, rows, labels\]"):
        simulate(np.zeros(shape, np.float32), Pabee(patience=1), SINGLE)


@given(traces(least_rows=1), tasks, rules, st.floats(0.0, 0.5))
def test_scores_that_move_by_less_than_the_shift_stay_between_the_shifted_rules(
    logits: Logits, task: ProblemType, rule: ExitRule, by: float
) -> None:
    low = shifted(rule, -by)
    high = shifted(rule, by)
    if isinstance(rule, ThresholdRule):
        np.testing.assert_allclose(high.stop_thresholds - rule.stop_thresholds, by, atol=1e-9)
    exits = [simulate(logits, each, task).exits for each in (low, rule, high)]
    assert (exits[0] >= exits[1]).all()
    assert (exits[1] >= exits[2]).all()


def test_a_rule_of_the_users_own_may_have_settings_of_any_type() -> None:
    class ByName(ExitRule, tag="by-name", frozen=True, kw_only=True):
        wanted: frozenset[str] = frozenset()

        def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
            return Signal(None, np.ones(len(now.logits), np.bool_))

    assert ByName(wanted=frozenset("a")).wanted == {"a"}
    assert simulate(np.zeros((2, 3, 2)), ByName(), SINGLE).exits.tolist() == [1, 1, 1]
