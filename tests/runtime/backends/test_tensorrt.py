"""The device code over a double of the driver: times, kernels and real plans need a GPU."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fpabee.runtime import (
    ArtifactError,
    BackendError,
    Budget,
    Engine,
    Entropy,
    ExitRule,
    FPabee,
    MissingExtraError,
)
from fpabee.runtime.backends import compiled_cache
from fpabee.runtime.backends import cuda as cuda_module
from fpabee.runtime.backends.device import DeviceExecution
from fpabee.runtime.machine import CudaDevice
from fpabee.runtime.rules.runner import RuleRunner

from ...bad_input.cases import changed_heads
from ...doubles.device import Double, install, run_through, set_gpu

TEXTS = ["the film is not good", "rain", "", "turn the lights on and play music", "book a table"]
RULE = FPabee(threshold=0.45)
SOME_STOP_FIRST = Entropy(threshold=0.3)
"""Some of the texts, but not all, stop at exit 1 of BERT."""


@pytest.mark.parametrize(
    "rule", [FPabee(threshold=0.6, patience=2), Budget(exit=2), SOME_STOP_FIRST]
)
@pytest.mark.parametrize(
    ("family", "backend"),
    [("bert", "tensorrt"), ("albert", "tensorrt"), ("mpnet", "tensorrt"), ("bert", "onnxruntime")],
)
def test_answers_are_those_of_the_cpu(
    family: str, backend: str, rule: ExitRule, double: Callable[..., Double]
) -> None:
    shapes = {"batch_sizes": (1, 2, 4, 64), "sequence_lengths": (1, 8, 16, 64)}
    made = double(family, backend=backend, **shapes)
    with made.load() as engine, Engine.load(made.folder) as usual:
        assert engine.target == made.target
        for _ in range(3):  # warm-up, capture, replay
            # The first is captured before others need more scratch memory.
            for texts in (TEXTS[:1], TEXTS[:1], TEXTS, TEXTS * 5):
                found, expected = (each.trace(texts, rule=rule) for each in (engine, usual))
                np.testing.assert_array_equal(found.exits, expected.exits)
                np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
        # Sessions of ONNX Runtime allocate during a run, so they are not captured.
        assert (made.cuda.launches > 0) == (backend == "tensorrt")
    assert made.cuda.memory_of == {}
    assert made.cuda.streams == {}


@pytest.mark.parametrize("rule", [RULE, SOME_STOP_FIRST, Budget(exit=1), Budget(exit=3)])
def test_windows_leave_no_device_memory_behind(
    rule: ExitRule, double: Callable[..., Double]
) -> None:
    """One text, one group that looks ahead, and several groups of at most 4 rows."""
    made = double(batch=(1, 2, 4), batch_sizes=(1, 2, 4))
    with made.load() as engine:
        exits = engine.trace(TEXTS, rule=SOME_STOP_FIRST).exits
        assert {1} < set(exits.tolist())
        for texts in (TEXTS[:1], TEXTS[:4], TEXTS * 3):
            for _ in range(3):  # memory is taken when a group first needs it
                engine.predict(texts, rule=rule)
                engine.time_exits(2, 8)
            used, contexts = made.used(), len(made.trt.contexts)
            for _ in range(3):
                engine.predict(texts, rule=rule)
                engine.time_exits(2, 8)
                assert made.used() == used > 0
                assert len(made.trt.contexts) == contexts, "made once for a shape"
        rows = {context.shapes["attention_bias"][0] for context in made.trt.contexts}
        assert rows <= {1, 2, 4}


@pytest.mark.parametrize(("stay", "regroups"), [(4, 0), (3, 0), (2, 1)])
def test_a_group_shrinks_if_this_halves_its_tokens(
    stay: int, regroups: int, double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls = double(), []
    regroup = DeviceExecution.regroup

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return regroup(*arguments)

    monkeypatch.setattr(DeviceExecution, "regroup", counted)

    def decide(runner: Any, exit_number: int, state: Any, logits: Any) -> Any:
        stops = np.arange(len(logits)) >= (stay if exit_number < 3 else 0)
        return (stops if stops.any() else None), None

    monkeypatch.setattr(RuleRunner, "decide", decide)
    with made.load() as engine:
        engine.run_encoded(engine.encode(["rain"] * 5), engine.rule)
    assert len(calls) == regroups


@pytest.mark.parametrize(("value", "texts"), [("nan", ["rain"]), ("inf", TEXTS)])
def test_logits_that_are_not_finite_are_refused(
    value: str, texts: list[str], engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even at an exit where no row stops, and in a trace; on the device and on the CPU."""
    folder = engine_copy()
    changed_heads(folder, "onnx/fp32/segment_02.onnx", lambda w: w * 0 + np.float32(value))
    made = install(monkeypatch, folder)
    for target in (made.target, None):
        with Engine.load(made.folder, target=target) as engine:
            engine.predict(texts, rule=Budget(exit=1))
            for run in (engine.trace, partial(engine.predict, rule=Budget(exit=3))):
                with pytest.raises(BackendError, match=r"not finite numbers at exit 2 .*check"):
                    run(texts)
    with pytest.raises(BackendError, match="not finite"):
        made.load(check=True)
    assert made.cuda.memory_of == {}, "an engine that fails its check is closed"


def test_segments_without_scratch_memory_are_captured_once(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.doubles.tensorrt.SCRATCH", 0)
    made = double()
    with made.load() as engine:
        for _ in range(4):
            engine.trace(TEXTS)
    assert made.cuda.captures == 3


def test_hidden_states_stay_on_the_device(double: Callable[..., Double]) -> None:
    made = double()
    with made.load() as engine:
        engine.trace(TEXTS)
        sizes = {memory.nbytes for memory in made.cuda.pinned_of.values()}
        hidden = len(TEXTS) * 12 * 32 * 4
        assert max(sizes) < hidden


def test_a_longer_row_than_the_profile_is_refused(double: Callable[..., Double]) -> None:
    with (
        double(sequence=(1, 8, 16)).load() as engine,
        pytest.raises(BackendError, match=r"a row has 42 tokens; this target takes 16"),
    ):
        engine.predict(["rain " * 40])


def test_unused_buffers_are_freed_when_memory_is_short(double: Callable[..., Double]) -> None:
    made = double()
    with made.load() as engine:
        engine.predict(["rain"])
        free, total = made.cuda.memory()
        made.cuda.room = total - free + 1024
        assert len(engine.predict(["rain rain"])) == 1
        made.cuda.room = 64
        with pytest.raises(BackendError, match="no room"):
            engine.predict(["rain rain rain"])
        made.cuda.room = total
        assert len(engine.predict(["rain rain rain"])) == 1


def test_outputs_are_read_before_their_memory_is_freed(double: Callable[..., Double]) -> None:
    """A group shrinks while outputs of its next segment are unread, and then memory is short.

    Unused buffers are freed at each allocation in turn. The double notices every use of them.
    """
    made = double()
    with made.load() as engine:
        expected = engine.trace(TEXTS, rule=SOME_STOP_FIRST)
    for number in range(1, 40):
        with made.load() as engine:
            engine.trace(TEXTS[:1])
            made.cuda.fails_at["malloc"] = number
            found = engine.trace(TEXTS, rule=SOME_STOP_FIRST)
            was_last = made.cuda.fails_at["malloc"] > 0
        np.testing.assert_array_equal(found.exits, expected.exits)
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
        if was_last:
            return
    raise AssertionError("a call makes fewer allocations")


def test_contexts_are_freed_at_once(double: Callable[..., Double]) -> None:
    """Not when the garbage collector runs next: what lacks memory needs theirs now."""
    with double().load() as engine:
        with engine.chain() as chain:
            run_through(engine, chain, ["rain"])
            execution: Any = chain.execution
            assert len(execution.shared) == 3
        gc.disable()
        try:
            engine._backend.drop_idle()
            assert not execution.shared
        finally:
            gc.enable()


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("rows", [1, 5])
def test_warming_up_captures_what_it_is_asked_for(
    rows: int, backend: str, double: Callable[..., Double]
) -> None:
    shapes = {"batch_sizes": (1, 2, 8, 64), "sequence_lengths": (8, 16, 24, 64)}
    made = double(backend=backend, **shapes)
    with made.load() as engine:
        engine.warm_up(rows, tokens=16)
        for text in ("rain", "rain " * 10):
            before = made.cuda.captures, len(made.trt.contexts), made.cuda.launches
            engine.predict([text] * rows, rule=Budget(exit=3))
            after = made.cuda.captures, len(made.trt.contexts), made.cuda.launches
            assert after == (*before[:2], before[2] + 3)


def test_a_target_is_checked_before_a_plan_is_loaded(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = double()
    monkeypatch.setattr(made.trt, "Runtime", None)
    set_gpu(monkeypatch, CudaDevice(error="no NVIDIA driver is installed"))
    with pytest.raises(BackendError, match=r"NVIDIA GPU.*no NVIDIA driver.*another `target`"):
        made.load()
    monkeypatch.delitem(sys.modules, "tensorrt")
    with pytest.raises(MissingExtraError, match=r"pip install 'fpabee\[tensorrt-cu13\]'"):
        made.load()


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("tensorrt", r"segment_01\.plan .*: Version tag does not match -> build it here"),
        ("tensorrt-rtx", r"segment_01\.plan was not built for this GPU .*build it here"),
    ],
)
def test_a_plan_that_does_not_load_says_why(
    backend: str, message: str, double: Callable[..., Double]
) -> None:
    made = double(backend=backend)
    with made.load() as engine:
        assert len(engine.predict(["rain"])) == 1
    made.trt.plans = lambda content: None
    with made.load() as engine, pytest.raises(ArtifactError, match=message):
        engine.predict(["rain"])


def test_rtx_keeps_what_the_device_compiled(
    double: Callable[..., Double],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def kept(made: Double) -> list[bytes]:
        with made.load() as engine:
            engine.trace(["rain"])
        names = (path.name for path in sorted((tmp_path / "cache/fpabee/compiled").iterdir()))
        return [bytes(compiled_cache.read(name) or b"") for name in names]

    made = double(backend="tensorrt-rtx")
    before = sorted(made.folder.rglob("*"))
    assert kept(made) == [b"compiled 3"]
    assert kept(made) == [b"compiled 6"], "the next process starts with what the first one kept"
    assert sorted(made.folder.rglob("*")) == before, "a folder must stay verifiable"
    (path,) = (tmp_path / "cache/fpabee/compiled").iterdir()
    compiled_cache.write(path.name, b"of another driver")
    assert kept(made) == [b"compiled 3"]
    assert "for another driver" in caplog.text
    set_gpu(monkeypatch, CudaDevice("Another GPU", "8.6", (13, 0)))
    assert kept(made) == [b"compiled 3"] * 2, "what another GPU compiled is not read"


def test_rtx_keeps_it_before_the_engine_is_closed(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written: list[bytes] = []
    monkeypatch.setattr(compiled_cache, "write", lambda key, content: written.append(content))
    with double(backend="tensorrt-rtx").load() as engine:
        for texts in (["rain"], ["rain"], TEXTS):
            engine.trace(texts)
        assert written == [b"compiled 3", b"compiled 6"], "once for each new shape"
    assert len(written) == 2


def test_a_plan_of_another_graph_is_refused(double: Callable[..., Double]) -> None:
    made = double()
    made.change_plan("segment_02", onnx_sha256="0" * 64)
    with pytest.raises(ArtifactError, match=r"segment_02\.plan was built from another graph"):
        made.load()


def test_cuda_errors_say_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    driver = cuda_module.Cuda.__new__(cuda_module.Cuda)
    driver._runtime = runtime
    good, full = runtime.cudaError_t.cudaSuccess, runtime.cudaError_t.cudaErrorMemoryAllocation
    monkeypatch.setattr(runtime, "cudaMalloc", lambda size: (full, 0))
    monkeypatch.setattr(runtime, "cudaMemGetInfo", lambda: (good, 3 << 20, 8 << 30))
    with pytest.raises(BackendError, match=r"no room for 64\.0 MiB: 3 of 8192 MiB are free"):
        driver.malloc(64 << 20)
    monkeypatch.setattr(runtime, "cudaGetErrorString", lambda status: (good, b"launch failed"))
    broken = runtime.cudaError_t.cudaErrorLaunchFailure
    monkeypatch.setattr(runtime, "cudaStreamSynchronize", lambda stream: (broken,))
    with pytest.raises(BackendError, match=r"CUDA: launch failed \(error 719\).*nvidia-smi"):
        driver.synchronize(1)


@pytest.mark.parametrize("fails", ["work", "cudaStreamEndCapture", "cudaGraphInstantiate", ""])
def test_a_capture_always_ends(fails: str) -> None:
    """With the calls of the real bindings: the stream leaves the capture, and no graph is left."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    calls: list[str] = []
    relaxed = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed

    def answer(name: str, *value: Any) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            calls.append(name)
            assert name != "cudaStreamBeginCapture" or arguments == (3, relaxed)
            failed = name == fails
            status = runtime.cudaError_t(901 if failed else 0)
            return (status, *([None] * len(value) if failed else value))

        return call

    def work() -> None:
        assert not gc.isenabled(), "it may free device memory during the capture"
        if fails == "work":
            raise BackendError("a segment failed", "")

    driver = cuda_module.Cuda.__new__(cuda_module.Cuda)
    values = {"cudaStreamEndCapture": (7,), "cudaGraphInstantiate": (8,)}
    names = ["BeginCapture", "EndCapture"]
    driver._runtime = SimpleNamespace(
        cudaStreamCaptureMode=runtime.cudaStreamCaptureMode,
        cudaGetErrorString=lambda status: (0, b"capture invalidated"),
        **{
            name: answer(name, *values.get(name, ()))
            for name in [
                *(f"cudaStream{name}" for name in names),
                "cudaGraphInstantiate",
                "cudaGraphDestroy",
                "cudaGetLastError",
            ]
        },
    )
    if not fails:
        assert driver.capture(3, work) == 8
    else:
        with pytest.raises(BackendError, match=r"segment failed|invalidated"):
            driver.capture(3, work)
    assert gc.isenabled()
    assert calls[:2] == ["cudaStreamBeginCapture", "cudaStreamEndCapture"]
    assert ("cudaGraphDestroy" in calls) == (fails != "cudaStreamEndCapture")
    assert ("cudaGetLastError" in calls) == bool(fails)
