"""Executions are lent to calls: threads come and go, die, and the engine closes around them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from fpabee.runtime import BackendError, Engine
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.backends import base
from fpabee.runtime.backends.base import Backend
from fpabee.runtime.backends.buffers import Bucket
from fpabee.runtime.backends.cuda import required_gpu
from fpabee.runtime.encoding import TextEncoder
from fpabee.runtime.targets import open_backend

from ...child_process import Ended, Report, forked
from ...doubles.calls import before
from ...doubles.device import TEXTS, Double, set_gpu
from ...doubles.tensorrt import FakeContext
from ..running import until

FAILURES = ["malloc", "pinned", "event", "stream", "run"]


def test_threads_at_the_same_time(made: Double) -> None:
    start = threading.Barrier(3)
    with made.load() as engine, Engine.load(made.folder) as usual:

        def answers(texts: list[str]) -> Any:
            start.wait()
            return [engine.trace(texts).logits for _ in range(4)]

        parts = [TEXTS, TEXTS[:1], TEXTS[3:]]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(answers, parts))
        for texts, times in zip(parts, found, strict=True):
            expected = usual.trace(texts).logits
            for logits in times:
                np.testing.assert_allclose(logits, expected, atol=1e-5)
        assert len(made.cuda.streams) == 1
    assert made.nothing_is_left()


def test_closing_during_a_call(made: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is answered and then frees everything; later calls are refused."""
    begun = threading.Event()
    closed = threading.Event()
    engine = made.load()

    def wait(*_: object) -> None:
        begun.set()
        assert closed.wait(60)

    before(monkeypatch, Backend, "graph", wait)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(engine.predict, TEXTS)
        assert begun.wait(60)
        engine.close()
        assert not made.nothing_is_left()
        with pytest.raises(BackendError, match="closed"):
            engine.predict(TEXTS)
        closed.set()
        assert len(answer.result()) == len(TEXTS)
    assert made.nothing_is_left()


def test_a_call_waits_for_the_only_execution(made: Double) -> None:
    """Even if the engine is closed meanwhile; more executions would need more device memory."""
    engine = made.load()
    backend = engine.core.backend
    lent = backend.check_out()
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(engine.predict, TEXTS) for _ in range(2)]
        until(lambda: len(backend._waiting) == 2)
        engine.close()
        backend.give_back(lent, failed=True)
        assert [len(answer.result(60)) for answer in answers] == [len(TEXTS)] * 2
    assert made.nothing_is_left()


def test_the_call_that_has_waited_longest_is_next(made: Double) -> None:
    """A thread that calls in a loop would otherwise keep the others waiting."""
    with made.load() as engine, ThreadPoolExecutor(1) as pool:
        backend = engine.core.backend
        order = []

        def other() -> None:
            execution = backend.check_out()
            order.append("other")
            backend.give_back(execution)

        lent = backend.check_out()
        waits = pool.submit(other)
        until(lambda: len(backend._waiting) == 1)
        backend.give_back(lent)
        lent = backend.check_out()
        order.append("the loop")
        waits.result(60)
        backend.give_back(lent)
    assert order == ["other", "the loop"]


def test_no_call_waits_for_ever(made: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call hangs on the device; each of the others gets an error in time."""
    monkeypatch.setattr(base, "_PATIENCE_SECONDS", 0.1)
    with made.load() as engine, ThreadPoolExecutor(3) as pool:
        backend = engine.core.backend
        lent = backend.check_out()
        for answer in [pool.submit(engine.predict, TEXTS) for _ in range(3)]:
            with pytest.raises(BackendError, match=r"at a time \(1\) .* 0\.1 seconds -> .*start"):
                answer.result(60)
        backend.give_back(lent)
        assert len(engine.predict(TEXTS)) == len(TEXTS)


def test_a_call_is_patient_while_others_run_segments(
    made: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_PATIENCE_SECONDS", 0.3)
    with made.load() as engine, ThreadPoolExecutor(1) as pool:
        backend = engine.core.backend
        lent = backend.check_out()
        answer = pool.submit(engine.predict, TEXTS)
        until_then = time.monotonic() + 0.9
        while time.monotonic() < until_then:
            backend.progressed()
            time.sleep(0.01)
        assert not answer.done()
        backend.give_back(lent)
        assert len(answer.result(60)) == len(TEXTS)


def test_an_execution_that_cannot_recover_makes_room_for_another(
    made: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    with made.load() as engine:
        backend = engine.core.backend
        for _ in range(3):
            execution = backend.check_out()
            monkeypatch.setattr(execution, "recover", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                backend.give_back(execution, failed=True)
        assert len(engine.predict(TEXTS)) == len(TEXTS)


@pytest.mark.parametrize("death", [SystemExit, MemoryError, BackendError])
def test_a_call_that_dies(death: Any, made: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers are freed at once, and its execution serves the next call."""
    with made.load() as engine:
        engine.trace(TEXTS)
        used = made.used()
        with monkeypatch.context() as patch:
            patch.setattr(FakeContext, "execute_async_v3", Mock(side_effect=death("dead", "")))
            for _ in range(3):
                with pytest.raises(death):
                    engine.trace(TEXTS)
                assert made.used() < used
        assert len(engine.predict(TEXTS)) == len(TEXTS)
        assert len(made.cuda.streams) == 1
    assert made.nothing_is_left()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_a_forked_process_is_refused_before_a_library_is_called(
    backend: str, double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = double(backend=backend)
    set_gpu(monkeypatch)

    def child(report: Report) -> None:
        made.cuda.calls.clear()
        with pytest.raises(BackendError, match=r"was forked.* -> .*spawn"):
            engine.predict(TEXTS)
        with pytest.raises(BackendError, match=r"was forked from one .* -> .*spawn"):
            required_gpu(made.target)
        report(made.cuda.calls)

    with made.load() as engine:
        engine.predict(TEXTS)
        assert forked(child, 60) == Ended([{}], "")
        assert len(engine.predict(TEXTS)) == len(TEXTS)


class Group:
    """A group of rows on an execution, and outputs that were not read yet."""

    def __init__(self, execution: Any, hidden: Any, numbers: list[int]) -> None:
        self.execution = execution
        self.hidden = hidden
        self.numbers = numbers
        self.unread: list[tuple[int, Any]] = []


class Calls(RuleBasedStateMachine):
    """Calls on one backend in any order, of which some fail. `TEXTS` are its rows."""

    def __init__(self, double: Double, expected: Any) -> None:
        super().__init__()
        self.double = double
        self.expected = expected
        engines = EnginesFolder.read(double.folder)
        manifest = engines.manifest
        self.segments = len(manifest.segments)
        self.backend: Any = open_backend(engines, double.target, None)
        self.rows = TextEncoder(double.folder, manifest.tokenizer).encode(TEXTS)
        self.lent: list[Any] = []
        self.groups: list[Group] = []

    def end_call(self, execution: Any, failed: bool) -> None:
        self.groups = [group for group in self.groups if group.execution is not execution]
        self.lent.remove(execution)
        self.backend.give_back(execution, failed)

    @contextmanager
    def may_fail(self, execution: Any) -> Iterator[None]:
        try:
            yield
        except BackendError:
            self.end_call(execution, failed=True)

    @precondition(lambda self: not self.lent)
    @rule()
    def check_out(self) -> None:
        with suppress(BackendError):
            self.lent.append(self.backend.check_out())

    @precondition(lambda self: self.lent and len(self.groups) < 4)
    @rule(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        execution = data.draw(st.sampled_from(self.lent))
        rows = st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=3)
        numbers = data.draw(rows, label="rows")
        bucket = Bucket(4, data.draw(st.sampled_from([16, 24])))
        with self.may_fail(execution):
            hidden = execution.begin([self.rows[number] for number in numbers], bucket)
            self.groups.append(Group(execution, hidden, numbers))

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def enqueue(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(self.groups))
        segment = group.hidden.segment
        if segment < self.segments and len(group.unread) < 2:
            with self.may_fail(group.execution):
                pending = group.execution.enqueue(group.hidden)
                group.unread.append((segment, pending))

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """A whole call."""
        execution = data.draw(st.sampled_from(self.lent))
        with self.may_fail(execution):
            hidden = execution.begin(self.rows[1:3], Bucket(4, 16))
            for segment in range(self.segments):
                logits = execution.enqueue(hidden)()
                np.testing.assert_allclose(logits, self.expected[segment][1:3], atol=1e-5)
            execution.release(hidden)

    @precondition(lambda self: any(group.unread for group in self.groups))
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from([group for group in self.groups if group.unread]))
        segment, pending = group.unread.pop(0)
        expected = self.expected[segment][group.numbers]
        np.testing.assert_allclose(pending(), expected, atol=1e-5)

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), length=st.sampled_from([16, 24]))
    def regroup(self, data: st.DataObject, length: int) -> None:
        first = data.draw(st.sampled_from(self.groups))
        same = [
            group
            for group in self.groups
            if group.execution is first.execution and group.hidden.segment == first.hidden.segment
        ][:2]
        longest = max(group.hidden.bucket.sequence for group in same)
        if not 0 < first.hidden.segment < self.segments or length > longest:
            return
        with self.may_fail(first.execution):
            keep = [np.arange(len(group.numbers) - 1, -1, -1)[:2] for group in same]
            hidden = first.execution.regroup([g.hidden for g in same], keep, Bucket(4, length))
            numbers = [g.numbers[row] for g, rows in zip(same, keep, strict=True) for row in rows]
            self.groups.append(Group(first.execution, hidden, numbers))

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(self.groups))
        group.execution.release(group.hidden)
        self.groups.remove(group)

    @precondition(lambda self: self.lent)
    @rule(data=st.data(), failed=st.booleans())
    def give_back(self, data: st.DataObject, failed: bool) -> None:
        execution = data.draw(st.sampled_from(self.lent))
        for group in self.groups:
            if group.execution is execution and not failed:
                execution.release(group.hidden)
        self.end_call(execution, failed)

    @rule(kind=st.sampled_from(FAILURES), number=st.integers(1, 6))
    def fail(self, kind: str, number: int) -> None:
        self.double.cuda.fails_at[kind] = number

    @rule(room=st.integers(30_000, 400_000))
    def change_room(self, room: int) -> None:
        self.double.cuda.room = room

    def teardown(self) -> None:
        self.backend.close()
        for execution in list(self.lent):
            self.end_call(execution, failed=True)
        self.double.cuda.fails_at.clear()
        cuda = self.double.cuda
        cuda.room = 1 << 30
        kept = (cuda.memory_of, cuda.streams, cuda.events, cuda.freed_elsewhere)
        left = [dict(each) if isinstance(each, dict) else list(each) for each in kept]
        for each in kept:
            each.clear()  # or else all later examples fail, and hypothesis finds the wrong one
        assert not any(left), left


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_any_order_of_calls_with_failures(backend: str, double: Callable[..., Double]) -> None:
    """No use after free, no leak, and the logits of every group are right."""
    made = double(backend=backend, batch=(1, 2, 4))
    with Engine.load(made.folder) as usual:
        expected = usual.trace(TEXTS).logits
    make: Any = lambda: Calls(made, expected)  # noqa: E731 - hypothesis calls it like a class
    run_state_machine_as_test(
        make,
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
