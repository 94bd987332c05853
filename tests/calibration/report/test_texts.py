"""Which answers stopping early changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fpabee.calibration import Calibration
from fpabee.calibration.report.texts import changed_by_stopping, text_rows
from fpabee.runtime import read_manifest, simulate

Make = Callable[..., Calibration]


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_rows_say_what_a_run_would(at_exit_1: Make, family: str) -> None:
    result = at_exit_1(family)
    names = read_manifest(result.folder).task.labels
    rows = text_rows(result, names, texts=True)
    assert [row.text for row in rows] == [row.text for row in result.texts]
    assert [row.labels for row in rows] == [row.labels for row in result.texts]
    point = result.points[-1]
    ran = simulate(result.rows.logits, point.rule, result.rows.problem_type)
    for row, number, answer in zip(rows, ran.exits, ran.predictions, strict=True):
        indices = [int(answer)] if answer.ndim == 0 else np.flatnonzero(answer)
        assert row.exits[point.name] == number
        assert row.answers[number] == tuple(names[i] for i in indices)
        assert row.right[number] == (row.answers[number] == row.labels)
    changed = changed_by_stopping(rows, point.name)
    assert all(row.exits[point.name] < 3 for row in changed)
    assert len(changed) == sum(row.differs(point.name) for row in rows) > 0
    lost = [row.right[3] and not row.right[row.exits[point.name]] for row in changed]
    assert lost == sorted(lost, reverse=True)
