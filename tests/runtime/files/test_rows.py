"""Rows of an input: their labels as numbers."""

from __future__ import annotations

import pytest

from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.errors import InputError
from fpabee.runtime.files.rows import encode_labels

from ...conftest import CLASSIFICATION

NAMES = ("no", "perhaps", "yes")
SINGLE = ProblemType.SINGLE_LABEL
MULTI = ProblemType.MULTI_LABEL


def test_labels_become_numbers() -> None:
    rows = [["yes"], ["no"]]
    assert encode_labels(rows, NAMES, SINGLE).tolist() == [2, 0]
    assert encode_labels([["yes", "no"], []], NAMES, MULTI).tolist() == [[1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("task", CLASSIFICATION)
def test_an_unknown_label_is_named_with_the_known_ones(task: ProblemType) -> None:
    with pytest.raises(InputError, match=r"row 2 has label 'maybe'.*no, perhaps, yes"):
        encode_labels([["yes"], ["maybe"]], NAMES, task)


@pytest.mark.parametrize("row", [[], ["yes", "no"]])
def test_single_label_rows_need_one_label(row: list[str]) -> None:
    with pytest.raises(InputError, match=f"row 1 has {len(row)} labels.*problem_type"):
        encode_labels([row], NAMES, SINGLE)
