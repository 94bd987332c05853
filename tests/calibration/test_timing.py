"""Measured times of exits, rules and queries, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fpabee.calibration.timing import (
    CostModel,
    in_turns,
    measure_costs,
    measure_speedup,
    time_in_turns,
)
from fpabee.runtime import Budget, Engine
from fpabee.runtime.artifact.exits import Exits


def test_times_between_measured_lengths_are_interpolated() -> None:
    model = CostModel((10, 20), ((1.0, 3.0), (2.0, 2.0)))
    costs = model.row_costs(np.array([5, 15, 20], np.intp))
    np.testing.assert_allclose(costs, [[1, 2, 3], [3, 4, 5]])


def test_every_exit_is_timed_at_the_typical_lengths(engines: Mapping[str, Path]) -> None:
    with Engine.load(engines["bert"], threads=1) as engine:
        seen: list[Any] = []
        lengths = np.array([3, 3, 9, 9], np.intp)
        (model,) = measure_costs([engine], lengths, 2, lambda *state: seen.append(state))
        assert seen == [("time segments, batch 2", number, 3) for number in range(3)]
        assert model.lengths == (3, 6, 9)
        assert np.shape(model.seconds) == (3, 3)
        assert np.min(model.seconds) > 0
        rows = engine.core.encode(["the film", "rain"])
        layers = np.array([1, 1])
        assert min(measure_speedup(engine, rows, Budget(exit=1), layers, 1)) > 0
        assert measure_speedup(engine, rows, Budget(exit=3), layers, 1) == (1.0, 1.0)


def test_ways_to_measure_a_unit_take_turns() -> None:
    calls: list[str] = []
    seen: list[Any] = []

    def noted(unit: str, way: str) -> str:
        calls.append(unit + way)
        return unit + way

    measures = [partial(noted, way=way) for way in "abc"]
    found = in_turns(["1", "2"], measures, 2, lambda *state: seen.append(state), "measure")
    assert calls == ["1a", "1b", "1c", "2a", "2b", "2c", "1b", "1c", "1a", "2b", "2c", "2a"]
    assert found == 2 * [[["1a", "1b", "1c"], ["2a", "2b", "2c"]]]
    assert seen == [("measure", 0, 2), ("measure", 1, 2)]
    assert time_in_turns(["1", "2"], measures, 4).shape == (4, 2, 3)


def test_a_speedup_that_the_layers_do_not_explain_is_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rule runs two of six layers, so it is at most three times as fast."""
    timed: list[list[range]] = []
    passes = iter([[9.0, 1.0], [2.0, 1.0], [2.0, 1.0]])

    def turns(units: Any, runs: Any, count: int) -> Any:
        timed.append([row for unit in units for row in unit])
        return np.tile(next(passes), (count, len(units), 1))

    monkeypatch.setattr("fpabee.calibration.timing.time_in_turns", turns)
    core = SimpleNamespace(
        exits=Exits.of_layers((1, 6)),
        full_depth=None,
        in_use=SimpleNamespace(by=lambda rule: None),
        trace=lambda rows, route: None,
    )
    engine: Any = SimpleNamespace(manifest=SimpleNamespace(exit_layers=(1, 6)), core=core)
    rows: Any = [range(length) for length in range(1, 1001)]
    # A fifth of the rows needs all layers, and they are not spread evenly.
    layers = np.where(np.arange(1000) < 200, 6, 1)
    assert measure_speedup(engine, rows, Budget(exit=1), layers, 1) == (2.0, 0.5)
    assert len(timed) == 3, "9 and the median of 9 and 2 are more than the layers allow"
    assert len({tuple(map(len, rows)) for rows in timed}) == 1
    needs_all = np.mean([len(row) <= 200 for row in timed[0]])
    assert needs_all == pytest.approx(0.2, abs=0.02), "the depths are as in all rows"


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_costs_are_those_of_one_row(batch: int) -> None:
    """On a target that takes at most eight rows, and 36 tokens, at a time."""

    def time_exits(rows: int, tokens: int) -> list[float]:
        return [rows * seconds for seconds in (0.5, tokens)]

    limits = SimpleNamespace(max_batch=8, group_tokens=36)
    engine: Any = SimpleNamespace(core=SimpleNamespace(limits=limits, time_exits=time_exits))
    (model,) = measure_costs([engine], np.array([3, 9], np.intp), batch)
    assert model.seconds == ((0.5,) * len(model.lengths), model.lengths)


def test_engines_are_timed_in_turns() -> None:
    """So what slows the machine down for a while slows all of them."""
    turns: list[str] = []

    def engine(name: str) -> Any:
        def time_exits(rows: int, tokens: int) -> list[float]:
            turns.append(name)
            return [0.5]

        limits = SimpleNamespace(max_batch=8, group_tokens=36)
        return SimpleNamespace(core=SimpleNamespace(limits=limits, time_exits=time_exits))

    measure_costs([engine("a"), engine("b")], np.array([3, 9], np.intp), 8)
    assert "".join(turns).startswith("abbaab")
    assert turns.count("a") == turns.count("b")
