"""How two sets of logits agree, and what is a near tie."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from fpabee.runtime import (
    Agreement,
    Confidence,
    Energy,
    Entropy,
    ExitRule,
    FPabee,
    Measure,
    Pabee,
    Pcee,
    ProblemType,
    Requirements,
    ThresholdRule,
    simulate,
)
from fpabee.runtime.check import (
    EXPORT_LIMIT,
    EXPORT_REQUIREMENTS,
    REQUIREMENTS,
    compare,
    exits_near_ties,
    logit_differences,
)
from fpabee.runtime.tasks import Task, unnamed_task

Logits = NDArray[np.float32]
SINGLE = unnamed_task(ProblemType.SINGLE_LABEL, 2)
MULTI = unnamed_task(ProblemType.MULTI_LABEL, 2)
# Label a is predicted from a probability of 0.9 on, which is a logit of log 9; b always is.
TUNED = unnamed_task(ProblemType.MULTI_LABEL, 2, (0.9, 0.0))
LOG_9 = float(np.log(9.0))
SINGLE_LABEL = ProblemType.SINGLE_LABEL
NEVER = FPabee(threshold=-1.0)
NEVER_SURE = Confidence(threshold=1.0)


def logits(*exits: Sequence[Sequence[float]]) -> Logits:
    """`[exits, rows, labels]`."""
    return np.array(exits, np.float32)


@pytest.fixture
def clear() -> Logits:
    """Three exits, four rows, three labels: no tie, and no score near a threshold of 0.1."""
    return np.random.default_rng(0).normal(0, 3, (3, 4, 3)).astype(np.float32)


def changed(values: Logits, exit_number: int, amount: float) -> Logits:
    result = values.copy()
    result[exit_number - 1, 1, 2] += amount
    return result


def export_agreement(found: Logits, expected: Logits, rule: ExitRule | None = None) -> Agreement:
    return compare(found, expected, rule or FPabee(threshold=0.1), SINGLE, EXPORT_REQUIREMENTS)


@pytest.mark.parametrize(
    ("task", "expected"),
    [(SINGLE, [[0], [1]]), (MULTI, [[[1, 0]], [[1, 1]]]), (TUNED, [[[0, 1]], [[1, 1]]])],
)
def test_answers_depend_on_the_task(task: Task, expected: list[object]) -> None:
    assert task.answers(logits([(1.0, -4.0)], [(3.0, 4.0)])).tolist() == expected


@pytest.mark.parametrize(
    ("task", "row", "near"),
    [
        (SINGLE, (5.0, 5.015), True),
        (SINGLE, (0.0, 5.0), False),
        (SINGLE, (0.005,), True),
        (MULTI, (0.005, 5.0), True),
        (MULTI, (LOG_9, 5.0), False),
        (TUNED, (0.005, 0.0), False),
        (TUNED, (LOG_9 + 0.005, 0.0), True),
    ],
)
def test_labels_within_the_tolerance_are_near_ties(
    task: Task, row: tuple[float, ...], near: bool
) -> None:
    assert task.near_ties(logits([row]), 0.01).tolist() == [[near]]


def test_equal_logits_agree(clear: Logits) -> None:
    agreement = export_agreement(clear.copy(), clear)
    assert agreement == Agreement(4, 0.0, 1.0, 1.0, 0, EXPORT_REQUIREMENTS)
    assert agreement.passed
    assert json.loads(json.dumps(agreement.to_dict())) == {
        **{"rows": 4, "max_logit_difference": 0.0, "label_agreement": 1.0, "exit_agreement": 1.0},
        **{"near_ties": 0, "passed": True},
    }
    within = export_agreement(changed(clear, 2, 5e-5), clear)
    assert within.max_logit_difference <= 5e-5
    assert within.passed


@pytest.mark.parametrize(
    ("required", "amount"),
    [
        (EXPORT_REQUIREMENTS, 1e-3),
        (EXPORT_REQUIREMENTS, np.nan),
        (REQUIREMENTS["int8"], np.nan),
        (REQUIREMENTS["int8"], np.inf),
    ],
)
@pytest.mark.parametrize("exit_number", [1, 2])
def test_the_first_bad_exit_is_named(
    exit_number: int, amount: float, required: Requirements, clear: Logits
) -> None:
    found = changed(changed(clear, exit_number, amount), 3, amount)
    agreement = compare(found, clear, FPabee(threshold=0.1), SINGLE, required)
    assert agreement.first_bad_exit == exit_number
    assert not agreement.passed
    assert not np.isnan(amount) or np.isnan(agreement.max_logit_difference)


def test_logits_have_a_bar_of_their_own(clear: Logits) -> None:
    found = clear * np.float32(1 - 1e-3)
    agreement = export_agreement(found, clear)
    assert (agreement.label_agreement, agreement.exit_agreement) == (1.0, 1.0)
    assert (agreement.first_bad_exit, agreement.passed) == (1, False)
    assert "1.00e-03 of their size (at most 1e-04 allowed)" in str(agreement)
    assert compare(found, clear, NEVER, SINGLE, REQUIREMENTS["fp32"]).passed


@pytest.mark.parametrize("size", [0.01, 1.0, 70.0])
def test_a_difference_counts_against_the_largest_logit_of_its_row(size: float) -> None:
    """But at least against 1: where logits are small, so are the differences of probabilities."""
    large = np.array([[[size, -0.1 * size, 0.0], [0.5, -0.5, 0.0]]], np.float32)
    unit = np.array([[[0.0, 0.0, max(size, 1.0)], [0.0, 0.0, 1.0]]], np.float32)
    for share in (0.5, 2.0):
        found = large + np.float32(share * EXPORT_LIMIT) * unit
        np.testing.assert_allclose(logit_differences(found, large), share * EXPORT_LIMIT, rtol=0.05)
        assert export_agreement(found, large, NEVER).passed == (share < 1)


@pytest.mark.parametrize(("size", "differs"), [(1.0, True), (70.0, False)])
def test_rounding_may_decide_more_where_logits_are_large(size: float, differs: bool) -> None:
    """Labels and exits, of the one row whose logits are large."""
    gap = 2e-3
    expected = logits([[0.0, gap, -size], [4.0, 0.0, 0.0]], [[0.0, 1.0, -size], [4.0, 0.0, 0.0]])
    found = expected.copy()
    found[0, 0, :2] = gap, 0.0
    agreement = compare(found, expected, NEVER, SINGLE, EXPORT_REQUIREMENTS)
    assert (agreement.label_agreement < 1, agreement.near_ties == 0) == (differs, differs)
    expected[0, 0, 1] = 1.0
    score = float(simulate(expected, NEVER_SURE, SINGLE_LABEL).scores[0, 0])
    stops = Confidence(threshold=score - 0.002)
    moved = expected.copy()
    moved[0, 0, 1] -= 0.02
    agreement = compare(moved, expected, stops, SINGLE, EXPORT_REQUIREMENTS)
    assert (agreement.exit_agreement < 1) == differs


@pytest.mark.parametrize(
    ("task", "expected", "found"),
    [
        (SINGLE, [1.0, 1.00005, -3.0], [1.00005, 1.0, -3.0]),
        (MULTI, [4.0, -4.0, 0.00003], [4.0, -4.0, -0.00003]),
    ],
)
def test_labels_that_change_at_a_near_tie_are_left_out_and_counted(
    task: Task, expected: list[float], found: list[float]
) -> None:
    sure = [3.0, -3.0, -3.0]
    before = logits([sure, expected, sure])
    after = logits([sure, found, sure])
    agreement = compare(after, before, NEVER, task, EXPORT_REQUIREMENTS)
    assert (agreement.label_agreement, agreement.near_ties, agreement.passed) == (1.0, 1, True)


def test_an_exit_that_changes_at_its_threshold_is_left_out_and_counted() -> None:
    expected = logits([[1.0, 0.0], [5.0, 0.0], [0.2, 0.0]], [[9.0, 0.0]] * 3)
    score = 1 / (1 + np.exp(-1.0))
    found = expected.copy()
    found[0, 0, 0] -= 4e-5
    agreement = export_agreement(found, expected, Confidence(threshold=score - 1e-6))
    assert (agreement.exit_agreement, agreement.near_ties, agreement.passed) == (1.0, 1, True)


def test_an_exit_that_changes_elsewhere_counts() -> None:
    expected = logits([[1.0, 0.0], [5.0, 0.0]], [[9.0, 0.0]] * 2)
    found = expected.copy()
    found[0, 0, 0] = 2.0
    agreement = compare(found, expected, Confidence(threshold=0.8), SINGLE, REQUIREMENTS["fp32"])
    assert (agreement.label_agreement, agreement.exit_agreement) == (1.0, 0.5)
    assert (agreement.first_bad_exit, agreement.passed) == (1, False)


def test_label_thresholds_count_for_labels_and_exits() -> None:
    found = logits([(LOG_9 - 0.5, 1.0)])
    expected = logits([(LOG_9 + 0.5, 1.0)])
    rule = Pabee(patience=1)
    assert compare(found, expected, rule, MULTI, REQUIREMENTS["fp16"]).label_agreement == 1.0
    tuned = compare(found, expected, rule, TUNED, REQUIREMENTS["fp16"])
    assert (tuned.label_agreement, tuned.first_bad_exit, tuned.passed) == (0.0, 1, False)
    # Predicted: b, then a and b. With a threshold of 0.9 for a, the answer never changes.
    found = logits([(-1.0, 2.0)], *[[(1.0, 2.0)]] * 2)
    expected = logits(*[[(1.0, 2.0)]] * 3)
    assert compare(found, expected, rule, MULTI, REQUIREMENTS["fp32"]).exit_agreement == 0.0
    assert compare(found, expected, rule, TUNED, REQUIREMENTS["fp32"]).exit_agreement == 1.0
    assert exits_near_ties(expected, rule, TUNED, 1e-3).tolist() == [False]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_exits_that_change_far_from_their_threshold_count(precision: str) -> None:
    """Of rows of many scores, half stop at exit 2 of the target and at exit 1 of the model."""
    margins = np.linspace(0.0, 8.0, 400, dtype=np.float32)
    expected = np.stack([np.stack([margins, -margins], axis=-1)] * 2)
    found = expected.copy()
    found[0, 200:] = 0.0  # the model stops these rows at exit 1
    found[0, :200] *= 4
    agreement = compare(found, expected, Entropy(threshold=0.3), SINGLE, REQUIREMENTS[precision])
    assert agreement.exit_agreement < 0.5
    assert agreement.passed == (precision == "int8")
    assert f"exits for {agreement.exit_agreement:.2%}" in str(agreement)


@pytest.mark.parametrize("quantile", [0.01, 0.2, 0.5, 0.8])
@pytest.mark.parametrize(
    "rule",
    [
        *(FPabee(threshold=0.0, measure=measure) for measure in Measure),
        Confidence(threshold=0.0),
        Entropy(threshold=0.0),
        Pcee(threshold=0.0),
        Energy(threshold=0.0),
    ],
    ids=lambda rule: getattr(rule, "measure", rule.name),
)
@pytest.mark.parametrize("task", [SINGLE, MULTI], ids=["single", "multi"])
def test_the_exits_of_other_rows_do_not_depend_on_rounding(
    task: Task, rule: ThresholdRule, quantile: float
) -> None:
    """Few rows of an overconfident model are near ties, although their scores are very close."""
    random = np.random.default_rng(3)
    expected = random.normal(0, 1, (4, 2000, 1)) + random.choice([0, 4], (1, 2000, 1))
    expected = expected * (1, -1)
    expected += random.normal(0, 0.05, expected.shape)
    scores = rule.stop_scores(lambda each: task.simulate(expected, each).scores)
    threshold = float(np.quantile(scores[np.isfinite(scores)], quantile))
    chosen = rule.with_stop_threshold(threshold)
    tolerance = 1e-5
    exits = task.simulate(expected, chosen).exits
    ties = exits_near_ties(expected, chosen, task, tolerance)
    for _ in range(5):
        found = expected + random.choice([-tolerance, tolerance], expected.shape)
        assert (task.simulate(found, chosen).exits == exits)[~ties].all()
    assert ties.mean() < 0.02


def test_int8_is_judged_by_the_answers_that_the_rule_gives() -> None:
    """Labels of other exits and the exits themselves may differ; the answers may not."""
    rule = Confidence(threshold=0.9)
    sure = [(9.0, -9.0)] * 100
    torn = [(1.0, -1.0)] * 100
    expected = logits(torn, sure, sure)
    other_label = logits([(-1.0, 1.0)] * 100, sure, sure)
    stops_earlier = logits(sure, sure, sure)
    wrong = expected.copy()
    wrong[1, :2] = (-9.0, 9.0)
    required = REQUIREMENTS["int8"]
    for same in (other_label, stops_earlier):
        agreement = compare(same, expected, rule, SINGLE, required)
        assert (agreement.label_agreement, agreement.passed) == (1.0, True)
        assert not compare(same, expected, rule, SINGLE, REQUIREMENTS["fp32"]).passed
    agreement = compare(wrong, expected, rule, SINGLE, required)
    assert (agreement.label_agreement, agreement.passed) == (0.98, False)
    assert agreement.first_bad_exit == 2
    assert "answers agree for 98.00% (at least 99.5% required)" in str(agreement)
    # Answers of several labels, and with exit 0.
    several = compare(wrong, expected, rule, MULTI, required, first_exit=0)
    assert (several.label_agreement, several.passed) == (0.98, False)


def test_near_ties_are_compared_if_hardly_anything_else_is_left() -> None:
    expected = np.full((1, 100, 2), 0.1, np.float32)
    expected[:, :11, 0] += 9.0  # 11 sure rows
    found = expected[..., ::-1].copy()
    found[:, :11] = expected[:, :11]
    found[0, 11:, 1] += 0.05
    few = compare(found, expected, NEVER, SINGLE, REQUIREMENTS["int8"])
    assert (few.label_agreement, few.near_ties, few.passed) == (1.0, 89, True)
    assert "; near ties in 89 of 100 texts are not compared" in str(few)
    fewer = compare(found[:, 2:], expected[:, 2:], NEVER, SINGLE, REQUIREMENTS["int8"])
    assert (fewer.label_agreement, fewer.near_ties, fewer.passed) == (9 / 98, 0, False)
    said = "answers are hardly anything but near ties, of which 9.18% agree (at least"
    assert said in str(fewer)
    assert "near ties" not in str(few).split(";")[0]
    assert few.to_dict().keys() == fewer.to_dict().keys() == {
        "rows", "max_logit_difference", "label_agreement", "exit_agreement", "near_ties", "passed"
    }  # fmt: skip


def test_exits_that_are_near_ties_only_are_no_agreement() -> None:
    rule = Confidence(threshold=float(1 / (1 + np.exp(-2.0))))
    expected = np.tile(np.array([1.0, -1.0], np.float32), (2, 50, 1))  # just at the threshold
    agreement = compare(expected, expected, rule, SINGLE, REQUIREMENTS["fp32"])
    assert agreement.passed
    assert "exits are hardly anything but near ties, of which 100.00% agree" in str(agreement)
    assert "labels agree for 100.00% (" in str(agreement)
