"""Rows of an input: their labels as numbers."""

from __future__ import annotations

import pytest

from fpabee.runtime.artifact import manifest
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.errors import InputError
from fpabee.runtime.tasks import Task, task_of

from ...conftest import CLASSIFICATION

NAMES = ("no", "perhaps", "yes")
SINGLE = ProblemType.SINGLE_LABEL
MULTI = ProblemType.MULTI_LABEL


def task(kind: ProblemType) -> Task:
    return task_of(manifest.Task(problem_type=kind, labels=NAMES))


def test_labels_become_numbers() -> None:
    rows = [["yes"], ["no"]]
    assert task(SINGLE).encode(rows).tolist() == [2, 0]
    assert task(MULTI).encode([["yes", "no"], []]).tolist() == [[1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("kind", CLASSIFICATION)
def test_an_unknown_label_is_named_with_the_known_ones(kind: ProblemType) -> None:
    with pytest.raises(InputError, match=r"row 2 has label 'maybe'.*no, perhaps, yes"):
        task(kind).encode([["yes"], ["maybe"]])


@pytest.mark.parametrize("row", [[], ["yes", "no"]])
def test_single_label_rows_need_one_label(row: list[str]) -> None:
    with pytest.raises(InputError, match=f"row 1 has {len(row)} labels.*problem_type"):
        task(SINGLE).encode([row])
