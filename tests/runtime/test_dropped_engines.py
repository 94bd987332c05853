"""An engine that is dropped without `close` is freed at once, not when the collector runs."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fpabee.runtime import BackendError, Budget, Engine
from fpabee.runtime.backends.device import DeviceExecution
from fpabee.runtime.backends.host import HostExecution
from fpabee.runtime.core import Core
from fpabee.runtime.serving import Scheduler

from ..doubles.calls import before
from ..doubles.device import SOME_STOP_FIRST, Double
from ..doubles.openvino import add_openvino

TEXTS = ["the plot is not good but the music is", "turn the lights on"]
WAIT = 20


def fails(*_: object) -> Any:
    raise RuntimeError("made up")


def predict(engine: Engine) -> None:
    engine.predict(TEXTS, rule=SOME_STOP_FIRST)


def predict_and_fail(engine: Engine) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostExecution, "_prepare", fails)
        patch.setattr(DeviceExecution, "_prepare", fails)
        with pytest.raises((BackendError, RuntimeError), match="made up"):
            engine.predict(["rain " * 30])


def begin_a_stream(engine: Engine) -> None:
    engine.core.window_bytes = 1
    next(engine.stream(["rain"] * 1000))


def schedule(engine: Engine) -> None:
    with Scheduler(engine) as scheduler:
        assert scheduler.submit("rain").result(WAIT)


def schedule_and_fail(engine: Engine) -> None:
    async def classify(scheduler: Scheduler) -> None:
        with pytest.raises((BackendError, RuntimeError), match="made up"):
            await scheduler.classify(["rain " * 30])

    with pytest.MonkeyPatch.context() as patch, Scheduler(engine) as scheduler:
        patch.setattr(HostExecution, "_prepare", fails)
        patch.setattr(DeviceExecution, "_prepare", fails)
        assert scheduler.submit("rain " * 30).exception(WAIT)
        asyncio.run(classify(scheduler))


def ends(thread: threading.Thread) -> None:
    """What the last thread holds is freed when it ends."""
    thread.join(WAIT)
    assert not thread.is_alive()


def schedule_without_closing(engine: Engine) -> None:
    scheduler = Scheduler(engine)
    thread = scheduler._thread
    assert scheduler.submit("rain").result(WAIT)
    asyncio.run(scheduler.classify(["rain " * 9000]))  # which another thread tokenizes
    dropped = weakref.ref(scheduler)
    del scheduler
    ends(thread)
    assert dropped() is None


def schedule_and_drop_at_once(engine: Engine) -> None:
    """What was submitted is answered; an answer that is kept does not hold the scheduler."""
    scheduler = Scheduler(engine)
    thread = scheduler._thread
    answers = scheduler.submit_all(TEXTS * 5)
    dropped = weakref.ref(scheduler)
    del scheduler
    ends(thread)
    assert all(answer.result(WAIT) for answer in answers)
    assert dropped() is None


def schedule_and_fail_without_a_chain(engine: Engine) -> None:
    def fail_in_the_worker(_: Core) -> None:
        if threading.current_thread() is not threading.main_thread():
            fails()

    with pytest.MonkeyPatch.context() as patch, Scheduler(engine) as scheduler:
        before(patch, Core, "chain", fail_in_the_worker)
        assert scheduler.submit("rain").exception(WAIT)


@pytest.fixture(autouse=True)
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


USES = [
    predict,
    predict_and_fail,
    begin_a_stream,
    schedule,
    schedule_without_closing,
    schedule_and_drop_at_once,
    schedule_and_fail,
    schedule_and_fail_without_a_chain,
]


@pytest.fixture(
    params=["onnxruntime-fp32", "openvino-fp32", "tensorrt", "tensorrt-rtx", "onnxruntime-cuda"]
)
def engine(
    request: pytest.FixtureRequest,
    engine_copy: Callable[..., Path],
    double: Callable[..., Double],
) -> Iterator[list[Engine]]:
    """The only reference to an engine; all memory on a GPU must be free after the test.

    Only the driver knows that memory.
    """
    target = request.param
    if target.endswith("-fp32"):
        folder = engine_copy()
        if target == "openvino-fp32":
            add_openvino(folder, "fp32")
        yield [Engine.load(folder, target, rule=Budget(exit=3))]
        return
    made = double(backend=target.removesuffix("-cuda"))
    yield [made.load(rule=Budget(exit=3))]
    assert made.nothing_is_left()


@pytest.mark.parametrize("use", USES)
def test_nothing_holds_a_dropped_engine(
    use: Callable[[Engine], None], engine: list[Engine]
) -> None:
    dropped = engine.pop()
    dropped.predict(TEXTS)
    use(dropped)
    backend: Any = dropped.core.backend
    held = [
        dropped,
        dropped.core,
        backend,
        dropped.core._encoder,
        backend.graph("segment_01"),
        *backend._idle,
    ]
    assert backend._idle
    left = [weakref.ref(each) for each in held]
    del dropped, backend, held
    assert [each() for each in left] == [None] * len(left)
