"""Measured times of the exits and speed-ups; expected losses, and where labels count more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fpabee.calibration.costs import (
    CostModel,
    estimated,
    expected_losses,
    fit_temperature,
    measure_costs,
    measure_speedup,
    observed_losses,
    time_in_turns,
)
from fpabee.calibration.scoring import METRICS, LabelledLogits, Scorer
from fpabee.runtime import Budget, Engine, ProblemType
from fpabee.runtime.artifact.exits import Exits

from ..conftest import CLASSIFICATION
from .conftest import make_rows, with_costs


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


def test_ways_to_run_a_unit_take_turns() -> None:
    calls: list[str] = []
    runs = [lambda unit: calls.append(unit + "a"), lambda unit: calls.append(unit + "b")]
    assert time_in_turns(["1", "2"], runs, turns=2).shape == (2, 2, 2)
    assert calls == ["1a", "1b", "2a", "2b", "1b", "1a", "2b", "2a"]


def test_a_speedup_that_the_layers_do_not_explain_is_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rule runs two of six layers, so it is at most three times as fast."""
    timed: list[list[range]] = []
    passes = iter([[9.0, 1.0], [2.0, 1.0], [2.0, 1.0]])

    def turns(units: Any, runs: Any, count: int) -> Any:
        timed.append([row for unit in units for row in unit])
        return np.tile(next(passes), (count, len(units), 1))

    monkeypatch.setattr("fpabee.calibration.costs.time_in_turns", turns)
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
    assert turns == ["a", "b"] * (len(turns) // 2)


def calibrated(problem_type: ProblemType, rows: int, scale: float) -> LabelledLogits:
    """Rows whose last exit has true probabilities, before its logits are scaled."""
    generator = np.random.default_rng(5)
    logits = generator.normal(scale=2, size=(4, rows, 3))
    last = logits[-1]
    if problem_type is ProblemType.SINGLE_LABEL:
        p = np.exp(last) / np.exp(last).sum(axis=1, keepdims=True)
        truth = (generator.random((rows, 1)) < p.cumsum(axis=1)).argmax(axis=1)
    else:
        truth = (generator.random(last.shape) < 1 / (1 + np.exp(-last))).astype(np.int64)
    scaled = (logits * scale).astype(np.float32)
    return LabelledLogits(scaled, np.full(rows, 9, np.intp), truth, problem_type)


@pytest.mark.parametrize("task", CLASSIFICATION)
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_expected_losses_are_right_on_average_at_any_temperature(
    task: ProblemType, scale: float
) -> None:
    rows = calibrated(task, 20_000, scale)
    assert fit_temperature(rows) == pytest.approx(scale, rel=0.07)
    scorer = Scorer(rows, METRICS[task][0])
    expected = expected_losses(scorer)
    observed = observed_losses(scorer)
    np.testing.assert_allclose(expected.mean(axis=1), observed.mean(axis=1), atol=0.012)
    # Their purpose: the same mean from fewer rows.
    assert (expected[:-1].std(axis=1) < 0.8 * observed[:-1].std(axis=1)).all()


def test_the_expected_loss_stands_unless_labels_differ_by_more_than_chance() -> None:
    # Of 1,000 rows, 10 were expected to be lost: 14 may be chance, 60 are not.
    expected = np.where(np.arange(1000) < 20, 0.5, 0.0)
    numbers = np.arange(1000) - 100
    observed = np.stack([(numbers >= 0) & (numbers < n) for n in (14, 60)]).astype(float)
    found = estimated(observed, np.stack([expected, expected]))
    assert found[0] == pytest.approx(0.010)
    assert found[1] == pytest.approx(0.060 - 0.0081, abs=5e-4), "less the standard error"


@pytest.mark.parametrize("metric", ["agreement", "macro_f1", "matthews"])
def test_drops_of_other_metrics_are_those_of_the_rows(metric: str) -> None:
    rows = make_rows(count=200)
    costs = with_costs(rows, metric)
    for exits in np.random.default_rng(0).integers(1, 7, (3, 200)):
        drop = costs.scorer.full_depth - costs.scorer.score(exits)
        expected = drop if metric == "agreement" else max(drop, with_costs(rows).drop(exits))
        assert costs.drop(exits) == pytest.approx(expected, abs=1e-12)
        assert costs.mean_cost(exits) == pytest.approx(exits.mean())


def test_what_exit_0_makes_of_both_answers_counts() -> None:
    # Exit 0 differs from the last exit on every row. It is right where it is sure of its answer,
    # and wrong where it is not; the last exit is equally sure of all rows.
    sure = np.arange(400) % 2 == 0
    truth = np.where(sure, 1, 0)
    exit_0 = np.stack([np.zeros(400), np.where(sure, 4.0, 0.2)], axis=-1)
    last = np.tile([2.0, 0.0], (400, 1))
    logits = np.stack([exit_0, last]).astype(np.float32)
    lengths = np.full(400, 9, np.intp)
    rows = LabelledLogits(logits, lengths, truth, ProblemType.SINGLE_LABEL, (), 0)
    expected = expected_losses(Scorer(rows, "accuracy"))
    assert expected[0][sure].mean() < -0.7
    assert expected[0][~sure].mean() > 0.7
