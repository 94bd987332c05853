"""Guarantees: tests that hold their level, in one fixed sequence, on rows in any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from msgspec import structs

from fpabee.calibration import Bound, Goal, LabelledLogits, evidence, guarantee
from fpabee.calibration.costs import observed_losses
from fpabee.calibration.evidence import Evidence, QueryEvidence, TextEvidence
from fpabee.calibration.exact import (
    binomial_tail,
    most_losses,
)
from fpabee.calibration.guarantee import Certified, certify, shuffled
from fpabee.calibration.query_logits import QueryLogits
from fpabee.calibration.scoring import Scorer
from fpabee.calibration.settings import StopScores, exits_of, settings_lists
from fpabee.runtime import Budget, Confidence, ExitRule, ProblemType, simulate
from fpabee.runtime.artifact.exits import Exits
from fpabee.runtime.artifact.manifest import Task
from fpabee.runtime.tasks import task_of

from .conftest import make_rows, search_on, two_exits

BOUND = Bound(drop=0.04)
LABELS = ("a", "b", "c")


def certified(
    rows: LabelledLogits,
    bound: Bound = BOUND,
    metric: str = "accuracy",
    labels: Sequence[str] = LABELS,
) -> Certified:
    return certify(TextEvidence(Scorer(rows, metric), labels), bound)


@pytest.mark.parametrize("samples", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_a_guarantee_holds_in_95_percent_although_the_rows_are_sorted(samples: int) -> None:
    """Rows of the first label win and others lose, so all losses come last."""
    everyone = make_rows(count=20_000, seed=9)
    assert everyone.expected is not None
    everyone.logits[..., 0] += np.linspace(2.0, -2.0, everyone.exits[-1])[:, None]
    stop = StopScores(everyone)
    each = observed_losses(Scorer(everyone, "accuracy"))
    generator = np.random.default_rng(0)
    broken = 0
    faster = 0
    for _ in range(samples):
        drawn = generator.integers(0, len(everyone), 800)
        rule = certified(everyone.take(drawn[np.argsort(everyone.expected[drawn])])).rule
        if rule is None or rule == Budget(exit=6):
            continue
        faster += 1
        broken += each[everyone.at(stop.exits([rule])[0])].mean() > 0.04
    assert faster > 0.8 * samples
    assert broken <= 0.05 * samples + 2 * (0.05 * 0.95 * samples) ** 0.5


def test_rows_that_allow_no_further_loss_are_left_out() -> None:
    rows = two_exits(np.zeros(600, bool))
    found = certified(rows, Bound(drop=0.01))
    assert found.certificate is not None
    assert found.certificate.promises[0].rows == 473


@pytest.mark.parametrize("metric", ["agreement", "accuracy", "macro_f1", "matthews"])
def test_rows_without_a_loss_pass_only_if_they_are_enough(metric: str) -> None:
    """No event in n rows shows that there are at most 3.0/n, which is exact; not less."""
    bound = Bound(changed_answers=0.01) if metric == "agreement" else Bound(drop=0.01)
    for count in (298, 299):
        found = certified(two_exits(np.zeros(count, bool)), bound, metric)
        assert (found.rule is not None) is (count == 299)
        assert ("298 texts" in found.failed) is (count == 298)


@pytest.mark.parametrize("metric", ["macro_f1", "matthews"])
def test_the_drop_of_an_f1_passes_two_tests(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few right answers are lost, but those of a rare label are a large part of the metric."""
    truth = (np.arange(3000) < 60).astype(np.int64)
    rows = two_exits(np.arange(3000) < 20, truth)
    early = {
        name: certified(rows, Bound(drop=share), name).rule != Budget(exit=2)
        for name, share in (("accuracy", 0.02), (metric, 0.02))
    }
    assert early == {"accuracy": True, metric: False}
    assert certified(rows, Bound(drop=0.4), metric).rule != Budget(exit=2)
    interval = Mock(return_value=(0.0, 0.0))
    monkeypatch.setattr(evidence, "drop_interval", interval)
    certified(rows, Bound(drop=0.4, confidence=0.9), metric)
    _, _, share, _ = interval.call_args.args
    assert share == pytest.approx(0.8), "10 % on the one side that counts"


@pytest.mark.parametrize("first_exit", [0, 1])
@pytest.mark.parametrize(
    ("task", "thresholds"),
    [
        (ProblemType.SINGLE_LABEL, ()),
        (ProblemType.SINGLE_LABEL, (1.0, 0.7, 1.0)),
        (ProblemType.MULTI_LABEL, ()),
    ],
)
def test_goals_and_guarantees_choose_from_the_same_settings(
    task: ProblemType, thresholds: tuple[float, ...], first_exit: int
) -> None:
    rows = make_rows(count=800, exits=6, problem_type=task)
    rows = replace(rows, first_exit=first_exit, decision_thresholds=thresholds)
    metric = "accuracy" if task is ProblemType.SINGLE_LABEL else "exact_match"
    every = {rule for settings in settings_lists(rows) for rule in settings}
    assert search_on(rows, metric).choose(Goal(max_drop=4.0)) in every
    assert certified(rows, BOUND, metric).rule in every


def test_testing_ends_at_the_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows()
    settings: list[ExitRule] = [Budget(exit=6)]
    for setting in settings_lists(rows)[0]:
        # A setting that stops the rows of the one before is not tested again.
        if (exits_of(setting, rows) != exits_of(settings[-1], rows)).any():
            settings.append(setting)
    for count in (0, 1, 100):
        answers = iter([True] * count + [False, True])
        monkeypatch.setattr(guarantee._Test, "passes", lambda *_, answers=answers: next(answers))
        assert certified(rows).rule == (settings[count - 1] if count else None)
        assert list(answers) == [True]


def test_every_promise_must_pass_and_each_is_about_its_own_rows() -> None:
    """Of 2,000 texts, 200 are flagged; the first exit misses some and flags some others."""
    flagged = np.arange(2000) < 200
    wrong = (np.arange(2000) % 200 == 0) | (np.arange(2000) % 400 == 201)
    rows = two_exits(wrong, flagged.astype(np.int64))
    thresholds = {"b": 0.5}
    rows = replace(rows, decision_thresholds=(1.0, 0.5))

    def early(**shares: float) -> tuple[bool, str]:
        found = certified(rows, Bound(thresholds=thresholds, **shares), "agreement", "ab")
        return found.rule not in (None, Budget(exit=2)), found.failed.split("; ")[0]

    assert (
        early(changed_answers=0.02) == early(missed=0.05) == early(false_alarms=0.02) == (True, "")
    )
    assert early(changed_answers=0.02, missed=0.05, false_alarms=0.02) == (True, "")
    assert early(missed=0.005) == (False, "200 texts are too few")
    assert early(changed_answers=0.005) == (
        False,
        "the next setting has 15 changed answers in 1829 texts",
    )
    assert early(changed_answers=0.02, missed=0.015, false_alarms=0.02)[0] is False
    bound = Bound(missed=0.05, changed_answers=0.02, thresholds=thresholds)
    found = certified(rows, bound, "agreement", "ab")
    assert found.certificate is not None
    assert [(each.of, each.label, each.rows) for each in found.certificate.promises] == [
        ("changed_answers", None, 1972),
        ("missed", "b", 181),
    ]
    assert found.certificate.label_thresholds == thresholds


def test_texts_near_a_threshold_are_not_certain() -> None:
    """The answer is certain, but not whether 72 % are above 70 %: early exits flip every second."""
    generator = np.random.default_rng(0)
    logit = np.log(0.72 / 0.28) + generator.normal(scale=0.4, size=(3, 4000))
    logit[:, ::2] = 9.0
    logits = np.stack([np.zeros_like(logit), logit], axis=-1).astype(np.float32)
    rows = LabelledLogits(logits, np.full(4000, 9, np.intp), None, ProblemType.SINGLE_LABEL)
    rows = replace(rows, decision_thresholds=(1.0, 0.7))
    bound = Bound(changed_answers=0.02, thresholds={"b": 0.7})
    found = certified(rows, bound, "agreement", "ab")
    assert isinstance(found.rule, Confidence)
    assert found.rule.label_thresholds == (1.0, 0.7)
    exits = exits_of(found.rule, rows)
    assert (exits[::2] == 1).all()
    assert (exits[1::2] == 3).mean() > 0.8
    # Both ways to apply a rule agree.
    np.testing.assert_array_equal(StopScores(rows).exits([found.rule])[0], exits)
    every, reference = rows.decisions()
    assert (every[exits - 1, np.arange(4000)] != reference).any(axis=-1).mean() < 0.02


def test_what_decides() -> None:
    task: dict[str, Any] = {"labels": LABELS}
    single = Task(problem_type=ProblemType.SINGLE_LABEL, **task)
    assert task_of(single).decision_thresholds({}) == ()
    assert task_of(single).decision_thresholds({"b": 0.7}) == (1.0, 0.7, 1.0)
    multi = Task(problem_type=ProblemType.MULTI_LABEL, label_thresholds=(0.4, 0.5, 0.6), **task)
    assert task_of(multi).decision_thresholds({"b": 0.7}) == (0.4, 0.7, 0.6)
    assert task_of(structs.replace(multi, label_thresholds=())).decision_thresholds({}) == ()
    rows = make_rows(problem_type=ProblemType.MULTI_LABEL)
    answers = rows.answers()
    for thresholds in ((), (0.5,) * 3):
        every, reference = replace(rows, decision_thresholds=thresholds).decisions()
        np.testing.assert_array_equal(every, answers)
        np.testing.assert_array_equal(reference, answers[-1])


def test_decisions_are_compared_with_the_reference_where_there_is_one() -> None:
    """The target itself differs in 12 of 2,000 texts, which count although its exits agree."""
    rows = two_exits(np.zeros(2000, bool))
    reference = rows.logits[-1].copy()
    reference[:12] = reference[:12, ::-1]
    rows = replace(rows, reference=reference)
    assert Scorer(rows, "agreement").full_depth == pytest.approx(1 - 12 / 2000)
    assert certified(rows, Bound(changed_answers=0.02), "agreement").rule not in (
        None,
        Budget(exit=2),
    )
    found = certified(rows, Bound(changed_answers=0.02), "agreement")
    assert found.certificate is not None
    most = found.certificate.full_depth_changes / 100
    assert binomial_tail(12, 2000, most) == pytest.approx(0.05), "the one-sided exact bound"
    found = certified(replace(rows, reference=None), Bound(changed_answers=0.02), "agreement")
    assert found.certificate is not None
    assert found.certificate.full_depth_changes == 0, "full depth is its own reference"
    found = certified(rows, Bound(changed_answers=0.005), "agreement")
    assert (found.rule, found.certificate) == (None, None)
    assert found.failed == (
        "full depth has 12 changed answers in 1829 texts; more texts would hardly help"
    )
    found = certified(rows, Bound(changed_answers=0.007), "agreement")
    assert found.rule is None
    assert "give a good chance" in found.failed
    assert "more texts would hardly help" not in found.failed, "the bound is above what was seen"
    part = rows.take(np.arange(6))
    assert part.reference is not None
    assert certified(rows.take(np.arange(6, 2000)), Bound(changed_answers=0.02), "agreement").rule


def of_texts(rows: LabelledLogits) -> TextEvidence:
    return TextEvidence(Scorer(rows, "accuracy"), LABELS)


def of_queries(rows: LabelledLogits) -> QueryEvidence:
    """Each row as a query with three documents."""
    logits = rows.logits.reshape(len(rows.logits), -1)
    starts = np.arange(0, 3 * len(rows) + 1, 3)
    exits = Exits.numbered(1, len(logits))
    return QueryEvidence(QueryLogits(logits, starts, logits[-1], exits), np.ones(5), 1)


@pytest.mark.parametrize("evidence_of", [of_texts, of_queries])
def test_which_units_are_left_out_depends_on_the_units_only(
    evidence_of: Callable[[LabelledLogits], Evidence[Any]],
) -> None:
    rows = make_rows(count=300)
    own = shuffled(evidence_of(rows))
    mixed = rows.take(np.random.default_rng(0).permutation(300))
    again = mixed.take(shuffled(evidence_of(mixed)))
    np.testing.assert_array_equal(rows.take(own).logits, again.logits)
    other = shuffled(evidence_of(rows.take(np.arange(1, 300))))
    assert sorted(other) == list(range(299))
    assert (np.diff(other) < 0).any()
    assert ((other + 1)[:200] != own[own > 0][:200]).any()


@pytest.mark.parametrize("useful", [False, True])
def test_one_list_has_exit_0_and_the_layers(useful: bool) -> None:
    rows = make_rows(count=3000)
    exit_0 = rows.logits[5] if useful else np.random.default_rng(1).normal(0, 0.3, (3000, 3))
    logits = np.concatenate([exit_0[None], rows.logits]).astype(np.float32)
    with_exit_0 = replace(rows, logits=logits, first_exit=0)
    rule = certified(with_exit_0).rule
    assert isinstance(rule, Confidence)
    assert isinstance(rule.threshold, tuple)
    assert rule.exit_0_threshold is not None
    doubt = 1 - rule.threshold[-1]
    assert 1 - rule.exit_0_threshold == pytest.approx(doubt**2, rel=2e-3)
    exits = simulate(logits, rule, rows.problem_type, first_exit=0).exits
    np.testing.assert_array_equal(StopScores(with_exit_0).exits([rule])[0], exits)
    saved = exits_of(certified(rows).rule or Budget(exit=6), rows).mean() - exits.mean()
    assert saved > 1 if useful else saved == 0
    assert (exits == 0).any() == useful


def test_a_setting_that_stops_no_row_is_tested_too() -> None:
    """Bolder settings gain so much that few rows would confirm them, but the order is fixed."""
    rows = make_rows(count=100, seed=3)
    assert rows.expected is not None
    rows.logits[-1] = -rows.logits[-1]
    rows.logits[:-1] = np.eye(3)[rows.expected] * 9
    gains = int((observed_losses(Scorer(rows, "accuracy"))[0] < 0).sum())
    assert most_losses(100, 0.01, 0.05, with_gains=True)[gains] >= 0
    found = certified(rows, Bound(drop=0.01))
    assert found.failed.startswith("100 texts are too few; at most 1 points of drop")
