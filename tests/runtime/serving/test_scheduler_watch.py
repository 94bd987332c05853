"""Rows that are watched: answered at their exit, they run on after all others, without a caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fpabee.runtime import BackendError, Budget, Engine
from fpabee.runtime.backends.host import HostBackend
from fpabee.runtime.serving import Scheduler
from fpabee.runtime.serving.metrics import Metrics
from fpabee.runtime.watch import MOST_WAITING

from ...doubles.calls import spoil_logits
from ..running import until
from ..test_engine import TEXTS
from ..watching import count_changes, watched_by
from .test_scheduler import WAIT, Gate, counted, gate, results

__all__ = ["gate"]
SHALLOW = Budget(exit=1)


@pytest.fixture
def engine(promised: Callable[..., Path]) -> Iterator[Engine]:
    """It watches all rows."""
    with Engine.load(promised(early=SHALLOW), watch=100.0) as engine:
        yield engine


def idle(scheduler: Scheduler) -> None:
    """Wait until nothing runs: a text with a deadline is not watched, and is answered last."""
    watch = scheduler._core.watch
    assert watch is not None
    for _ in range(1000):
        if not watch._waiting:
            return
        scheduler.submit("rain", deadline_ms=1e6).result(WAIT)
    pytest.fail("watched rows are never done")


def test_answers_are_those_of_predict_and_are_compared(watching: Engine) -> None:
    metrics = Metrics(watching)
    full_depth = watching.predict(TEXTS, full_depth=True)
    expected = [watching.predict([text])[0] for text in TEXTS]
    before = watched_by(watching)
    tally = watching.tally
    with Scheduler(watching, metrics=metrics) as scheduler:
        found = results([scheduler.submit(text) for text in TEXTS])
        idle(scheduler)
    assert [answer.exit for answer in found] == [answer.exit for answer in expected]
    assert [answer.labels for answer in found] == [answer.labels for answer in expected]
    watched = watched_by(watching)
    assert watched.rows == before.rows + len(TEXTS)
    changed = count_changes(found, full_depth)
    assert watched.changed_answers == before.changed_answers + changed
    others = watching.tally.rows - tally.rows - len(TEXTS)  # those that `idle` sent
    assert counted(metrics, "answer_seconds_count") == len(TEXTS) + others
    assert counted(metrics, "queue_seconds_count") == len(TEXTS) + others


@pytest.mark.parametrize("joins", [False, True])
def test_watched_rows_run_after_all_others(
    joins: bool, engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostBackend, "joins", joins)
    with Scheduler(engine) as scheduler:
        first = scheduler.submit("the plot")
        assert gate.at() == (0, 1)
        gate.step()
        assert gate.at() == (1, 1)
        assert first.result(WAIT).exit == 1, "it does not wait for full depth"
        others = [scheduler.submit("rain"), scheduler.submit("the sun", max_exit=2)]
        gate.step()
        for _ in range(2):
            segment, _ = gate.at()
            assert segment == 0
            gate.step()
            if all(other.done() for other in others):
                break
        rows = []
        for _ in range(20):
            segment, count = gate.at()
            rows.append((segment, count))
            gate.step()
            if segment == 2 and sum(count for number, count in rows if number == 2) == 2:
                break
        assert results(others)[0].exit == 1
    assert watched_by(engine).rows == 2
    # On a device, a row waits for others before the same segment.
    assert ((2, 2) in rows) == joins


def test_no_coin_is_tossed_while_many_rows_wait(engine: Engine, gate: Gate) -> None:
    with Scheduler(engine) as scheduler:
        first = scheduler.submit_all(["rain"] * MOST_WAITING)
        assert gate.at() == (0, MOST_WAITING)
        gate.step()
        assert gate.at() == (1, MOST_WAITING)
        assert {answer.exit for answer in results(first)} == {1}
        assert watched_by(engine).is_paused
        others = scheduler.submit_all(["rain"] * 3)
        gate.open()
        assert {answer.exit for answer in results(others)} == {1}
        idle(scheduler)
        assert watched_by(engine).rows == MOST_WAITING
        assert not watched_by(engine).is_paused


def test_a_row_whose_client_left_is_watched_all_the_same(engine: Engine, gate: Gate) -> None:
    with Scheduler(engine) as scheduler:
        first = scheduler.submit("the plot")
        assert gate.at() == (0, 1)
        left = scheduler.submit("rain")
        assert left.cancel()
        gate.open()
        assert first.result(WAIT).exit == 1
        idle(scheduler)
        assert watched_by(engine).rows == 2
        assert engine.tally.exits[0] >= 1
        assert scheduler._unanswered == 0


@pytest.mark.parametrize("cancel", [False, True])
def test_closing_does_not_wait_for_watched_rows(cancel: bool, engine: Engine, gate: Gate) -> None:
    scheduler = Scheduler(engine)
    answer = scheduler.submit("the plot")
    assert gate.at() == (0, 1)
    gate.step()
    assert gate.at() == (1, 1)
    assert answer.result(WAIT).exit == 1
    scheduler._closed = True  # before the segment ends
    gate.step()
    scheduler.close(cancel)
    assert gate.begun == [(0, 1), (1, 1)]
    assert watched_by(engine).rows == 0
    gate.open()
    engine.predict(["rain"])
    assert watched_by(engine).rows == 1, "rows that are lost hold up no others"
    assert not engine.core.backend._idle[0]._taken


def test_cancelling_all_rows_loses_those_that_are_watched(engine: Engine, gate: Gate) -> None:
    scheduler = Scheduler(engine)
    first = scheduler.submit("the plot")
    assert gate.at() == (0, 1)
    second = scheduler.submit("rain")
    scheduler._cancels = True
    scheduler._closed = True
    gate.open()
    scheduler.close(cancel=True)
    assert second.cancelled()
    assert first.done()
    engine.predict(["rain"])
    assert watched_by(engine).rows == 1


@pytest.mark.parametrize("segment", [0, 2])
def test_a_failure_loses_its_rows_only(
    segment: int, engine: Engine, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    gate.is_open = True
    with Scheduler(engine) as scheduler:
        gate.fail_at(segment)
        lost = scheduler.submit("the plot")
        if segment == 0:
            with pytest.raises(BackendError, match="made up"):
                lost.result(WAIT)
        else:
            assert lost.result(WAIT).exit == 1
            until(lambda: "watched rows failed" in caplog.text)
        gate.fails_no_more()
        assert scheduler.submit("rain").result(WAIT).exit == 1
        idle(scheduler)
        assert watched_by(engine).rows == 1


def test_a_failure_of_other_rows_loses_no_watched_rows(engine: Engine, gate: Gate) -> None:
    with Scheduler(engine) as scheduler:
        answer = scheduler.submit("the plot")
        assert gate.at() == (0, 1)
        gate.step()
        assert gate.at() == (1, 1)
        assert answer.result(WAIT).exit == 1
        gate.fail_at(0)
        lost = scheduler.submit("rain")
        gate.open()
        with pytest.raises(BackendError, match="made up"):
            lost.result(WAIT)
        gate.fails_no_more()
        idle(scheduler)
        assert watched_by(engine).rows == 1


def test_rows_without_numbers_at_full_depth_hold_up_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scheduler(engine) as scheduler:
        with monkeypatch.context() as patch:
            spoil_logits(patch, slice(None), at_exit=3)
            assert scheduler.submit("the plot").result(WAIT).exit == 1
            idle(scheduler)
        scheduler.submit("rain").result(WAIT)
        idle(scheduler)
        assert watched_by(engine).rows == 1


def test_a_row_counts_for_the_point_by_which_it_ran(
    promised: Callable[..., Path], gate: Gate
) -> None:
    folder = promised(early=SHALLOW, later=Budget(exit=2))
    with Engine.load(folder, watch=100.0) as engine, Scheduler(engine) as scheduler:
        answer = scheduler.submit("rain")
        assert gate.at() == (0, 1)
        engine.use("later")
        gate.open()
        assert answer.result(WAIT).exit == 1
        idle(scheduler)
        assert watched_by(engine).rows == 0
        engine.use("early")
        assert watched_by(engine).rows == 1


def test_full_depth_costs_nothing(promised: Callable[..., Path]) -> None:
    folder = promised(early=Budget(exit=3))
    with Engine.load(folder, watch=100.0) as engine, Scheduler(engine) as scheduler:
        assert {answer.exit for answer in results(scheduler.submit_all(TEXTS))} == {3}
        assert (watched_by(engine).rows, watched_by(engine).changed_answers) == (len(TEXTS), 0)
