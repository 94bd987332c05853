"""Queries take turns: a small one does not wait for a large one, and answers stay the same."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from fpabee.runtime import Engine, Ranked
from fpabee.runtime.backends.host import HostBackend
from fpabee.runtime.serving import Scheduler
from fpabee.runtime.tasks.ranked import pairs_of

from ..running import until
from ..test_ranking import QUERY, RULE, WITH_SCORES, documents, exits_of
from .test_scheduler import WAIT, Gate, gate

__all__ = ["gate"]
# At most 1024 tokens run together: 16 rows of 64 tokens, or 20 rows of 50.
LARGE = ["rain " * 43] * 60
MIDDLE = ["rain " * 80] * 16
SMALL = ["rain"] * 2
Asked = Future[list[Ranked]]


@pytest.fixture
def engine(ranking_engines: Mapping[str, Path]) -> Iterator[Engine]:
    """It runs all layers."""
    with Engine.load(ranking_engines["bert"]) as engine:
        yield engine


@pytest.fixture
def ask() -> Iterator[Callable[[Scheduler, Sequence[str]], Asked]]:
    """Submits a query, and returns when it waits for the worker."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def ask(scheduler: Scheduler, some: Sequence[str]) -> Asked:
        before = len(scheduler._tokens)
        asked = asyncio.run_coroutine_threadsafe(scheduler.rank(QUERY, some, all=True), loop)
        until(lambda: len(scheduler._tokens) >= before + len(some))
        return asked

    yield ask
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT)
    loop.close()


Ask = Callable[[Scheduler, Sequence[str]], Asked]


def steps(gate: Gate, count: int) -> list[tuple[int, int]]:
    """The next segments that the worker runs, and their rows."""
    begun = []
    for _ in range(count):
        gate.step()
        begun.append(gate.at())
    return begun


def test_a_small_query_does_not_wait_for_a_large_one(engine: Engine, gate: Gate, ask: Ask) -> None:
    with Scheduler(engine) as scheduler:
        large = ask(scheduler, LARGE)
        assert gate.at() == (0, 20)
        small = ask(scheduler, SMALL)
        assert steps(gate, 4) == [(0, 2), (1, 2), (2, 2), (0, 20)]
        assert len(small.result(WAIT)) == 2
        assert not large.done()
        gate.open()
        assert len(large.result(WAIT)) == 60


def test_every_second_turn_belongs_to_the_oldest_query(
    engine: Engine, gate: Gate, ask: Ask
) -> None:
    """So it goes on however many others arrive, and passes each exit as a whole."""
    with Scheduler(engine) as scheduler:
        asked = [ask(scheduler, LARGE)]
        assert gate.at() == (0, 20)
        asked += [ask(scheduler, MIDDLE) for _ in range(2)]
        begun = steps(gate, 12)
        assert begun[::2] == [(0, 16), (1, 16), (2, 16)] * 2
        assert begun[1::2] == [(0, 20), (0, 20), (1, 20), (1, 20), (1, 20), (2, 20)]
        gate.open()
        assert [len(each.result(WAIT)) for each in asked] == [60, 16, 16]


def test_equal_queries_run_in_the_order_of_their_arrival(
    engine: Engine, gate: Gate, ask: Ask
) -> None:
    with Scheduler(engine) as scheduler:
        first = ask(scheduler, MIDDLE)
        gate.at()
        second = ask(scheduler, MIDDLE)
        assert steps(gate, 3) == [(1, 16), (2, 16), (0, 16)]
        first.result(WAIT)
        gate.open()
        second.result(WAIT)


@pytest.mark.parametrize("fits", [True, False])
def test_what_runs_beside_the_oldest_query_needs_little_memory(
    fits: bool, engine: Engine, gate: Gate, ask: Ask
) -> None:
    core = engine.core
    sizes = [core.query_bytes(core.encode(pairs_of(QUERY, some))) for some in (MIDDLE, SMALL)]
    core.window_bytes = sum(sizes) - (not fits)
    with Scheduler(engine) as scheduler:
        asked = [ask(scheduler, LARGE)]
        gate.at()
        asked.append(ask(scheduler, MIDDLE))
        assert steps(gate, 2) == [(0, 16), (0, 20)]
        asked.append(ask(scheduler, SMALL))
        assert steps(gate, 1) == [(0, 2) if fits else (1, 16)]
        gate.open()
        assert [len(each.result(WAIT)) for each in asked] == [60, 16, 2]


@pytest.mark.parametrize("has_exit_0", [False, True])
@pytest.mark.usefixtures("as_on_devices")
def test_answers_are_those_of_the_engine(
    has_exit_0: bool,
    ranking_engines: Mapping[str, Path],
    first_stage_engines: Mapping[str, Path],
    ask: Ask,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a device, documents of several queries share groups, and two are in flight."""
    sets = [documents(count, seed) for seed, count in enumerate((130, 40, 3, 90, 12, 1, 0))]
    folders = first_stage_engines if has_exit_0 else ranking_engines
    with Engine.load(folders["bert"], rule=WITH_SCORES if has_exit_0 else RULE) as engine:
        limits = dataclasses.replace(engine.core.limits, group_tokens=256)
        monkeypatch.setattr(engine.core, "limits", limits)
        alone = [engine.rank(QUERY, some, all=True) for some in sets]
        with Scheduler(engine) as scheduler:
            asked = [ask(scheduler, some) for some in sets]
            gate.open()
            served = [each.result(WAIT) for each in asked]
        assert engine.tally.rows == 2 * sum(map(len, sets))
    for some, other in zip(alone, served, strict=True):
        assert exits_of(some) == exits_of(other)
        assert [each.index for each in some] == [each.index for each in other]


def test_a_query_that_is_cancelled_between_its_groups(engine: Engine, gate: Gate, ask: Ask) -> None:
    with Scheduler(engine) as scheduler:
        large = ask(scheduler, LARGE)
        assert gate.at() == (0, 20)
        middle = ask(scheduler, MIDDLE)
        assert steps(gate, 2) == [(0, 16), (0, 20)]
        large.cancel()
        until(lambda: scheduler._unanswered == 16)
        assert steps(gate, 2) == [(1, 16), (2, 16)]
        gate.open()
        assert len(middle.result(WAIT)) == 16
        assert scheduler._unanswered == 0
    assert not engine.core.backend.check_out()._taken


@pytest.mark.parametrize("cancel", [False, True])
def test_closing_while_queries_take_turns(
    cancel: bool, engine: Engine, gate: Gate, ask: Ask
) -> None:
    scheduler = Scheduler(engine)
    asked = [ask(scheduler, LARGE)]
    gate.at()
    asked += [ask(scheduler, MIDDLE), ask(scheduler, SMALL)]
    steps(gate, 1)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(scheduler.close, cancel)
        until(lambda: scheduler.is_closed)
        gate.open()
        closing.result(WAIT)
    for each, some in zip(asked, (LARGE, MIDDLE, SMALL), strict=True):
        if cancel:
            with pytest.raises(CancelledError):
                each.result(WAIT)
        else:
            assert len(each.result(WAIT)) == len(some)
    assert scheduler._unanswered == 0


def test_another_call_of_the_engine_has_its_turn_before_the_next_query(
    engine: Engine, gate: Gate, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one call runs at a time, as on a device."""
    monkeypatch.setattr(HostBackend, "most_executions", 1)
    with Scheduler(engine) as scheduler, ThreadPoolExecutor(1) as pool:
        asked = [ask(scheduler, LARGE)]
        assert gate.at() == (0, 20)
        ranked = pool.submit(engine.rank, QUERY, ["rain"] * 3)
        until(lambda: engine.core.backend.is_awaited)
        asked.append(ask(scheduler, MIDDLE))
        large = [(segment, 20) for segment in (0, 0, 1, 1, 1, 2, 2, 2)]
        assert steps(gate, 9) == [*large, (0, 16)]
        assert len(ranked.result(WAIT)) == 3
        gate.open()
        assert [len(each.result(WAIT)) for each in asked] == [60, 16]
