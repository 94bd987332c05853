"""The device code over a double of the driver: times, kernels and real plans need a GPU."""

from __future__ import annotations

import errno
import gc
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from fpabee.runtime import (
    ArtifactError,
    BackendError,
    Budget,
    Engine,
    FPabee,
)
from fpabee.runtime.backends import compiled_cache, device
from fpabee.runtime.backends.device import DeviceExecution
from fpabee.runtime.machine import CudaDevice
from fpabee.runtime.rules.runner import RuleRunner
from fpabee.runtime.serving import Scheduler

from ...bad_input.cases import changed_heads
from ...doubles.calls import before
from ...doubles.device import SOME_STOP_FIRST, TEXTS, Double, install, run_through, set_gpu
from ...doubles.tensorrt import FakeContext, FakeRuntimeCache

RULE = FPabee(threshold=0.45)


@pytest.mark.parametrize(("stay", "regroups"), [(5, 0), (4, 1), (2, 1)])
def test_a_group_shrinks_before_its_next_segment(
    stay: int, regroups: int, made: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[object]()
    before(monkeypatch, DeviceExecution, "regroup", lambda *arguments: calls.append(arguments))

    def decide(runner: Any, exit_number: int, state: Any, logits: Any) -> Any:
        stops = np.arange(len(logits)) >= (stay if exit_number < 3 else 0)
        return (stops if stops.any() else None), None

    monkeypatch.setattr(RuleRunner, "decide", decide)
    with made.load() as engine:
        engine.run_encoded(engine.core.encode(["rain"] * 5), engine.rule)
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
        with Engine.load(made.folder, target=target, check=False) as engine:
            engine.predict(texts, rule=Budget(exit=1))
            for run in (engine.trace, partial(engine.predict, rule=Budget(exit=3))):
                with pytest.raises(BackendError, match=r"not finite numbers at exit 2 .*check"):
                    run(texts)
    with pytest.raises(BackendError, match="not finite"):
        made.load(check=True)
    assert made.cuda.memory_of == {}, "an engine that fails its check is closed"


def test_hidden_states_stay_on_the_device(made: Double) -> None:
    with made.load() as engine:
        longest = int(engine.trace(TEXTS).lengths.max())
        sizes = {memory.nbytes for memory in made.cuda.pinned_of.values()}
        assert max(sizes) < len(TEXTS) * longest * 32 * 4, "hidden states of 32 floats for a token"


def test_unused_buffers_are_freed_when_memory_is_short(made: Double) -> None:
    with made.load() as engine:
        engine.predict(["rain"])
        total = made.cuda.room
        made.cuda.room = made.used() + 1024
        assert len(engine.predict(["rain rain"])) == 1
        execution: Any = engine.core.backend.check_out()
        assert len({bucket for bucket, _ in execution.shared}) == 1, "contexts are freed, too"
        engine.core.backend.give_back(execution)
        made.cuda.room = 64
        with pytest.raises(BackendError, match="no room"):
            engine.predict(["rain rain rain"])
        made.cuda.room = total
        assert len(engine.predict(["rain rain rain"])) == 1


def test_outputs_are_read_before_their_memory_is_freed(made: Double) -> None:
    """A group shrinks while outputs of its next segment are unread, and then memory is short.

    Unused buffers are freed at each allocation in turn. The double notices every use of them.
    """
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


def test_a_context_that_a_traceback_holds_is_freed_on_its_device(made: Double) -> None:
    with made.load() as engine:
        made.cuda.fails_at["run"] = 1
        with pytest.raises(BackendError) as caught:
            engine.predict(["rain"])
    before = made.cuda.freed.count("FakeContext")
    del caught
    gc.collect()
    assert made.cuda.freed.count("FakeContext") > before
    assert made.cuda.freed_elsewhere == []


def test_contexts_are_freed_at_once(made: Double) -> None:
    """Not when the garbage collector runs next: what lacks memory needs theirs now."""
    with made.load() as engine:
        with engine.core.chain() as chain:
            run_through(engine, chain, ["rain"])
        contexts = [record.context for record in made.trt.contexts]
        assert len(contexts) == 3
        gc.disable()
        try:
            engine.core.backend.drop_idle()
            assert not any(context() for context in contexts)
        finally:
            gc.enable()


def test_an_engine_that_cannot_be_made_has_nothing_to_free(made: Double) -> None:
    with pytest.raises(IndexError):
        made.load(device=2)
    made.change_plan("segment_01", onnx_sha256="0" * 64)
    with pytest.raises(ArtifactError, match="built from another graph"):
        made.load()
    gc.collect()


def test_an_engine_of_another_process_is_not_freed(made: Double) -> None:
    engine = made.load()
    engine.predict(["rain"])
    engine.core.backend.origin.is_elsewhere = True
    calls = made.cuda.calls.copy()
    del engine
    gc.collect()
    assert made.cuda.calls == calls


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("rows", [1, 5])
def test_warming_up_makes_what_it_is_asked_for(
    rows: int,
    backend: str,
    double: Callable[..., Double],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even if there is no room to keep buffers of every shape."""
    shapes = {"batch_sizes": (1, 2, 8, 64), "sequence_lengths": (8, 16, 24, 64)}
    monkeypatch.setattr(device, "_FREE_BYTES", 0)
    made = double(backend=backend, **shapes)
    with made.load() as engine:
        engine.warm_up(rows, tokens=16)
        contexts = len(made.trt.contexts)
        assert contexts > 0
        for text in ("rain", "rain " * 10):
            engine.predict([text] * rows, rule=Budget(exit=3))
        assert len(made.trt.contexts) == contexts


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_plan_that_does_not_load_says_why(backend: str, double: Callable[..., Double]) -> None:
    made = double(backend=backend)
    made.trt.plans = lambda content: None
    message = rf"segment_01\.plan .*: Version tag does not match -> build target {backend}-fp16"
    with made.load() as engine, pytest.raises(ArtifactError, match=message):
        engine.predict(["rain"])


@pytest.mark.parametrize(
    ("call", "fails"),
    [
        ("execute_async_v3", False),
        ("set_tensor_address", False),
        ("set_input_shape", False),
        (
            "set_optimization_profile_async",
            RuntimeError("Error in set optimization profile async."),
        ),
        ("infer_shapes", ["tokens"]),
        ("infer_shapes", RuntimeError("")),
    ],
)
def test_a_call_that_fails_says_why(
    call: str, fails: Any, made: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first error is the cause; errors of earlier calls have nothing to do with it."""

    def refuses(*_: Any) -> Any:
        made.trt.report(*reasons)
        if isinstance(fails, Exception):
            raise fails
        return fails

    with made.load() as engine:
        made.trt.report("an earlier error")
        monkeypatch.setattr(FakeContext, call, refuses)
        reasons = ["no kernel\n", "no segment"]
        with pytest.raises(BackendError, match=r": no kernel; no segment -> build the target"):
            engine.predict(["rain"])
        reasons = ["OutOfMemory (Requested size was 8 bytes.)"]
        with pytest.raises(BackendError, match=r": OutOfMemory [^;]* -> close other"):
            engine.predict(["rain"])
        reasons = []
        with pytest.raises(BackendError, match="no reason"):
            engine.predict(["rain"])


def test_rtx_keeps_what_the_device_compiled(
    double: Callable[..., Double],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = compiled_cache.folder()

    def kept() -> list[bytes]:
        names = (path.name for path in sorted(folder.iterdir()))
        return [bytes(compiled_cache.read(name) or b"") for name in names]

    made = double(backend="tensorrt-rtx")
    before = sorted(made.folder.rglob("*"))
    with made.load() as engine:
        engine.predict(["rain"])
        assert not folder.exists(), "calls keep nothing"
    assert kept() == [b"compiled 3"]
    with made.load() as engine:
        engine.predict(["rain"])
    assert kept() == [b"compiled 6"], "the next process starts with what the first one kept"
    assert sorted(made.folder.rglob("*")) == before, "a folder must stay verifiable"
    (path,) = folder.iterdir()
    compiled_cache.write(path.name, b"of another driver")
    with made.load() as engine:
        engine.predict(["rain"])
    assert kept() == [b"compiled 3"]
    assert "for another driver" in caplog.text
    set_gpu(monkeypatch, CudaDevice("Another GPU", "8.6", (13, 0)))
    with made.load() as engine:
        engine.predict(["rain"])
    assert kept() == [b"compiled 3"] * 2, "what another GPU compiled is not read"


@pytest.mark.parametrize("how", ["check", "warm_up", "scheduler"])
def test_rtx_keeps_it_once_and_before_the_end(
    how: str, double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written before the process ends, which may be killed, and then only if it changed."""
    made = double(backend="tensorrt-rtx", batch_sizes=(1, 64), sequence_lengths=(16, 64))
    write = Mock(wraps=compiled_cache.write)
    monkeypatch.setattr(compiled_cache, "write", write)
    with made.load(check=how == "check") as engine:
        if how == "warm_up":
            engine.warm_up()
        if how == "scheduler":
            with Scheduler(engine) as scheduler:
                scheduler.warm_up()
        assert write.call_count == 1
        engine.warm_up()
        writes = write.call_count
        assert writes == 1 + (how == "check"), "the check runs other shapes"
        engine.predict(["rain"])
    assert write.call_count == writes


@pytest.mark.parametrize(
    ("problem", "level"), [("nothing to serialize", "WARNING"), ("full disk", "INFO")]
)
def test_a_cache_that_cannot_be_kept_loses_no_answer(
    problem: str,
    level: str,
    double: Callable[..., Double],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    made = double(backend="tensorrt-rtx")
    if problem == "full disk":
        full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    else:
        monkeypatch.setattr(FakeRuntimeCache, "serialize", lambda cache: None)
    with made.load() as engine:
        engine.warm_up(tokens=1)
        assert len(engine.predict(["rain"])) == 1
    told = "compiled graphs are not kept"
    assert [(each.levelname, each.message.split(":")[0]) for each in caplog.records] == [
        (level, told)
    ] * 2


def test_an_error_of_the_cache_leaves_the_execution_to_others(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    with double(backend="tensorrt-rtx").load() as engine:
        with monkeypatch.context() as patch:
            patch.setattr(FakeRuntimeCache, "serialize", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                engine.warm_up(tokens=1)
        assert len(engine.predict(["rain"])) == 1
