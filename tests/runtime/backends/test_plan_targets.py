"""Where plans run, what happens when device memory is full, and when a graph is captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fpabee.runtime import BackendError, Engine
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.backends.cuda_probe import CudaDevice

from ...doubles.device import Double, set_gpu

HERE = "10.99"
MIB = 2**20


def check_runs(double: Double, times: int = 1) -> None:
    """Check that the double gives the same logits as the CPU."""
    with Engine.load(double.folder) as usual, double.load() as engine:
        for _ in range(times):
            found, expected = (each.trace(["rain"]).logits for each in (engine, usual))
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("hardware_compatible", "capability", "runs"),
    [
        (False, "8.6", True),
        (False, "8.9", False),
        (False, "12.0", False),
        (True, "8.0", True),
        (True, "8.9", True),
        (True, "9.0", True),
        (True, "12.0", True),
        (True, "7.5", False),
    ],
)
def test_gpus_that_plans_run_on(
    hardware_compatible: bool,
    capability: str,
    runs: bool,
    double: Callable[..., Double],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hardware-compatible plans run on Ampere and every later GPU."""
    made = double(hardware_compatible=hardware_compatible)
    set_gpu(monkeypatch, CudaDevice("another", capability))
    if runs:
        check_runs(made)
        return
    message = rf"compute capability 8\.6; this another has {capability} -> .*add_targets"
    with pytest.raises(BackendError, match=message):
        made.load()


@pytest.mark.parametrize(
    ("version_compatible", "built", "runs"),
    [
        (False, HERE, True),
        (False, "10.98.7", False),
        (True, HERE, True),
        (True, "10.98.7", True),
        (True, "10.3.0.26", True),
        (True, "9.100", True),
        (True, "10.100", False),
        (True, "11.0", False),
    ],
)
def test_versions_that_run_a_plan(
    version_compatible: bool, built: str, runs: bool, double: Callable[..., Double]
) -> None:
    """Version-compatible plans run on the version that built them and on later ones."""
    made = double(version_compatible=version_compatible, versions={"tensorrt": built})
    if runs:
        check_runs(made)
        return
    with pytest.raises(BackendError, match=rf"tensorrt {built}, .*tensorrt {HERE} is installed"):
        made.load()


@pytest.mark.parametrize("allowed", [False, True])
def test_only_version_compatible_plans_may_bring_code(
    allowed: bool, double: Callable[..., Double]
) -> None:
    with double(version_compatible=allowed).load() as engine:
        backend: Any = engine._backend
        assert backend._runtime.engine_host_code_allowed is allowed


def test_a_plan_that_does_not_fit_into_device_memory(double: Callable[..., Double]) -> None:
    made = double()
    plan = made.folder / "targets" / made.target / "segment_01.plan"
    plan.write_bytes(plan.read_bytes().ljust(5 * MIB, b"."))
    made.change_plan("segment_01", sha256=sha256_of(plan))
    plans, made.trt.plans = made.trt.plans, lambda content: None
    made.cuda.room = 3 * MIB
    with made.load() as engine:
        with pytest.raises(BackendError, match=r"no room for 5\.0 MiB: 3 of 3 MiB are free -> use"):
            engine.predict(["rain"])
        made.trt.plans, made.cuda.room = plans, 1024 * MIB
        assert len(engine.predict(["rain"])) == 1, "it can be tried again"


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_context_that_does_not_fit_into_device_memory(
    backend: str, double: Callable[..., Double]
) -> None:
    made = double(backend=backend)
    made.trt.contexts_left = 1
    made.cuda.room = 300 * MIB
    with made.load() as engine:
        message = r"no execution context for segment_02: .*; 300 of 300 MiB of device memory are"
        with pytest.raises(BackendError, match=message):
            engine.predict(["rain"])
        made.trt.contexts_left = 1000
        assert len(engine.predict(["rain"])) == 1, "it can be tried again"
    assert made.cuda.memory_of == {}


@pytest.mark.parametrize(
    ("backend", "graphs"), [("tensorrt", [0, 3, 3, 3]), ("tensorrt-rtx", [0, 0, 3, 3])]
)
def test_segments_are_captured_once_they_can_be(
    backend: str, graphs: list[int], double: Callable[..., Double]
) -> None:
    """For TensorRT this is after one run. TensorRT for RTX may compile first, so it is asked."""
    made = double(backend=backend)
    with made.load() as engine:
        for expected in graphs:
            engine.trace(["rain"])
            assert len(made.cuda.graphs) == expected
    assert made.cuda.graphs == {}


def test_segments_that_can_never_be_captured_are_run(double: Callable[..., Double]) -> None:
    made = double(backend="tensorrt-rtx")
    made.trt.runs_before_capture = 1000
    check_runs(made, times=4)
    assert made.cuda.launches == 0
