"""An engine in a process that was forked after it was loaded: errors, and nothing that waits."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.runtime import BackendError, Budget, Engine
from fpabee.runtime.chain.groups import Group
from fpabee.runtime.encoding import RowTokenizer

from ..child_process import Ended, Report, forked
from ..doubles.calls import before
from ..doubles.openvino import add_openvino

# Python 3.12 and later warn of forks, since what these tests are about can happen.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

TEXTS = ["the plot is not good but the music is", "turn the lights on"]
SECONDS = 60
USES: dict[str, Callable[[Engine], object]] = {
    "predict": lambda engine: engine.predict(TEXTS),
    "stream": lambda engine: next(engine.stream(TEXTS)),
    "trace": lambda engine: engine.trace(TEXTS),
    "check": lambda engine: engine.check(),
    "warm_up": lambda engine: engine.warm_up(),
    "encode": lambda engine: engine.core.encode(TEXTS),
    "reset_tally": lambda engine: engine.reset_tally(),
    "chain": lambda engine: engine.core.chain(),
}


@pytest.fixture(params=["onnxruntime-fp32", "openvino-fp32"])
def load(request: pytest.FixtureRequest, engine_copy: Callable[..., Path]) -> Callable[[], Engine]:
    """Loads an engine, which has then predicted."""
    folder = engine_copy()
    if "openvino" in request.param:
        add_openvino(folder, "fp32")

    def load() -> Engine:
        engine = Engine.load(folder, request.param, threads=2)
        engine.predict(TEXTS)
        return engine

    return load


@pytest.fixture
def engine(load: Callable[[], Engine]) -> Iterator[Engine]:
    with load() as engine:
        yield engine


def test_every_use_gets_an_error_although_other_threads_use_the_engine(engine: Engine) -> None:
    backend = engine.core.backend

    def child(report: Report) -> None:
        for name, use in USES.items():
            with pytest.raises(BackendError, match=r"this engine .* forked.* -> .*load an engine"):
                use(engine)
            report(name)
        with pytest.raises(BackendError, match="forked"):
            backend.check_out()
        engine.close()

    with ExitStack() as others:
        for _ in range(backend.most_executions):
            others.enter_context(engine.core.chain())
        # Nobody in the child will ever release what other threads held.
        for lock in (backend._pool_lock, backend._lock, engine.core.tallies._lock):
            others.enter_context(lock)
        assert forked(child, SECONDS) == Ended([*USES], "")
        others.pop_all().close()
    assert len(engine.predict(TEXTS)) == len(TEXTS)


def test_the_child_drops_what_it_cannot_use(load: Callable[[], Engine]) -> None:
    """Libraries join threads when they free a session, and the child does not have them."""
    engine = load()
    chain = engine.core.chain()
    rows = engine.core.encode(TEXTS[:1])
    chain.borrow(Group.of(np.arange(1), rows, engine.core.in_use, np.inf))
    kept: list[Any] = [engine, chain]
    del engine, chain

    def child(report: Report) -> None:
        with kept.pop():
            kept.clear()
        gc.collect()
        report("dropped")

    assert forked(child, SECONDS) == Ended(["dropped"], "")
    engine, chain = kept
    with engine, chain:
        pass


def test_a_stream_that_began_before_the_fork(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child does not wait for the thread that tokenizes the next texts."""
    first_thread = threading.get_ident()
    forks = threading.Event()

    def wait(*_: object) -> None:
        if threading.get_ident() != first_thread:
            assert forks.wait(SECONDS)

    def child(report: Report) -> None:
        with pytest.raises(BackendError, match="forked"):
            list(stream)
        report("refused")

    before(monkeypatch, RowTokenizer, "rows", wait)
    engine.core.window_bytes = 1
    texts = ["rain"] * 1000
    stream = engine.stream(texts, rule=Budget(exit=1))
    next(stream)
    assert forked(child, SECONDS) == Ended(["refused"], "")
    forks.set()
    assert sum(1 for _ in stream) == len(texts) - 1
