"""Measured times of the exits, and speed-ups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fpabee.calibration.costs import CostModel, measure_costs, measure_speedup
from fpabee.runtime import Budget, Engine


def test_times_between_measured_lengths_are_interpolated() -> None:
    model = CostModel(1, (10, 20), ((1.0, 3.0), (2.0, 2.0)))
    costs = model.row_costs(np.array([5, 15, 20], np.intp))
    np.testing.assert_allclose(costs, [[1, 2, 3], [3, 4, 5]])


def test_every_exit_is_timed_at_the_typical_lengths(engines: Mapping[str, Path]) -> None:
    with Engine.load(engines["bert"], threads=1) as engine:
        model = measure_costs(engine, np.array([3, 3, 9, 9], np.intp), batch=2)
        assert (model.batch, model.lengths) == (2, (3, 6, 9))
        assert np.shape(model.seconds) == (3, 3)
        assert np.min(model.seconds) > 0
        rows = engine.encode(["the film", "rain"])
        assert measure_speedup(engine, rows, Budget(exit=1), 1) > 0
        assert measure_speedup(engine, rows, Budget(exit=3), 1) == pytest.approx(1.0, abs=0)


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_costs_are_those_of_one_row(batch: int) -> None:
    """On a target that takes at most eight rows, and 36 tokens, at a time."""

    def time_exits(rows: int, tokens: int) -> list[float]:
        return [rows * seconds for seconds in (0.5, tokens)]

    limits = SimpleNamespace(max_batch=8, group_tokens=36)
    engine: Any = SimpleNamespace(limits=limits, time_exits=time_exits)
    found = measure_costs(engine, np.array([3, 9], np.intp), batch)
    assert found.seconds == ((0.5,) * len(found.lengths), found.lengths)
