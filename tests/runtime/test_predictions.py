"""The tally, in which an application sees the exits of an engine's answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fpabee.runtime import Budget, Engine, FPabee, Tally

from ..doubles.calls import before

TEXTS = ["the film", "rain", "", "the " * 100]


@pytest.fixture
def engine(engines: Mapping[str, Path]) -> Iterator[Engine]:
    with Engine.load(engines["bert"], threads=1) as engine:
        yield engine


def test_answers_are_counted(engine: Engine) -> None:
    assert engine.tally == Tally((0, 0, 0))
    answers = engine.predict(TEXTS, rule=FPabee(threshold=0.3))
    list(engine.stream(TEXTS, rule=Budget(exit=1)))
    engine.trace(TEXTS)
    counts = [sum(a.exit == n for a in answers) for n in (1, 2, 3)]
    assert engine.tally == Tally((counts[0] + 4, counts[1], counts[2]), truncated=2)
    assert engine.tally.rows == 8
    assert sum(engine.tally.shares) == pytest.approx(1)
    assert engine.reset_tally().rows == 8
    assert engine.tally.rows == 0


def test_rows_that_a_deadline_stops_are_counted(engine: Engine) -> None:
    engine.predict(TEXTS, rule=FPabee(threshold=-1.0), deadline_ms=0)
    assert engine.tally == Tally((4, 0, 0), truncated=1, deadline_limited=4, deadline_missed=4)


def test_drift_from_an_operating_point(engine_copy: Callable[..., Path]) -> None:
    with Engine.load(engine_copy(default="fast", fast=Budget(exit=1)), threads=1) as engine:
        point = engine.manifest.targets[engine.target].operating_points["fast"]
        engine.predict(TEXTS)
        assert engine.tally.drift(point.exits) == 0
        engine.predict(TEXTS, rule=Budget(exit=3))
        assert engine.tally.drift(point.exits) == pytest.approx(0.5)
    assert Tally((1, 0)).drift((0, 7)) == pytest.approx(1)
    with pytest.raises(ValueError, match="expected 2 counts"):
        Tally((1, 0)).drift((1, 2, 3))


def test_threads_lose_no_row(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other threads may run before each sum.
    before(monkeypatch, Tally, "__add__", lambda *_: time.sleep(1e-4))
    with ThreadPoolExecutor(8) as pool:
        for _ in range(200):
            pool.submit(engine.predict, ["rain", "the " * 100], rule=Budget(exit=1))
    assert engine.tally == Tally((400, 0, 0), truncated=200)
