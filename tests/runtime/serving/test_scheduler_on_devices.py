"""The scheduler on a device, over a double: two groups are in flight, and answers stay the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fpabee.runtime import BackendError, Engine, ExitRule, FPabee
from fpabee.runtime.backends.device import DeviceExecution
from fpabee.runtime.serving import Scheduler

from ...doubles.calls import before
from ...doubles.clock import Clock
from ...doubles.device import SOME_STOP_FIRST, TEXTS, Double, run_through
from .test_scheduler import WAIT, results

NEVER = FPabee(threshold=-1.0)


@pytest.fixture
def made(double: Callable[..., Double]) -> Double:
    """At most four rows run together."""
    shapes: dict[str, Any] = {"batch_sizes": (1, 2, 4), "sequence_lengths": (8, 16, 64)}
    return double(batch=(1, 2, 4), **shapes)


@pytest.mark.parametrize("rule", [SOME_STOP_FIRST, FPabee(threshold=0.6, patience=2), NEVER])
def test_answers_are_those_of_the_cpu(rule: ExitRule, made: Double) -> None:
    texts = TEXTS * 4
    with made.load(rule=rule) as engine, Engine.load(made.folder) as usual:
        expected = usual.predict(texts, rule=rule)
        with Scheduler(engine) as scheduler:
            for _ in range(2):
                found = results([scheduler.submit(text) for text in texts])
                assert [answer.exit for answer in found] == [answer.exit for answer in expected]
                for answer, same in zip(found, expected, strict=True):
                    np.testing.assert_allclose(answer.probabilities, same.probabilities, atol=1e-5)
        assert engine.tally.rows == 2 * len(texts)
    assert made.nothing_is_left()


def test_the_device_runs_one_group_while_the_rule_judges_another(made: Double) -> None:
    with made.load(rule=NEVER) as engine, Scheduler(engine) as scheduler:
        for _ in range(3):
            made.cuda.idle = 0
            results(scheduler.submit_all(["rain"] * 8))
            assert made.cuda.idle == 1, "it is idle only when all rows are done"


def test_a_group_that_fails_while_another_runs(
    made: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object, hidden: Any) -> None:
        if hidden.segment == 1 and hidden.bucket.sequence == 64:
            raise BackendError("made up")

    with made.load(rule=NEVER) as engine, Scheduler(engine) as scheduler:
        expected = engine.predict(["rain"])
        before(monkeypatch, DeviceExecution, "enqueue", fail)
        long, *short = scheduler.submit_all(["rain " * 40, *["rain"] * 6])
        with pytest.raises(BackendError, match="made up"):
            long.result(WAIT)
        for answer in results(short):
            np.testing.assert_allclose(answer.probabilities, expected[0].probabilities, atol=1e-5)
    assert made.nothing_is_left()


def test_other_calls_of_the_engine_have_their_turn(made: Double) -> None:
    """Although the scheduler always has texts, and one call runs at a time."""
    is_busy = threading.Event()
    is_busy.set()

    def again(_: object) -> None:
        if is_busy.is_set():
            scheduler.submit("rain").add_done_callback(again)

    with made.load(rule=NEVER) as engine, Scheduler(engine) as scheduler:
        expected = engine.predict(TEXTS)
        for _ in range(12):
            again(None)
        with ThreadPoolExecutor(2) as pool:
            try:
                calls = [pool.submit(engine.predict, TEXTS) for _ in range(4)]
                answers = [call.result(WAIT) for call in calls]
            finally:
                is_busy.clear()
    assert [[each.exit for each in some] for some in answers] == [[e.exit for e in expected]] * 4


@pytest.fixture
def timed(made: Double, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, list[int]]]:
    """An engine on a device where a segment takes 1 ms, and the segments that were started."""
    clock = Clock()
    started: list[int] = []
    enqueue = DeviceExecution.enqueue

    def counts(execution: Any, hidden: Any) -> Any:
        started.append(hidden.segment + 1)
        outputs = enqueue(execution, hidden)
        return lambda: takes_time(outputs)

    def takes_time(outputs: Any) -> Any:
        clock.wait(1e-3)
        return outputs()

    monkeypatch.setattr(DeviceExecution, "enqueue", counts)
    with made.load(rule=NEVER) as engine:
        engine.core.clock = clock
        yield engine, started


@pytest.mark.parametrize(("deadline_ms", "exit_number"), [(2.4, 2), (10.0, 3)])
def test_a_deadline_counts_the_segment_that_runs(
    deadline_ms: float, exit_number: int, timed: tuple[Engine, list[int]]
) -> None:
    """A second segment is not started for a row that should be answered before."""
    engine, started = timed
    with Scheduler(engine) as scheduler:
        answer = scheduler.submit("rain", deadline_ms=deadline_ms).result(WAIT)
    assert (answer.exit, answer.deadline_limited) == (exit_number, exit_number < 3)
    assert not answer.deadline_missed
    assert started[-1] == exit_number


def test_a_deadline_counts_the_segments_of_other_groups(timed: tuple[Engine, list[int]]) -> None:
    """Two groups of four rows end segment 1 after 1 and 2 ms, and would end segment 2 after 3."""
    engine, started = timed
    answers = engine.predict(["rain"] * 8, deadline_ms=2.5)
    assert {(a.exit, a.deadline_limited, a.deadline_missed) for a in answers} == {(1, True, False)}
    assert started == [1, 1]


def test_a_segment_takes_the_time_since_the_one_before(timed: tuple[Engine, list[int]]) -> None:
    """Although it is started while that one runs."""
    engine, started = timed
    with engine.core.chain() as chain:
        run_through(engine, chain, ["rain"] * 8)
        assert chain.seconds == pytest.approx(1e-3)
    assert started == [1, 1, 2, 2, 3, 3]


def test_closing_while_segments_run(made: Double) -> None:
    with made.load(rule=NEVER) as engine:
        scheduler = Scheduler(engine)
        futures = [scheduler.submit(text) for text in TEXTS * 10]
        futures[0].result(WAIT)
        scheduler.close(cancel=True)
        assert all(future.done() for future in futures)
        assert scheduler._unanswered == 0
    assert made.nothing_is_left()
