"""The scheduler: answers are those of `predict`, each at its exit, whatever happens to others."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from msgspec.structs import replace

from fpabee.runtime import (
    BackendError,
    Budget,
    Confidence,
    Engine,
    Entropy,
    ExitRule,
    FPabee,
    InputError,
    OverloadedError,
    Pabee,
    Prediction,
    RuleError,
)
from fpabee.runtime.backends.host import HostBackend, HostExecution
from fpabee.runtime.chain.chain import Chain
from fpabee.runtime.chain.groups import Group
from fpabee.runtime.encoding import Text
from fpabee.runtime.serving import Scheduler
from fpabee.runtime.serving import scheduler as scheduler_module
from fpabee.runtime.serving.metrics import Metrics

from ...child_process import Ended, Report, forked
from ...closeness import assert_probabilities, exits_may_differ
from ...doubles.calls import before, spoil_logits
from ...doubles.clock import Clock
from ..test_engine import TEXTS

NEVER = FPabee(threshold=-1.0)
RULES: tuple[ExitRule, ...] = (
    FPabee(threshold=1.2),
    FPabee(threshold=3.0, patience=2),
    Pabee(patience=1, exit_0_threshold=2.0),  # exit 1 is compared with exit 0
    Entropy(threshold=1.1),
    Confidence(threshold=0.55, exit_0_threshold=0.6),
    Budget(exit=2),
)
WAIT = 20


def in_milliseconds(chain: Chain, groups: Sequence[Group]) -> float:
    """As `Chain.soon`, if each segment takes 1 ms."""
    return chain.clock() + (len(chain.running) + len(groups)) * 1e-3


class Gate:
    """Holds the worker before each segment until it is opened, and counts segments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[tuple[int, int]] = []  # segment, rows
        self.steps = threading.Semaphore(0)
        self.arrived = threading.Semaphore(0)
        self.is_open = False
        self.fails: Callable[[int, Any], None]
        self.fails_no_more()

        def wait(_: object, hidden: Any) -> None:
            segment = hidden.segment
            is_scheduler = threading.current_thread().name == "fpabee scheduler"
            if is_scheduler:
                self.begun.append((segment, hidden.rows))
            if is_scheduler and not self.is_open:
                self.arrived.release()
                self.is_open = not self.steps.acquire(timeout=2 * WAIT)  # a test has failed
            self.fails(segment, hidden)

        before(monkeypatch, HostExecution, "enqueue", wait)
        monkeypatch.setattr(Chain, "soon", in_milliseconds)

    def at(self) -> tuple[int, int]:
        """Wait until the worker is before a segment; returns it, and its rows."""
        assert self.arrived.acquire(timeout=WAIT)
        return self.begun[-1]

    def step(self) -> None:
        """Let the worker run the segment that it is before."""
        self.steps.release()

    def fail_at(self, failing: int) -> None:
        """Let a segment fail for all rows."""

        def fail(segment: int, _: object) -> None:
            if segment == failing:
                raise BackendError("made up")

        self.fails = fail

    def fails_no_more(self) -> None:
        self.fails = lambda segment, hidden: None

    def open(self) -> None:
        self.is_open = True
        self.steps.release(1000)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def engine(engines: Mapping[str, Path]) -> Iterator[Engine]:
    with Engine.load(engines["bert"], rule=NEVER) as engine:
        yield engine


@pytest.fixture
def clock(engine: Engine) -> Clock:
    engine.core.clock = clock = Clock()
    return clock


def results(futures: Sequence[Future[Prediction]]) -> list[Prediction]:
    return [future.result(WAIT) for future in futures]


def check_same(
    engine: Engine, texts: Sequence[Text], found: Sequence[Prediction], rule: ExitRule
) -> None:
    """Answers are those of `predict`, unless a score is within tolerance of its threshold."""
    logits = np.concatenate([engine.trace([text]).logits for text in texts], axis=1)
    first = engine.manifest.exits[0]
    near = exits_may_differ(logits, rule, engine.manifest.task, first)
    assert near.mean() < 0.1
    for text, answer, is_near in zip(texts, found, near, strict=True):
        (expected,) = engine.predict([text])
        if not is_near:
            assert (answer.exit, answer.labels, answer.truncated) == (
                expected.exit,
                expected.labels,
                expected.truncated,
            )
            assert_probabilities(answer.probabilities, expected)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize("joins", [False, True])
def test_answers_are_those_of_predict(
    family: str,
    rule: ExitRule,
    joins: bool,
    engines: Mapping[str, Path],
    exit_0_engines: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(HostBackend, "joins", joins)
    folder = (exit_0_engines if rule.exit_0_threshold else engines)[family]
    with Engine.load(folder, rule=rule) as engine:
        with Scheduler(engine) as scheduler:
            found = results([scheduler.submit(text) for text in TEXTS * 2])
        assert engine.tally.rows == len(found)
        check_same(engine, TEXTS * 2, found, rule)
        assert scheduler._unanswered == 0


def test_a_row_is_answered_while_deeper_rows_still_run(engine: Engine, gate: Gate) -> None:
    with Scheduler(engine) as scheduler:
        shallow = scheduler.submit("the film", max_exit=1)
        deep = scheduler.submit("the plot")
        assert gate.at()[0] == 0
        gate.step()
        segment, _ = gate.at()
        while segment == 0:  # the two may not have arrived together
            gate.step()
            segment, _ = gate.at()
        assert shallow.result(WAIT).exit == 1
        assert not deep.done()
        gate.open()
        assert deep.result(WAIT).exit == 3


@pytest.mark.parametrize(
    ("joins", "window_bytes", "texts", "segments"),
    [
        (True, 2**20, ["the plot", "rain"], [(0, 2), (1, 3), (2, 3)]),
        (True, 2**20, ["the plot"], [(1, 1), (2, 1), (0, 1)]),  # as many tokens, further to go
        (True, 1, ["the plot", "rain"], [(1, 1), (2, 1), (0, 2)]),
        (False, 2**20, ["the plot", "rain"], [(1, 1), (2, 1), (0, 2)]),
    ],
)
def test_new_rows_join_on_a_device_and_nearly_finished_rows_come_first_on_a_cpu(
    joins: bool,
    window_bytes: int,
    texts: list[Text],
    segments: list[tuple[int, int]],
    engine: Engine,
    gate: Gate,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All rows have the same age; a row that is much older would not wait for others."""
    monkeypatch.setattr(HostBackend, "joins", joins)
    engine.core.window_bytes = window_bytes
    with Scheduler(engine) as scheduler:
        futures = [scheduler.submit("the film")]
        assert gate.at() == (0, 1)
        futures += scheduler.submit_all(texts)
        clock.now = 1.0
        for expected in segments:
            gate.step()
            assert gate.at() == expected
        gate.open()
        assert {answer.exit for answer in results(futures)} == {3}


def test_rows_of_different_rules_share_no_group(
    engine_copy: Callable[..., Path], gate: Gate
) -> None:
    folder = engine_copy(deep=NEVER, two=Entropy(threshold=10.0, min_exit=2))
    with Engine.load(folder, operating_point="deep") as engine, Scheduler(engine) as scheduler:
        engine.core.clock = Clock()
        deep = [scheduler.submit("rain")]
        assert gate.at() == (0, 1)
        deep.append(scheduler.submit("sun"))
        engine.use("two")
        # The first is urgent, so it meets the row of the other rule before segment 2; the second
        # waits beside a row of the other rule.
        two = [scheduler.submit("rain", deadline_ms=1.5)]
        gate.step()
        assert gate.at() == (0, 1)
        two.append(scheduler.submit("rain"))
        gate.step()
        assert gate.at() == (1, 1)
        gate.open()
        assert [answer.exit for answer in results([*deep, *two])] == [3, 3, 2, 2]


def test_texts_of_other_lengths_run_in_other_groups(engine: Engine, gate: Gate) -> None:
    with Scheduler(engine) as scheduler:
        first = scheduler.submit("rain")
        gate.at()
        futures = scheduler.submit_all([*["the film " * 30] * 20, *["rain"] * 19])
        gate.open()
        results([first, *futures])
    # 62 tokens in a long row, and at most 1024 in a group.
    assert sorted(rows for segment, rows in gate.begun if segment == 0) == [1, 4, 16, 19]


@pytest.mark.usefixtures("joins", "clock")
def test_rows_of_different_rules_are_not_joined(engine: Engine, gate: Gate) -> None:
    with Scheduler(engine) as scheduler:
        deep = scheduler.submit("rain")
        assert gate.at() == (0, 1)
        # It is urgent, so it runs although the other row is nearer to its end.
        two = scheduler.submit("rain", deadline_ms=1.5, max_exit=2)
        gate.step()
        assert gate.at() == (0, 1)
        gate.step()  # now both are before segment 2
        assert gate.at() == (1, 1)
        gate.open()
        assert [answer.exit for answer in results([two, deep])] == [2, 3]


def test_requests_take_turns(engine: Engine, gate: Gate) -> None:
    """They start 1024 tokens in a round, which are 16 of the long texts."""
    answered: list[str] = []
    futures: list[Future[Prediction]] = []

    def submit(name: str, texts: list[Text]) -> None:
        for future in scheduler.submit_all(texts):
            future.add_done_callback(lambda _: answered.append(name))
            futures.append(future)

    with Scheduler(engine) as scheduler:
        submit("first", ["sun"])
        assert gate.at() == (0, 1)
        submit("a", ["the film " * 31] * 40)
        submit("b", ["the plot " * 31] * 40)
        submit("short", ["rain"])
        gate.step()
        while gate.at() != (0, 1):
            gate.step()
        submit("late", ["rain"])
        gate.open()
        results(futures)
    order = [name for name, _ in groupby(answered)]
    assert order == ["first", "a", "b", "short", "a", "b", "late", "a", "b"]


def test_cancelled_rows_leave(engine: Engine, gate: Gate) -> None:
    with Scheduler(engine) as scheduler:
        running = scheduler.submit_all(["the film", "the plot"])
        assert gate.at() == (0, 2)
        waiting = scheduler.submit("rain")
        assert running[0].cancel()
        assert waiting.cancel()
        assert scheduler._unanswered == 1
        gate.step()
        assert gate.at() == (1, 1)
        gate.open()
        assert running[1].result(WAIT).exit == 3
        with pytest.raises(CancelledError):
            running[0].result(WAIT)
    assert engine.tally.rows == 1


def test_a_full_queue_refuses_and_recovers(engine: Engine, gate: Gate) -> None:
    with Scheduler(engine, max_rows=3) as scheduler:
        futures = scheduler.submit_all(["a", "b"])
        gate.at()
        with pytest.raises(OverloadedError, match="2 of at most 3 rows are unanswered, and 2 more"):
            scheduler.submit_all(["c", "d"])
        futures.append(scheduler.submit("c"))
        with pytest.raises(OverloadedError):
            scheduler.submit("d")
        gate.open()
        results(futures)
        assert scheduler.submit("d").result(WAIT).exit == 3


def test_many_tokens_also_fill_the_queue(
    engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "_TOKENS_OF_A_ROW", 4)
    metrics = Metrics(engine)
    with Scheduler(engine, 20, metrics) as scheduler:
        futures = scheduler.submit_all(["the film " * 30, "the plot " * 20])
        with pytest.raises(OverloadedError, match="have 104 tokens, expected fewer than 80"):
            scheduler.submit_all(["a", "b"])
        with pytest.raises(OverloadedError):
            asyncio.run(scheduler.classify(["a", "b"]))
        assert counted(metrics, "refused_rows_total") == 4
        assert scheduler._unanswered == 2
        assert futures[0].cancel()
        futures[0] = scheduler.submit("a")
        gate.open()
        results(futures)
        assert scheduler._tokens == {}
    assert engine.tally.rows == 2, "those that were refused ran"


def test_callers_at_the_same_time_do_not_take_the_same_room(engine: Engine, gate: Gate) -> None:
    class Most(int):
        """Lets another caller in while a caller looks how many rows there may be."""

        def __lt__(self, other: int) -> bool:
            if not others:
                others.append(pool.submit(scheduler.submit, "b"))
                wait(others, timeout=0.5)  # in vain, since it has to wait itself
            return super().__lt__(other)

    others: list[Future[Future[Prediction]]] = []
    with Scheduler(engine) as scheduler, ThreadPoolExecutor(1) as pool:
        scheduler._most = Most(1)
        first = scheduler.submit("a")
        with pytest.raises(OverloadedError):
            others[0].result(WAIT)
        gate.open()
        results([first])


def test_texts_count_while_they_are_tokenized(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long texts of several requests are tokenized one after another."""
    goes_on = threading.Event()
    calls = list[str]()

    def wait(_: object) -> None:
        calls.append("begins")
        goes_on.wait(WAIT)
        calls.append("ends")

    async def several(scheduler: Scheduler) -> None:
        long = "the film " * 10_000
        requests: list[list[Text]] = [[long, "rain"], [long, "\ud800"], [long]]
        first, bad, left = (asyncio.ensure_future(scheduler.classify(each)) for each in requests)
        while not calls:
            await asyncio.sleep(0.01)
        assert scheduler._unanswered == 5
        with pytest.raises(OverloadedError):
            await scheduler.classify(["a"])
        left.cancel()
        await asyncio.wait([left])
        assert scheduler._unanswered == 4
        goes_on.set()
        assert [answer.exit for answer in await first] == [3, 3]
        with pytest.raises(InputError):
            await bad
        assert scheduler._unanswered == 0

    before(monkeypatch, engine.core, "encode", wait)
    with Scheduler(engine, max_rows=5) as scheduler:
        asyncio.run(several(scheduler))
    assert calls == ["begins", "ends"] * 2


def test_a_scheduler_that_closes_while_texts_are_tokenized(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = Scheduler(engine)
    before(monkeypatch, engine.core, "encode", lambda _: scheduler.close())
    with pytest.raises(BackendError, match="closed"):
        scheduler.submit("a")
    assert scheduler._unanswered == 0


# Python 3.12 and later warn of forks, since what this test is about can happen.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_gets_an_error(engine: Engine) -> None:
    """At once, also if another thread held the lock at the time of the fork."""

    def child(report: Report) -> None:
        with pytest.raises(BackendError, match=r"this scheduler .* forked.* -> .*load an engine"):
            scheduler.submit("rain")
        with pytest.raises(BackendError, match="forked"):
            asyncio.run(scheduler.classify(["rain"]))
        scheduler.close()
        report("closed")

    with Scheduler(engine) as scheduler, ThreadPoolExecutor(1) as another_thread:
        another_thread.submit(scheduler._lock.acquire).result()
        ended = forked(child, WAIT)
        another_thread.submit(scheduler._lock.release).result()
        assert ended == Ended(["closed"], "")
        assert scheduler.submit("rain").result(WAIT).exit == 3


def test_closing_answers_what_was_submitted(engine: Engine) -> None:
    scheduler = Scheduler(engine)
    futures = [scheduler.submit(text) for text in TEXTS]
    scheduler.close()
    assert all(future.done() for future in futures)
    assert [future.result(WAIT).exit for future in futures] == [3] * len(TEXTS)
    with pytest.raises(BackendError, match="closed"):
        scheduler.submit("late")
    scheduler.close()


def test_a_callback_of_an_answer_can_close(engine: Engine, gate: Gate) -> None:
    """It runs in the thread that answers the other rows."""
    scheduler = Scheduler(engine)
    is_closed = threading.Event()

    def close(_: Future[Prediction]) -> None:
        scheduler.close()
        is_closed.set()

    first = scheduler.submit("rain", max_exit=1)
    other = scheduler.submit("sun")
    gate.at()
    first.add_done_callback(close)
    gate.open()
    assert is_closed.wait(WAIT)
    assert other.result(WAIT).exit == 3
    scheduler.close()


def test_closing_can_cancel(engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(engine)
    futures = scheduler.submit_all(["a", "b"])
    gate.at()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler._thread, "join", lambda: None)
        scheduler.close(cancel=True)
        scheduler.close()  # as another thread may, at the same time
    gate.open()
    scheduler.close()
    assert all(future.cancelled() for future in futures)
    assert not wait(futures, timeout=10).not_done, "it waits for a notice, not only for the state"
    assert gate.begun == [(0, 2)]


@pytest.mark.usefixtures("joins")
def test_deadlines(engine: Engine, gate: Gate, clock: Clock) -> None:
    """A row stops at the exit before the segment that would make it late."""
    with Scheduler(engine) as scheduler:
        usual = scheduler.submit("the film")
        gate.at()
        soon = scheduler.submit("the plot", deadline_ms=5.0)
        missed = scheduler.submit("rain", deadline_ms=1.0)
        in_time = scheduler.submit("sun", deadline_ms=1e6)
        gate.step()
        assert gate.at() == (0, 3)
        clock.now = 4.5e-3
        gate.step()
        assert gate.at() == (1, 2)  # without the two whose time is up
        assert (soon.result(WAIT).exit, missed.result(WAIT).exit) == (1, 1)
        gate.open()
        assert (usual.result(WAIT).exit, in_time.result(WAIT).exit) == (3, 3)
    flags = [
        (answer.deadline_limited, answer.deadline_missed)
        for answer in results([usual, soon, missed, in_time])
    ]
    assert flags == [(False, False), (True, False), (True, True), (False, False)]
    assert (engine.tally.deadline_limited, engine.tally.deadline_missed) == (2, 1)


def test_tokenization_is_part_of_the_deadline(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(monkeypatch, engine.core, "encode", lambda _: clock.wait(1.0))
    with Scheduler(engine) as scheduler:
        missed = [scheduler.submit("a", deadline_ms=500.0).result(WAIT)]
        missed += asyncio.run(scheduler.classify(["a"], deadline_ms=500.0))
        assert [(answer.exit, answer.deadline_missed) for answer in missed] == [(1, True)] * 2
        assert not scheduler.submit("a", deadline_ms=5000.0).result(WAIT).deadline_missed


def test_exit_0_answers_while_a_segment_waits(
    exit_0_engines: Mapping[str, Path], gate: Gate
) -> None:
    rule = replace(NEVER, exit_0_threshold=0.0)
    with Engine.load(exit_0_engines["bert"], rule=rule) as engine:
        metrics = Metrics(engine)
        with Scheduler(engine, metrics=metrics) as scheduler:
            found = results(scheduler.submit_all(TEXTS))
    assert [answer.exit for answer in found] == [0] * len(TEXTS)
    assert counted(metrics, "queue_seconds_count") == len(TEXTS)
    assert gate.begun == []


def counted(metrics: Metrics, name: str) -> float:
    """The value of a metric."""
    (line,) = [x for x in metrics.text().decode().splitlines() if x.startswith(f"fpabee_{name} ")]
    return float(line.split()[1])


def test_the_rows_of_a_failing_group_get_its_error_and_others_their_answers(
    engine: Engine, gate: Gate
) -> None:
    bad = engine.core.encode(["rain " * 9])[0].input_ids

    def fails(segment: int, hidden: Any) -> None:
        ids = hidden.buffers["input_ids", 0][0]
        if segment == 0 and any(row[: len(bad)].tolist() == bad.tolist() for row in ids):
            raise MemoryError("made up")

    gate.fails = fails
    metrics = Metrics(engine)
    with Scheduler(engine, metrics=metrics) as scheduler:
        first = scheduler.submit("sun")
        gate.at()
        group = scheduler.submit_all(["the film", "rain " * 9, "the plot"])
        gate.open()
        for future in group:
            with pytest.raises(MemoryError, match="made up"):
                future.result(WAIT)
        check_same(engine, ["sun"], results([first]), NEVER)
        check_same(engine, ["the film"], results([scheduler.submit("the film")]), NEVER)
    assert [rows for segment, rows in gate.begun if segment == 0] == [1, 3, 1]
    assert not engine.core.backend.check_out()._taken
    assert counted(metrics, "failed_rows_total") == 3
    assert counted(metrics, "queue_seconds_count") == 5


def test_logits_that_are_not_finite(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with Scheduler(engine) as scheduler:
        scheduler.submit("warm up").result(WAIT)
        spoil_logits(monkeypatch, rows=0)
        futures = scheduler.submit_all(["a", "b", "c"])
        failed = [future for future in futures if future.exception(WAIT) is not None]
        assert len(failed) == 3  # one at each of the three exits
        with pytest.raises(BackendError, match="not finite"):
            failed[0].result(WAIT)


def test_rows_whose_answers_cannot_be_made_get_the_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scheduler(engine) as scheduler:
        with monkeypatch.context() as patch:
            patch.setattr(engine.core, "answers", Mock(side_effect=MemoryError("made up")))
            for future in scheduler.submit_all(["rain", "sun"], max_exit=1):
                with pytest.raises(MemoryError, match="made up"):
                    future.result(WAIT)
        assert scheduler.submit("rain").result(WAIT).exit == 3


def test_rows_that_failed_are_forgotten(engine: Engine, gate: Gate) -> None:
    """Their futures hold the error, whose traceback leads to their group."""
    gate.fails = _refuse
    gate.open()
    failed = []
    with Scheduler(engine) as scheduler:
        for _ in range(20):
            future = scheduler.submit("sun")
            assert future.exception(WAIT) is not None
            failed.append(weakref.ref(future))
        gc.collect()
        assert sum(each() is not None for each in failed) <= 2, "the last ones may still be held"


def test_an_engine_that_is_closed_fails_all_rows(engine: Engine, gate: Gate) -> None:
    with Scheduler(engine) as scheduler:
        futures = scheduler.submit_all(["a", "b"])
        gate.at()
        futures += scheduler.submit_all(["c", "d"])
        gate.fails = _refuse
        engine.core.backend._closed = True
        gate.open()
        for future in futures:
            with pytest.raises(BackendError, match="closed"):
                future.result(WAIT)
        with pytest.raises(BackendError, match="closed"):
            scheduler.submit("e")


def _refuse(segment: int, hidden: Any) -> None:
    raise BackendError("this engine is closed", "")


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (InputError, {"text": 5}),
        (InputError, {"text": None}),
        (InputError, {"text": "\ud800"}),
        (InputError, {"text": ("a", "b", "c")}),
        (InputError, {"text": "a", "deadline_ms": "5"}),
        (InputError, {"text": "a", "deadline_ms": -5}),
        (InputError, {"text": "a", "deadline_ms": float("nan")}),
        (InputError, {"text": ("a", None)}),
        (RuleError, {"text": "a", "max_exit": 1.5}),
        (RuleError, {"text": "a", "max_exit": 9}),
        (RuleError, {"text": "a", "max_exit": 0}),  # the model has no exit 0
    ],
)
def test_bad_arguments(engine: Engine, error: type[Exception], arguments: Any) -> None:
    with Scheduler(engine) as scheduler:
        with pytest.raises(error):
            scheduler.submit(**arguments)
        with pytest.raises(error):
            asyncio.run(scheduler.classify([arguments.pop("text")], **arguments))
        assert scheduler._unanswered == 0
        assert scheduler.submit("a").result(WAIT).exit == 3


def test_a_cancelled_task_cancels_its_rows(engine: Engine, gate: Gate) -> None:
    async def leaves(scheduler: Scheduler) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(scheduler.classify(["a", "b"]), 0.01)
        assert scheduler._unanswered == 0

    with Scheduler(engine) as scheduler:
        asyncio.run(leaves(scheduler))
        gate.open()
        assert scheduler.submit("c").result(WAIT).exit == 3
    assert engine.tally.rows == 1
