"""Which rows ran all layers, and which answers stopping early changed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from fpabee.calibration import Calibration
from fpabee.calibration.report.texts import changed_by_stopping, ran_all_layers, text_rows
from fpabee.runtime import read_manifest, simulate

Make = Callable[..., Calibration]


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_rows_say_what_a_run_would(make_calibration: Make, family: str) -> None:
    result = make_calibration(family)
    names = read_manifest(result.folder).task.labels
    rows = text_rows(result, names, texts=True)
    assert [row.text for row in rows] == [row.text for row in result.texts]
    assert [row.labels for row in rows] == [row.labels for row in result.texts]
    point = result.points[-1]
    ran = simulate(result.rows.logits, point.rule, result.rows.problem_type)
    for row, number, answer in zip(rows, ran.exits, ran.predictions, strict=True):
        indices = [int(answer)] if answer.ndim == 0 else np.flatnonzero(answer)
        assert row.exits[point.name] == number
        assert row.answers[number - 1] == tuple(names[i] for i in indices)
        assert row.right[number - 1] == (row.answers[number - 1] == row.labels)
    changed = changed_by_stopping(rows, point.name)
    full = ran_all_layers(rows, point.name)
    assert len(full) == (ran.exits == 3).sum()
    assert [row.probability for row in full] == sorted(row.probability for row in full)
    assert {row.line for row in changed}.isdisjoint({row.line for row in full})
    assert len(changed) == sum(row.differs(point.name) for row in rows) > 0
    lost = [row.right[2] and not row.right[row.exits[point.name] - 1] for row in changed]
    assert lost == sorted(lost, reverse=True)


def test_answers_along_the_exits_are_joined_where_they_are_the_same(
    make_calibration: Make,
) -> None:
    for row in text_rows(make_calibration(), ("a", "b", "c", "d"), texts=False):
        runs = row.runs()
        spelled = [answer for first, last, answer in runs for _ in range(first, last + 1)]
        assert tuple(spelled) == row.answers
        assert all(one[2] != two[2] for one, two in pairwise(runs))
        assert row.text is None
