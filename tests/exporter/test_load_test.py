"""The load test of the server: every server answers every request, in all three ways."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fpabee.exporter import load_test
from fpabee.exporter.cli.bench import report_loads
from fpabee.exporter.load_test import BATCHES, SCHEDULER, THREADS, Load, run_load_test
from fpabee.runtime import Budget, Engine, OverloadedError


@pytest.fixture
def engine(engines: Mapping[str, Path]) -> Iterator[Engine]:
    with Engine.load(engines["bert"], rule=Budget(exit=2), threads=1) as engine:
        yield engine


@pytest.mark.slow
def test_every_request_is_answered(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_test, "capacity", lambda *_: 40.0)
    full, loads = run_load_test(engine, ["rain", ("a text", "a pair")], [0.5], 1.0)
    assert full == 40.0
    assert [load.server for load in loads] == [SCHEDULER, BATCHES, THREADS]
    assert [load.mean_layer for load in loads] == [2, 3, 2]
    for load in loads:
        assert load.answered == load.requests == loads[0].requests > 0  # the same ones
    # The last server has not added to the rows of the first two; the client asks once before.
    assert engine.tally.rows == loads[-1].requests + 1


def test_the_capacity_is_that_of_full_depth(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_test, "_CAPACITY_SECONDS", 0.01)
    run = Engine.run_encoded

    def checked(engine: Engine, rows: Any, rule: Any) -> Any:
        assert (len(rows), rule) == (32, Budget(exit=3))
        assert len({len(row) for row in rows}) == 2  # although the file is sorted by length
        return run(engine, rows, rule)

    monkeypatch.setattr(Engine, "run_encoded", checked)
    assert load_test.capacity(engine, ["rain"] * 32 + ["rain sun rain"] * 32) > 0


def test_batches_have_at_most_32_rows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_test, "_WINDOW_SECONDS", 60.0)  # ends when the server is closed
    sizes, run = [], Engine.run_encoded

    def counted(engine: Engine, rows: Any, rule: Any) -> Any:
        sizes.append(len(rows))
        return run(engine, rows, rule)

    monkeypatch.setattr(Engine, "run_encoded", counted)
    batches = load_test._Batches(engine, Budget(exit=3))
    futures = [batches.submit(row) for row in engine.encode(["a"] * 40)]
    batches.close()
    assert sizes == [32, 8]
    assert {future.result(0).exit for future in futures} == {3}


def test_a_batch_waits_from_the_arrival_of_its_first_row(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that has waited for the batch before it does not wait for more rows as well."""
    now = 0.0
    monkeypatch.setattr("fpabee.exporter.load_test.time.perf_counter", lambda: now)
    monkeypatch.setattr(load_test, "_WINDOW_SECONDS", 1000.0)
    begun, goes_on = threading.Event(), threading.Event()
    run = load_test._Batches._run

    def gated(batches: Any, rows: Any) -> Any:
        begun.set()
        assert goes_on.wait(20)
        return run(batches, rows)

    monkeypatch.setattr(load_test._Batches, "_run", gated)
    batches = load_test._Batches(engine, engine.rule)
    full = [batches.submit(row) for row in engine.encode(["rain"] * 32)]
    assert begun.wait(20)
    late = batches.submit(engine.encode(["sun"])[0])
    now = 1001.0
    goes_on.set()
    assert [answer.result(20).exit for answer in (*full, late)] == [2] * 33
    batches.close()


def test_a_full_queue_refuses(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_test, "_MOST_ROWS", 2)
    request = ["rain"], None, None, len

    async def ask(server: Any) -> list[Any]:
        asked = [server.classify(*request) for _ in range(3)]
        return await asyncio.gather(*asked, return_exceptions=True)

    for kind in (load_test._Batches, load_test._Threads):
        server = kind(engine, engine.rule)
        found = asyncio.run(ask(server))
        assert [isinstance(answer, OverloadedError) for answer in found] == [False, False, True]
        assert asyncio.run(server.classify(*request))[0].exit == 2
        server.close()


@pytest.mark.parametrize(
    ("seconds", "answered", "p99_ms", "sustainable", "shown"),
    [
        (300, 5, 999, True, "yes"),
        (299, 5, 999, None, "held for 299 s"),
        (300, 4, 999, False, "no"),
        (10, 5, 1000, False, "no"),
        (10, 0, float("nan"), False, "no"),
    ],
)
def test_sustainable_means_five_minutes(
    engine: Engine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    answered: int,
    p99_ms: float,
    sustainable: bool | None,
    shown: str,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    load = Load(SCHEDULER, 0.5, 1.0, seconds, 5, answered, 1.0, 1.0, 1.0, p99_ms, 1.0)
    report_loads(engine, 10.0, [load], as_json=True)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["loads"][0]["sustainable"] is sustainable
    report_loads(engine, 10.0, [load], as_json=False)
    assert shown in capsys.readouterr().out
