"""A request as one CUDA graph, over the double of the driver, against the segments one by one."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fpabee.runtime import (
    BackendError,
    Budget,
    Confidence,
    Engine,
    Entropy,
    Epee,
    ExitRule,
    FPabee,
    Pabee,
)
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.backends.request_graph import Board
from fpabee.runtime.cli.inspect import main
from fpabee.runtime.inspection import target_states

from ...bad_input.cases import changed_heads
from ...conftest import add_exit_0
from ...doubles.decide import compiled
from ...doubles.device import GPU, NEW_DRIVER, Double, set_gpu

TEXTS = ["the film is not good", "rain", "", "turn the lights on and play music", "book a table"]
RULES = [
    FPabee(threshold=0.6, patience=2),
    FPabee(threshold=3.0),
    Entropy(threshold=0.3),
    Pabee(patience=1, min_exit=2),
    Epee(threshold=(0.5, 0.7, 0.1), patience=1),
    Budget(exit=1),
    Budget(exit=3),
]


@pytest.fixture
def pair(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Double, Engine, Engine]]:
    """A double, an engine that runs requests as one graph, and one that runs segments."""

    def make(family: str = "bert", exit_0: bool = False, **settings: Any) -> Any:
        compiled()  # the test is skipped if that is not possible
        made = double(family, **settings)
        if exit_0:
            add_exit_0(made.folder)
        stepwise = made.load()
        set_gpu(monkeypatch, NEW_DRIVER)
        return made, made.load(), stepwise

    return make


def same(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found.exits, expected.exits)
    np.testing.assert_array_equal(found.logits, expected.logits)


@pytest.mark.parametrize(
    ("family", "backend", "exit_0"),
    [
        ("bert", "tensorrt", False),
        ("bert", "tensorrt", True),
        ("albert", "tensorrt-rtx", False),
        ("mpnet", "tensorrt", False),
    ],
)
def test_exits_and_logits_are_those_of_the_stepwise_path(
    family: str, backend: str, exit_0: bool, pair: Callable[..., Any]
) -> None:
    shapes = {"batch_sizes": (1, 2, 8), "sequence_lengths": (1, 8, 16, 64)}
    made, engine, stepwise = pair(family, exit_0, backend=backend, **shapes)
    rules: list[ExitRule] = list(RULES)
    if exit_0:
        rules = [dataclasses.replace(rule, exit_0_threshold=0.7) for rule in rules]
    exits = set()
    with engine, stepwise:
        for texts in (TEXTS[:1], TEXTS[3:4], TEXTS, TEXTS[:2]):
            for rule in rules:
                found = engine.trace(texts, rule=rule)
                same(found, stepwise.trace(texts, rule=rule))
                exits |= set(found.exits.tolist())
                one = engine.predict(texts[:1], rule=rule)[0]
                assert one == stepwise.predict(texts[:1], rule=rule)[0]
        assert exits == set(range(0 if exit_0 else 1, 4))
        assert set(made.cuda.ran_parts) == {1, 2, 3}
    assert not any((made.cuda.memory_of, made.cuda.streams, made.cuda.events, made.cuda.graphs))


def test_a_request_is_one_launch_and_one_wait(pair: Callable[..., Any]) -> None:
    """Whatever the rule, the operating point and the deadline: nothing is captured again."""
    made, engine, stepwise = pair()
    with engine, stepwise:
        for _ in range(2):
            engine.predict(TEXTS[:1], rule=Budget(exit=1))
        assert made.cuda.captures == 1, "also segments that have not run"
        engine.predict(TEXTS[:1], deadline_ms=60_000)  # times the segments
        captures = made.cuda.captures
        wasted = engine.reset_tally().wasted
        for rule in [*RULES, Confidence(threshold=0.5, max_exit=2)]:
            made.cuda.calls.clear()
            engine.predict(TEXTS[:1], rule=rule)
            calls = {name for name in made.cuda.calls if name not in ("view", "put")}
            assert calls == {"launch", "synchronize"}
            assert made.cuda.calls["launch"] == made.cuda.calls["synchronize"] == 1
        engine.predict(TEXTS[:1], deadline_ms=60_000)
        assert made.cuda.captures == captures
        assert engine.tally.wasted == 0 < wasted, "the stepwise path looks ahead"


def test_rows_that_stop_early_keep_their_answer(pair: Callable[..., Any]) -> None:
    made, engine, stepwise = pair()
    rule = Entropy(threshold=0.3)
    with engine, stepwise:
        for _ in range(3):
            found, expected = (each.predict(TEXTS, rule=rule) for each in (engine, stepwise))
            assert found == expected
        deepest = max(prediction.exit for prediction in found)
        assert min(prediction.exit for prediction in found) < deepest
        assert made.cuda.ran_parts[-1] == deepest
        beyond = sum(deepest - prediction.exit for prediction in found)
        engine.reset_tally()
        engine.predict(TEXTS, rule=rule)
        assert engine.tally.wasted == beyond


def test_a_request_is_captured_again_if_the_scratch_memory_moves(pair: Callable[..., Any]) -> None:
    made, engine, stepwise = pair(batch=(1, 2, 4), batch_sizes=(1, 2, 4))
    with engine, stepwise:
        expected = stepwise.trace(TEXTS[:1])
        for _ in range(3):
            engine.trace(TEXTS[:1])
        (execution,) = engine.model._backend._idle
        execution._scratch_size = 0  # as if another segment needed more
        engine.time_exits(1, 30)
        captures, ran = made.cuda.captures, len(made.cuda.ran_parts)
        for _ in range(3):
            same(engine.trace(TEXTS[:1]), expected)
        assert made.cuda.captures == captures + 1
        assert len(made.cuda.graphs) == 1, "the old graph is destroyed"
        assert len(made.cuda.ran_parts) == ran + 3


class Unknown(Budget):
    """A rule that is not part of the package."""


@pytest.mark.parametrize("texts", [["rain"] * 33, ["rain " * 40] * 7])
def test_large_groups_and_unknown_rules_run_segment_by_segment(
    texts: list[str], pair: Callable[..., Any]
) -> None:
    made, engine, stepwise = pair(batch=(1, 8, 64))
    with engine, stepwise:
        for _ in range(3):
            same(engine.trace(texts), stepwise.trace(texts))
            rule = Unknown(exit=2)
            same(engine.trace(TEXTS[:1], rule=rule), stepwise.trace(TEXTS[:1], rule=rule))
    assert made.cuda.ran_parts == []


@pytest.mark.parametrize(
    "kind",
    [
        *("capture", "run in a capture", "malloc", "pinned", "event"),
        *("PTX for another architecture", "plans that cannot be captured"),
    ],
)
def test_a_request_that_cannot_be_captured_runs_segment_by_segment(
    kind: str, pair: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """For lack of memory, for example. It is said once, nothing leaks, and answers stay right."""
    is_old = kind == "plans that cannot be captured"  # older builds for TensorRT for RTX
    made, engine, stepwise = pair(backend="tensorrt-rtx" if is_old else "tensorrt")
    with engine, stepwise:
        expected = stepwise.trace(TEXTS[:1], rule=Budget(exit=1))
        same(engine.trace(TEXTS[:1], rule=Budget(exit=1)), expected)
        if is_old:
            made.trt.runs_before_capture = 1000
        elif kind == "malloc":
            made.cuda.room = made.used()
        elif kind == "PTX for another architecture":
            made.cuda.loads_kernels = False
        else:
            made.cuda.fails_at[kind] = 1
        for _ in range(3):
            same(engine.trace(TEXTS[:1], rule=Budget(exit=1)), expected)
        assert made.cuda.ran_parts == []
        assert caplog.text.count("requests run segment by segment") == 1
        made.cuda.room, made.cuda.loads_kernels = 1 << 30, True
        made.trt.runs_before_capture = 1
        for _ in range(2):  # another shape is tried again
            same(engine.trace(TEXTS), stepwise.trace(TEXTS))
        assert len(made.cuda.ran_parts) == 1
        assert caplog.text.count("requests run segment by segment") == 1
    assert made.cuda.memory_of == {}
    assert made.cuda.graphs == {}


def test_closing_during_a_request(
    pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is answered and then frees everything."""
    made, engine, stepwise = pair()
    with stepwise:
        expected = stepwise.predict(TEXTS[:1])
    for _ in range(2):
        engine.predict(TEXTS[:1])
    begun, closed = threading.Event(), threading.Event()
    launch = type(made.cuda).launch

    def waits(cuda: Any, *arguments: Any) -> None:
        begun.set()
        assert closed.wait(60)
        launch(cuda, *arguments)

    monkeypatch.setattr(type(made.cuda), "launch", waits)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(engine.predict, TEXTS[:1])
        assert begun.wait(60)
        engine.close()
        closed.set()
        assert answer.result() == expected
    assert not any((made.cuda.memory_of, made.cuda.streams, made.cuda.events, made.cuda.graphs))


def test_a_request_that_fails_is_an_error(
    pair: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, engine, stepwise = pair()
    synchronize = type(made.cuda).synchronize

    def fails(cuda: Any, stream: int) -> None:
        synchronize(cuda, stream)
        raise BackendError("CUDA: an illegal address (error 700)", "")

    with engine, stepwise:
        for _ in range(2):
            engine.predict(TEXTS[:1])
        monkeypatch.setattr(type(made.cuda), "synchronize", fails)
        with pytest.raises(BackendError, match="illegal address"):
            engine.predict(TEXTS[:1])
        monkeypatch.setattr(type(made.cuda), "synchronize", synchronize)
        assert len(engine.predict(TEXTS[:1])) == 1


def test_logits_that_are_not_finite_are_refused(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = double()
    (graph,) = made.folder.rglob("segment_02.onnx")
    file = graph.relative_to(made.folder).as_posix()
    changed_heads(made.folder, file, lambda values: values * np.float32(np.nan))
    made.change_plan("segment_02", onnx_sha256=sha256_of(graph))
    set_gpu(monkeypatch, NEW_DRIVER)
    with made.load() as engine:
        for texts in (TEXTS[:1], TEXTS):
            for _ in range(3):
                assert len(engine.predict(texts, rule=Budget(exit=1))) == len(texts)
                with pytest.raises(BackendError, match="not finite numbers at exit 2"):
                    engine.predict(texts, rule=Budget(exit=3))
    assert made.cuda.ran_parts


@pytest.mark.parametrize(
    ("driver", "bindings", "says"),
    [
        ((12, 2), "12.9.1", "segment by segment.*needs a driver for CUDA 12.4.*is for CUDA 12.2"),
        ((0, 0), "12.9.1", "segment by segment.*does not tell its version"),
        ((12, 6), "12.3.0", "segment by segment.*needs cuda-bindings 12.4, and 12.3.0 is"),
        ((12, 4), "12.9.1", "^as one CUDA graph"),
        ((13, 0), "13.5.0", "^as one CUDA graph"),
    ],
)
def test_the_state_of_a_target_says_which_way_is_used(
    driver: tuple[int, int],
    bindings: str,
    says: str,
    double: Callable[..., Double],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = double()
    set_gpu(monkeypatch, dataclasses.replace(GPU, cuda=driver))
    version = metadata.version
    monkeypatch.setattr(
        metadata,
        "version",
        lambda name: bindings if name == "cuda-bindings" else version(name),
    )
    with made.load() as engine:
        for _ in range(3):
            engine.predict(TEXTS[:1])
        states = {state.name: state for state in target_states(made.folder, engine.manifest)}
    assert re.search(says, states[made.target].how)
    assert states["onnxruntime-fp32"].how == ""
    shown = CliRunner().invoke(main, [str(made.folder)], env={"COLUMNS": "400"}).stdout
    assert f" runs {states[made.target].how}" in shown
    assert bool(made.cuda.ran_parts) == states[made.target].how.startswith("as one")


def test_the_check_says_which_way_a_request_ran(
    double: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled()
    made = double()

    def check(code: int = 0) -> str:
        shown, as_json = (
            CliRunner().invoke(main, [str(made.folder), "--check", *flag])
            for flag in ((), ("--json",))
        )
        assert shown.exit_code == code, shown.output
        found: dict[str, str] = json.loads(as_json.stdout)["check"]["how"]
        lines = [f"{name} ran a request of one text {how}" for name, how in found.items()]
        assert [line for line in shown.stdout.splitlines() if " ran a " in line] == lines
        assert "onnxruntime-fp32" not in found, "on the CPU there is only one way"
        return found.get(made.target, "")

    assert check().startswith("segment by segment: it needs a driver for CUDA 12.4")
    assert made.cuda.ran_parts == []
    set_gpu(monkeypatch, NEW_DRIVER)
    assert check() == "as one CUDA graph"
    assert set(made.cuda.ran_parts) == {3}
    made.cuda.loads_kernels = False
    assert check() == "segment by segment: CUDA: no kernel image for this device (error 209)"
    made.cuda.loads_kernels = True
    with monkeypatch.context() as patch:
        patch.setattr("fpabee.runtime.backends.device_buffers._CAPTURE_TOKENS", 0)
        assert check() == "segment by segment: no request was small enough for a CUDA graph"
    read = Board.read
    monkeypatch.setattr(Board, "read", lambda *given: (read(*given)[0], -read(*given)[1]))
    assert check(code=1) == "", "its logits are compared with the PyTorch model"
