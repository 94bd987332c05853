"""Exit rules: the golden vectors, and what must hold for any logits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fpabee.runtime import (
    RULES,
    Budget,
    Confidence,
    Either,
    Energy,
    Entropy,
    Epee,
    ExitRule,
    FPabee,
    Measure,
    Pabee,
    Pcee,
    ProblemType,
    RuleError,
    simulate,
)
from fpabee.runtime.rules.runner import PatienceState, RuleRunner

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "exit_rules.json").read_text(encoding="utf-8")
)
SINGLE, MULTI = ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL

Logits = NDArray[np.float32]

tasks = st.sampled_from(ProblemType)
thresholds = st.floats(-1.0, 8.0, width=32)
patiences = st.integers(1, 4)
first_exits = st.integers(1, 2)
rules: st.SearchStrategy[ExitRule] = st.one_of(
    st.builds(
        FPabee,
        threshold=thresholds,
        measure=st.sampled_from(Measure),
        patience=patiences,
        min_exit=first_exits,
    ),
    st.builds(Pabee, patience=patiences, min_exit=first_exits),
    st.builds(Entropy, threshold=thresholds, min_exit=first_exits),
    st.builds(Confidence, threshold=st.floats(0.0, 1.0), min_exit=first_exits),
    st.builds(Energy, threshold=st.floats(0.0, 1.0), min_exit=first_exits),
    st.builds(Pcee, threshold=st.floats(0.0, 1.5), patience=patiences, min_exit=first_exits),
    st.builds(Epee, threshold=st.floats(0.0, 1.5), patience=patiences, min_exit=first_exits),
    st.builds(
        Either,
        threshold=st.floats(0.0, 1.5),
        agreement=st.floats(0.0, 1.5),
        patience=patiences,
        min_exit=first_exits,
    ),
    st.builds(Budget, exit=st.integers(1, 2)),
)


@st.composite
def traces(draw: st.DrawFn, least_rows: int = 0) -> Logits:
    """Logits `[exits, rows, labels]`: ordinary ones, ones full of ties, and saturated ones."""
    shape = (
        draw(st.integers(2, 6)),
        draw(st.integers(least_rows, 12)),
        draw(st.integers(1, 9)),
    )
    kind = draw(st.sampled_from(["ordinary", "ties", "any"]))
    if kind == "any":
        return draw(hnp.arrays(np.float32, shape, elements=st.floats(-1e4, 1e4, width=32)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = generator.normal(scale=draw(st.sampled_from([0.1, 2.0, 20.0])), size=shape)
    return (logits if kind == "ordinary" else np.round(logits)).astype(np.float32)


def stops(
    signal: NDArray[np.bool_], patience: int, min_exit: int = 1, max_exit: int | None = None
) -> list[int]:
    """The definition, row by row: the first exit with `patience` signs in a row."""
    exits = []
    last = max_exit or len(signal)
    for row in signal.T:
        count = 0
        for number, sign in enumerate(row, start=1):
            count = count + 1 if sign else 0
            if number == last or (count >= patience and number >= min_exit):
                exits.append(number)
                break
    return exits


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda v: "-".join(map(str, v["rule"].values())))
def test_golden_vector(vector: dict[str, Any]) -> None:
    logits = np.asarray(vector["logits"], np.float32)[:, None]
    rule = ExitRule.from_dict(vector["rule"])
    result = simulate(logits, rule, vector["task"])
    scores = [np.nan if score is None else score for score in vector["scores"]]
    # The file holds eight decimals.
    np.testing.assert_allclose(result.scores[:, 0], scores, rtol=1e-5, atol=6e-9)
    assert result.exits.tolist() == [vector["exit"]]
    assert result.predictions[0].tolist() == vector["prediction"]


def test_golden_vectors_cover_every_rule_and_measure() -> None:
    assert len(GOLDEN) == 270
    assert {vector["rule"]["name"] for vector in GOLDEN} == set(RULES) - {"either"}
    measures = {vector["rule"].get("measure") for vector in GOLDEN} - {None}
    assert measures == {measure.value for measure in Measure}


@given(traces(), tasks, thresholds, patiences, st.sampled_from(Measure))
def test_fpabee_counts_scores_strictly_below_the_threshold(
    logits: Logits, task: ProblemType, threshold: float, patience: int, measure: Measure
) -> None:
    rule = FPabee(threshold=threshold, patience=patience, measure=measure)
    result = simulate(logits, rule, task)
    assert np.isnan(result.scores[0]).all()
    assert result.exits.tolist() == stops(result.scores < threshold, patience)


@given(traces(), tasks, patiences, st.integers(1, 2))
def test_pabee_is_fpabee_with_a_score_of_0_or_1(
    logits: Logits, task: ProblemType, patience: int, min_exit: int
) -> None:
    result = simulate(logits, Pabee(patience=patience, min_exit=min_exit), task)
    answers = np.stack(
        [simulate(logits, Budget(exit=e + 1), task).predictions for e in range(len(logits))]
    )
    changed = answers[1:] != answers[:-1]
    expected = changed if task is SINGLE else changed.any(axis=-1)
    assert np.isnan(result.scores[0]).all()
    np.testing.assert_array_equal(result.scores[1:], expected.astype(float))
    assert result.exits.tolist() == stops(result.scores < 0.5, patience, min_exit)


@given(traces(), tasks, st.floats(0.0, 1.5), patiences)
def test_epee_stops_at_once_on_entropy_or_on_a_settled_answer(
    logits: Logits, task: ProblemType, threshold: float, patience: int
) -> None:
    epee = simulate(logits, Epee(threshold=threshold, patience=patience), task)
    pabee = simulate(logits, Pabee(patience=patience), task)
    pcee = simulate(logits, Pcee(threshold=threshold), task)
    np.testing.assert_array_equal(epee.exits, np.minimum(pabee.exits, pcee.exits))
    np.testing.assert_array_equal(epee.scores, pcee.scores)


@given(traces(), tasks, st.floats(0.0, 1.5), st.floats(0.0, 1.5), patiences)
def test_either_is_entropy_or_fpabee_whichever_comes_first(
    logits: Logits, task: ProblemType, threshold: float, agreement: float, patience: int
) -> None:
    rule = Either(threshold=threshold, agreement=agreement, patience=patience)
    either = simulate(logits, rule, task)
    entropy = simulate(logits, Entropy(threshold=threshold), task)
    fpabee = simulate(logits, FPabee(threshold=agreement, patience=patience), task)
    np.testing.assert_array_equal(either.exits, np.minimum(entropy.exits, fpabee.exits))
    np.testing.assert_array_equal(either.scores, entropy.scores)


@given(traces(), tasks, st.sampled_from(sorted(RULES)), st.data())
def test_a_threshold_for_each_exit_is_compared_at_its_exit(
    logits: Logits, task: ProblemType, name: str, data: st.DataObject
) -> None:
    if "threshold" not in _EXAMPLES[name]:
        return
    each = tuple(data.draw(st.lists(thresholds, min_size=len(logits), max_size=len(logits))))
    rule = ExitRule.from_dict({"name": name, **_EXAMPLES[name], "threshold": list(each)})
    runner = RuleRunner(rule, task, len(logits))
    state = runner.start(logits.shape[1])
    stopped = np.zeros(logits.shape[1], np.bool_)
    for number, threshold in enumerate(each, start=1):
        # The same exit under the rule that has this threshold everywhere.
        one = RuleRunner(dataclasses.replace(rule, threshold=threshold), task, len(logits))  # type: ignore[call-arg]
        streak, earlier = state.streak.copy(), state.earlier
        found, _ = runner.decide(number, state, logits[number - 1])
        expected, _ = one.decide(number, PatienceState(streak, earlier), logits[number - 1])
        np.testing.assert_array_equal(found, expected)
        stopped |= np.zeros_like(stopped) if found is None else found
    assert stopped.all()
    assert ExitRule.from_dict(rule.to_dict()) == rule


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"name": "entropy", "threshold": []}, "threshold is"),
        ({"name": "entropy", "threshold": [0.1, "x"]}, "one for each exit"),
        ({"name": "entropy", "threshold": [0.1, float("nan")]}, "finite"),
        ({"name": "either", "threshold": 0.1, "agreement": [0.1, 0.2]}, "agreement is"),
        ({"name": "entropy", "threshold": [0.1, 0.2]}, "2 thresholds, but the model has 3 exits"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        RuleRunner(ExitRule.from_dict(rule), SINGLE, 3)


@given(traces(), tasks, rules, st.integers(1, 6), st.integers(0, 5))
def test_min_exit_counts_from_the_first_exit_and_max_exit_stops_every_row(
    logits: Logits, task: ProblemType, rule: ExitRule, low: int, more: int
) -> None:
    min_exit = min(low, len(logits))
    max_exit = min(min_exit + more, len(logits))
    free = simulate(logits, dataclasses.replace(rule, min_exit=1), task)
    late = simulate(logits, dataclasses.replace(rule, min_exit=min_exit), task)
    both = simulate(logits, dataclasses.replace(rule, min_exit=min_exit, max_exit=max_exit), task)
    assert (late.exits >= min_exit).all()
    # Counts run on, so a row that would have stopped later anyway is not touched.
    later = free.exits >= min_exit
    np.testing.assert_array_equal(late.exits[later], free.exits[later])
    np.testing.assert_array_equal(both.exits, np.minimum(late.exits, max_exit))
    np.testing.assert_array_equal(both.scores, free.scores)


def test_a_streak_that_began_before_min_exit_counts() -> None:
    same = np.tile(np.array([2.0, 0.0, -1.0], np.float32), (6, 1, 1))
    assert simulate(same, Pabee(patience=2), SINGLE).exits.tolist() == [3]
    assert simulate(same, Pabee(patience=2, min_exit=4), SINGLE).exits.tolist() == [4]
    assert simulate(same, Pabee(patience=2, max_exit=2), SINGLE).exits.tolist() == [2]


@given(traces(), tasks, rules)
def test_the_answer_is_that_of_the_exit(logits: Logits, task: ProblemType, rule: ExitRule) -> None:
    result = simulate(logits, rule, task)
    for row, number in enumerate(result.exits):
        z = logits[number - 1, row].astype(np.float64)
        expected = z.argmax() if task is SINGLE else 1 / (1 + np.exp(-np.maximum(z, -9))) > 0.5
        np.testing.assert_array_equal(result.predictions[row], expected)


@given(traces(least_rows=1), tasks, rules, st.data())
def test_rows_do_not_see_each_other(
    logits: Logits, task: ProblemType, rule: ExitRule, data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(0, logits.shape[1] - 1), max_size=15))
    whole, part = simulate(logits, rule, task), simulate(logits[:, rows], rule, task)
    np.testing.assert_array_equal(part.exits, whole.exits[rows])
    np.testing.assert_array_equal(part.predictions, whole.predictions[rows])
    # To the last bit, or a threshold might lie between.
    np.testing.assert_array_equal(part.scores, whole.scores[:, rows])


@pytest.mark.parametrize("measure", Measure)
@pytest.mark.parametrize("task", ProblemType)
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
def test_any_grouping_of_the_rows_decides_alike(
    logits: Logits, task: ProblemType, rule: ExitRule, random: Any
) -> None:
    exits, rows, _ = logits.shape
    runner = RuleRunner(rule, task, exits)
    found = np.zeros(rows, np.int64)
    groups = [(np.arange(rows), runner.start(rows))]
    for number in range(1, exits + 1):
        # Deal all rows out into new groups, whatever groups they came from.
        everyone = np.concatenate([group for group, _ in groups])
        state = PatienceState.join([part for _, part in groups])
        order = list(range(len(everyone)))
        random.shuffle(order)
        groups = []
        while order:
            size = random.randint(1, len(order))
            taken, order = np.array(order[:size]), order[size:]
            group, part = everyone[taken], state.take(taken)
            stopped, _ = runner.decide(number, part, logits[number - 1, group])
            stopped = np.zeros(size, np.bool_) if stopped is None else stopped
            found[group[stopped]] = number
            left = np.flatnonzero(~stopped)
            if len(left):
                groups.append((group[left], part.take(left)))
        if not groups:
            break
    assert groups == []
    np.testing.assert_array_equal(found, simulate(logits, rule, task).exits)


@given(traces(), tasks, st.sampled_from(Measure))
def test_measures_are_finite_and_never_negative(
    logits: Logits, task: ProblemType, measure: Measure
) -> None:
    scores = simulate(logits, FPabee(threshold=0.0, measure=measure), task).scores[1:]
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()


@pytest.mark.parametrize("task", ProblemType)
@pytest.mark.parametrize("name", sorted(RULES))
def test_saturated_logits_give_finite_scores_and_no_warnings(name: str, task: ProblemType) -> None:
    rule = ExitRule.from_dict({"name": name, **_EXAMPLES[name]})
    extremes = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4]], np.float32)
    logits = np.stack([extremes, extremes[::-1], extremes[[1, 2, 0]]])
    scores = simulate(logits, rule, task).scores
    has_scores = ~np.isnan(scores).all(axis=1)
    assert has_scores.sum() == {"budget": 0, "fpabee": 2, "pabee": 2}.get(name, 3)
    assert np.isfinite(scores[has_scores]).all()


@pytest.mark.parametrize("measure", ["kl", "rekl", "symkl", "jsd"])
@pytest.mark.parametrize("task", ProblemType)
def test_divergence_of_equal_distributions_is_zero(task: ProblemType, measure: str) -> None:
    logits = np.tile(np.array([[0.3, -2.0, 1.0]], np.float32), (2, 1, 1))
    scores = simulate(logits, FPabee(threshold=1.0, measure=Measure(measure)), task).scores
    assert scores[1, 0] == 0.0


_EXAMPLES: dict[str, dict[str, Any]] = {
    "budget": {"exit": 2},
    "fpabee": {"threshold": 0.5, "measure": "kd", "patience": 2},
    "pabee": {"patience": 2},
    "entropy": {"threshold": 0.5},
    "confidence": {"threshold": 0.9},
    "energy": {"threshold": 0.1},
    "pcee": {"threshold": 0.5, "patience": 2},
    "epee": {"threshold": 0.5, "patience": 2},
    "either": {"threshold": 0.5, "agreement": 0.3},
}


@pytest.mark.parametrize("task", ProblemType)
@pytest.mark.parametrize(
    "rule",
    [
        FPabee(threshold=0.0),
        Entropy(threshold=0.0),
        Confidence(threshold=0.0),
        Energy(threshold=0.0),
        Pcee(threshold=0.0),
        Epee(threshold=0.0, patience=3),
    ],
    ids=lambda rule: rule.name,
)
def test_a_score_equal_to_the_threshold_does_not_stop(rule: Any, task: ProblemType) -> None:
    logits = np.random.default_rng(5).normal(size=(3, 1, 4)).astype(np.float32)
    at = 2 if rule.name == "fpabee" else 1
    score = simulate(logits, rule, task).scores[at - 1, 0]
    beyond = np.nextafter(score, -np.inf if rule.name == "confidence" else np.inf)
    equal = simulate(logits, dataclasses.replace(rule, threshold=float(score)), task)
    passed = simulate(logits, dataclasses.replace(rule, threshold=float(beyond)), task)
    assert equal.exits[0] > at
    assert passed.exits[0] == at


def test_single_label_ties_take_the_lowest_index() -> None:
    logits = np.array([[[1.0, 3.0, 3.0]]], np.float32)
    assert simulate(logits, Budget(exit=1), SINGLE).predictions.tolist() == [1]


def test_multi_label_cuts_move_answers_and_the_rules_that_follow_them() -> None:
    # Probabilities .5 (not above the cut), .27 then .73.
    logits = np.array([[[0.0, -1.0]], [[0.0, 1.0]], [[0.0, 1.0]]], np.float32)
    rule = Pabee(patience=1)
    plain = simulate(logits, rule, MULTI)
    assert (plain.exits.tolist(), plain.predictions.tolist()) == ([3], [[0, 1]])
    cut = simulate(logits, rule, MULTI, label_thresholds=(0.4, 0.2))
    assert (cut.exits.tolist(), cut.predictions.tolist()) == ([2], [[1, 1]])


@given(rules)
def test_rules_survive_their_dictionary(rule: ExitRule) -> None:
    settings_ = json.loads(json.dumps(rule.to_dict()))
    assert ExitRule.from_dict(settings_) == rule


def test_a_rule_with_max_exit_survives_its_dictionary() -> None:
    rule = Entropy(threshold=0.2, min_exit=2, max_exit=4)
    assert rule.to_dict() == {"name": "entropy", "threshold": 0.2, "min_exit": 2, "max_exit": 4}
    assert ExitRule.from_dict(rule.to_dict()) == rule


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({}, "exit rule None does not exist"),
        ({"name": "berxit", "threshold": 0.1}, "choose from fpabee, pabee"),
        ({"name": ["fpabee"]}, "does not exist"),
        ({"name": "fpabee"}, "needs threshold"),
        ({"name": "pabee"}, "needs patience"),
        ({"name": "budget"}, "needs exit"),
        ({"name": "pabee", "patience": 1, "threshold": 1.0}, "does not take threshold"),
        ({"name": "fpabee", "threshold": 1.0, "measure": "cosine"}, "choose from kd, rekd"),
        ({"name": "fpabee", "threshold": 1.0, "measure": ["kd"]}, "choose from kd, rekd"),
        ({"name": "fpabee", "threshold": float("nan")}, "threshold is nan"),
        ({"name": "fpabee", "threshold": float("inf")}, "threshold is inf"),
        ({"name": "fpabee", "threshold": "0.1"}, "threshold is '0.1'"),
        ({"name": "fpabee", "threshold": None}, "threshold is None"),
        ({"name": "entropy", "threshold": True}, "threshold is True"),
        ({"name": "pabee", "patience": 0}, "patience is 0"),
        ({"name": "pabee", "patience": 1.5}, "patience is 1.5"),
        ({"name": "pabee", "patience": None}, "patience is None"),
        ({"name": "pabee", "patience": True}, "patience is True"),
        ({"name": "budget", "exit": -1}, "exit is -1"),
        ({"name": "pabee", "patience": 1, "min_exit": 0}, "min_exit is 0"),
        ({"name": "pabee", "patience": 1, "min_exit": 3, "max_exit": 2}, "before min_exit 3"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(given_: dict[str, Any], says: str) -> None:
    with pytest.raises(RuleError) as caught:
        ExitRule.from_dict(given_)
    assert says in str(caught.value)
    assert caught.value.hint


def test_settings_may_come_from_numpy_and_lists() -> None:
    made = FPabee(
        threshold=np.linspace(0.1, 0.3, 3),  # type: ignore[arg-type]
        measure="kd",  # type: ignore[arg-type]
        patience=np.int64(2),  # type: ignore[arg-type]
    )
    assert made == FPabee(threshold=(0.1, 0.2, 0.3), measure=Measure.KD, patience=2)
    assert json.loads(json.dumps(made.to_dict())) == made.to_dict() | {"threshold": [0.1, 0.2, 0.3]}
    assert Entropy(threshold=[0.1, 0.2]) == Entropy(threshold=(0.1, 0.2))  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="measure 'cosine' does not exist"):
        FPabee(threshold=0.1, measure="cosine")  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["fpabee", {"name": "fpabee", "threshold": 0.1}, None])
def test_what_is_no_rule_is_refused(rule: Any) -> None:
    with pytest.raises(RuleError, match="give a rule such as"):
        simulate(np.zeros((3, 1, 2), np.float32), rule, SINGLE)


@pytest.mark.parametrize(
    "rule",
    [Budget(exit=4), Pabee(patience=1, min_exit=4), Pabee(patience=1, max_exit=4)],
    ids=lambda rule: str(rule.to_dict()),
)
def test_an_exit_that_the_model_lacks_is_refused(rule: ExitRule) -> None:
    with pytest.raises(RuleError, match="is 4, but the model has 3 exits"):
        simulate(np.zeros((3, 1, 2), np.float32), rule, SINGLE)


@pytest.mark.parametrize("shape", [(3, 2), (0, 1, 2), (1, 2, 3, 4)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuleError, match=r"expected \[exits, rows, labels\]"):
        simulate(np.zeros(shape, np.float32), Pabee(patience=1), SINGLE)


@settings(max_examples=20)
@given(rules, tasks)
def test_no_rows_give_empty_results(rule: ExitRule, task: ProblemType) -> None:
    result = simulate(np.zeros((2, 0, 3), np.float32), rule, task)
    assert result.exits.shape == (0,)
    assert result.predictions.shape == ((0,) if task is SINGLE else (0, 3))
    assert result.scores.shape == (2, 0)
