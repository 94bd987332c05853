"""How two sets of logits agree, by the labels that users get: tuned cuts included."""

from __future__ import annotations

import numpy as np
import pytest

from fpabee.runtime import Pabee, ProblemType
from fpabee.runtime.agreement import agree, answers, exit_agreement, near_ties
from fpabee.runtime.artifact.manifest import Task

SINGLE = Task(problem_type=ProblemType.SINGLE_LABEL, labels=("a", "b"))
MULTI = Task(problem_type=ProblemType.MULTI_LABEL, labels=("a", "b"))
# Label a is predicted from a probability of 0.9 on, which is a logit of log 9; b always is.
CUTS = Task(problem_type=ProblemType.MULTI_LABEL, labels=("a", "b"), label_thresholds=(0.9, 0.0))
LOG_9 = float(np.log(9.0))


def logits(*exits: tuple[float, float]) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
    """`[exits, 1, 2]`."""
    return np.array([[row] for row in exits], np.float32)


@pytest.mark.parametrize(
    ("task", "expected"),
    [(SINGLE, [[0], [1]]), (MULTI, [[[1, 0]], [[1, 1]]]), (CUTS, [[[0, 1]], [[1, 1]]])],
)
def test_answers_are_those_of_the_task(task: Task, expected: list[object]) -> None:
    assert answers(logits((1.0, -4.0), (3.0, 4.0)), task).tolist() == expected


@pytest.mark.parametrize(
    ("task", "row", "near"),
    [
        (SINGLE, (5.0, 5.015), True),
        (SINGLE, (0.0, 5.0), False),
        (MULTI, (0.005, 5.0), True),
        (MULTI, (LOG_9, 5.0), False),
        (CUTS, (0.005, 0.0), False),
        (CUTS, (LOG_9 + 0.005, 0.0), True),
    ],
)
def test_ties_are_near_the_cut(task: Task, row: tuple[float, float], near: bool) -> None:
    assert near_ties(logits(row), task, 0.01).tolist() == [[near]]


def test_exits_go_by_the_cuts() -> None:
    # Predicted: nothing, then a. At a cut of 0.9 the answer never changes.
    found, expected = logits((-1.0, 0.0), (1.0, 0.0), (1.0, 0.0)), logits(*[(1.0, 0.0)] * 3)
    rule = Pabee(patience=1)
    assert exit_agreement(found, expected, rule, MULTI, 1e-3)[0].tolist() == [False]
    same, unsure = exit_agreement(found, expected, rule, CUTS, 1e-3)
    assert (same.tolist(), unsure.tolist()) == ([True], [False])


def test_a_label_that_only_the_cut_changes_is_a_difference() -> None:
    found, expected = logits((LOG_9 - 0.5, 1.0)), logits((LOG_9 + 0.5, 1.0))
    assert agree(found, expected, Pabee(patience=1), MULTI, "fp16").labels == 1.0
    with_label_thresholds = agree(found, expected, Pabee(patience=1), CUTS, "fp16")
    assert (
        with_label_thresholds.labels,
        with_label_thresholds.first_bad,
        with_label_thresholds.passed,
    ) == (0.0, 1, False)
