"""Executions are lent to calls: threads come and go, die, and the engine closes around them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fpabee.runtime import BackendError, Engine
from fpabee.runtime.backends.backend import Backend

from ...doubles.device import Double
from ...doubles.tensorrt import FakeContext

TEXTS = ["the film is not good", "rain", "", "turn the lights on and play music", "book a table"]
BACKENDS = ["tensorrt", "onnxruntime"]


def in_thread(call: Callable[[], Any]) -> Any:
    """The result of a call in a thread of its own, which has then ended."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def nothing_is_left(double: Double) -> bool:
    cuda = double.cuda
    return not any((cuda.memory_of, cuda.streams, cuda.events, cuda.graphs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_that_end_leave_nothing_behind(backend: str, double: Callable[..., Double]) -> None:
    made = double(backend=backend)
    with made.load() as engine:
        found = [in_thread(lambda: engine.trace(TEXTS).logits) for _ in range(2)]
        before = made.used(), len(made.cuda.streams), len(made.trt.contexts), made.cuda.frees
        found += [in_thread(lambda: engine.trace(TEXTS).logits) for _ in range(3)]
        after = made.used(), len(made.cuda.streams), len(made.trt.contexts), made.cuda.frees
        assert after == before
        assert before[1] == 1
        for logits in found[1:]:
            np.testing.assert_allclose(logits, found[0], atol=1e-5)
    assert nothing_is_left(made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_at_the_same_time(backend: str, double: Callable[..., Double]) -> None:
    made = double(backend=backend)
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
        assert len(made.cuda.streams) <= 3
    assert nothing_is_left(made)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_during_a_call(
    backend: str, double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call is answered and then frees everything; later calls are refused."""
    made = double(backend=backend)
    begun, closed = threading.Event(), threading.Event()
    engine = made.load()
    graph = Backend.graph

    def waits(backend: Any, name: str) -> Any:
        begun.set()
        assert closed.wait(60)
        return graph(backend, name)

    monkeypatch.setattr(Backend, "graph", waits)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(engine.predict, TEXTS)
        assert begun.wait(60)
        engine.close()
        assert not nothing_is_left(made)
        with pytest.raises(BackendError, match="closed"):
            engine.predict(TEXTS)
        closed.set()
        assert len(answer.result()) == len(TEXTS)
    assert nothing_is_left(made)


@pytest.mark.parametrize("death", [SystemExit, MemoryError, BackendError])
def test_a_thread_that_dies_during_a_call(
    death: Any, double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffers are freed at once, and its execution serves the next call."""
    made = double()
    run = FakeContext.execute_async_v3

    def dies(context: FakeContext, stream: int) -> bool:
        raise death("dead", "")

    with made.load() as engine:
        engine.trace(TEXTS)
        used, streams = made.used(), len(made.cuda.streams)
        monkeypatch.setattr(FakeContext, "execute_async_v3", dies)
        for _ in range(3):
            with pytest.raises(death):
                in_thread(lambda: engine.trace(TEXTS))
            assert made.used() < used
        monkeypatch.setattr(FakeContext, "execute_async_v3", run)
        assert len(in_thread(lambda: engine.predict(TEXTS))) == len(TEXTS)
        assert len(made.cuda.streams) == streams
    assert nothing_is_left(made)


def test_idle_executions_make_room(double: Callable[..., Double]) -> None:
    """A burst of threads leaves executions behind; a call that lacks memory closes them."""
    made = double()
    with made.load() as engine:
        lent = [engine._chain() for _ in range(2)]
        for chain in lent:
            chain.time_exits(5, 12)
        for chain in lent:
            chain.__exit__(None)
        assert len(made.cuda.streams) == 2
        made.cuda.room = made.used()
        assert len(engine.predict(["rain " * 40] * 2)) == 2
        assert len(made.cuda.streams) == 1
    assert nothing_is_left(made)
