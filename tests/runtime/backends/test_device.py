"""The device of an engine: which one, whose context is current, and what happens if it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fpabee.runtime import BackendError, Budget, Engine
from fpabee.runtime.backends import cuda as cuda_module
from fpabee.runtime.backends import tensorrt
from fpabee.runtime.machine import CudaDevice

from ...doubles.cuda import contexts
from ...doubles.device import GPU, SOME_STOP_FIRST, TEXTS, Double

ALL = Budget(exit=3)
APPLICATION = "the context of the application"
BACKENDS = ["tensorrt", "tensorrt-rtx"]


@pytest.fixture
def application() -> Iterator[list[object]]:
    """The contexts of an application that uses CUDA in this thread."""
    stack = contexts()
    stack.append(APPLICATION)
    yield stack
    stack.clear()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", [0, 1])
def test_the_application_keeps_its_context(
    device: int, backend: str, application: list[object], double: Callable[..., Double]
) -> None:
    """The double refuses calls in another context than that of the chosen device."""
    made = double(backend=backend)
    used, other = (made.cuda, made.second)[:: 1 if device == 0 else -1]
    with made.load(device=device) as engine:
        assert application == [APPLICATION]
        engine.predict(TEXTS, rule=ALL)
        assert application == [APPLICATION]
        used.fails_at["event"] = 1
        with pytest.raises(BackendError, match="error 2"):
            engine.predict([TEXTS[0] * 2], rule=ALL)
        assert application == [APPLICATION]
        engine.core.backend.drop_idle()
        assert application == [APPLICATION]
        engine.predict(TEXTS, rule=SOME_STOP_FIRST)
    assert application == [APPLICATION]
    assert not used.freed_elsewhere
    assert used.calls["gather"]
    assert not used.memory_of
    assert not used.events
    assert not other.calls


def test_each_thread_keeps_its_context(made: Double) -> None:
    engine = made.load()

    def answer(name: str) -> list[object]:
        contexts().append(name)
        engine.predict(TEXTS)
        return [contexts().pop(), *contexts()]

    with ThreadPoolExecutor(2) as pool:
        names = ["a", "b", "c"]
        assert list(pool.map(answer, names)) == [[name] for name in names]
    engine.close()


def test_plans_must_fit_the_chosen_device(made: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [GPU, CudaDevice("Thor", "11.0", (13, 0))]
    for module in (cuda_module, tensorrt):
        monkeypatch.setattr(module, "cuda_device", lambda number=0: gpus[number])
    made.load(device=0).close()
    with pytest.raises(BackendError, match=r"compute capability 8\.6; this Thor has 11\.0"):
        made.load(device=1)


@pytest.mark.parametrize(
    ("device", "message"),
    [(1, r"onnxruntime-fp32 runs on the CPU.* no device 1 -> .*`target`.*`device`"),
     (-1, "device is -1"), ("0", "device is '0'"), (True, "device is True")],
)  # fmt: skip
def test_a_device_that_a_cpu_does_not_have(device: Any, message: str, made: Double) -> None:
    with pytest.raises(BackendError, match=message):
        Engine.load(made.folder, target="onnxruntime-fp32", device=device)


@pytest.mark.parametrize("call", ["malloc", "event", "run"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_has_failed_is_not_called_again(
    backend: str, call: str, double: Callable[..., Double]
) -> None:
    """Its other engines are told, too, and all of them can be closed."""
    made = double(backend=backend)
    message = r"GPU 0 has failed: made up \(CUDA error 719\) -> start this process again"
    with made.load() as engine, made.load() as other, made.load(device=1) as elsewhere:
        other.predict(["rain"])
        made.cuda.error = 719
        made.cuda.fails_at[call] = 1
        with pytest.raises(BackendError):
            engine.predict(TEXTS)
        before = made.cuda.calls.copy()
        for each in (engine, other, engine):
            assert each.core.backend.failed
            with pytest.raises(BackendError, match=message):
                each.predict(TEXTS)
        with pytest.raises(BackendError, match=message):
            made.load()
        assert made.cuda.calls == before
        assert not elsewhere.core.backend.failed
        elsewhere.predict(TEXTS)
    assert contexts() == []


def test_other_errors_end_one_call_only(made: Double) -> None:
    with made.load() as engine:
        made.cuda.fails_at["event"] = 2
        with pytest.raises(BackendError, match="nvidia-smi"):
            engine.predict(TEXTS)
        assert not engine.core.backend.failed
        assert len(engine.predict(TEXTS)) == len(TEXTS)
