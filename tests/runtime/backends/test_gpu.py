"""Build targets and run them, on a GPU and over the double of the driver.

Over the double, the builder of TensorRT is a double too, but TensorRT for RTX builds real plans.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fpabee.exporter.targets import build_targets
from fpabee.exporter.targets.plans import RTX_CAPABILITIES, PlanOptions
from fpabee.runtime import Engine, FPabee
from fpabee.runtime.artifact.manifest import Manifest
from fpabee.runtime.backends.onnxruntime_cuda import PROVIDER
from fpabee.runtime.backends.tensorrt import MODULES
from fpabee.runtime.machine import cuda_device
from fpabee.runtime.targets import why_not

from ...doubles.device import GPU, TEXTS, serve, serve_cuda_provider

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime")
THRESHOLD = 3.0
"""With this threshold some of the texts stop early."""
DIFFERENCE = 0.05
"""Largest difference that fp16 may make to a logit; logits go up to about 10."""


@dataclass(frozen=True)
class Built:
    """An engines folder with a target that was built on a machine with a GPU.

    Attributes:
        folder: the folder.
        manifest: its manifest.
        target: the target's name.
        compute_capability: of the GPU.
    """

    folder: Path
    manifest: Manifest
    target: str
    compute_capability: str


def _build(folder: Path, backend: str, compute_capability: str) -> Built:
    plans = PlanOptions(
        batch=(1, 4, 16),
        sequence=(2, 16, 64),
        compute_capabilities=(compute_capability,),
    )
    name = f"{backend}-fp16" if backend in MODULES else "onnxruntime-fp16-cuda"
    result = build_targets(folder, [name], plans=plans)
    (target,) = result.added
    return Built(folder, result.manifest, target, compute_capability)


def _no_gpu_for(backend: str) -> str:
    """Why a backend has no GPU here; empty if it has one."""
    device = cuda_device()
    if device.error:
        return device.error
    if backend in MODULES:
        pytest.importorskip(MODULES[backend], reason=f"{MODULES[backend]} is not installed")
    if backend == "onnxruntime":
        ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
        return "" if PROVIDER in ort.get_available_providers() else f"there is no {PROVIDER}"
    if backend == "tensorrt-rtx" and device.compute_capability not in RTX_CAPABILITIES:
        return f"TensorRT for RTX does not know compute capability {device.compute_capability}"
    return ""


@pytest.fixture(scope="module", params=["double", pytest.param("gpu", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=BACKENDS)
def built(
    request: pytest.FixtureRequest,
    where: str,
    engines: Mapping[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Built]:
    backend = str(request.param)
    folder = tmp_path_factory.mktemp("gpu") / "engines"
    shutil.copytree(engines["mpnet"], folder)
    if where == "gpu":
        unavailable_reason = _no_gpu_for(backend)
        if unavailable_reason:
            pytest.skip(unavailable_reason)
        yield _build(folder, backend, cuda_device().compute_capability)
        return
    with pytest.MonkeyPatch.context() as patch:
        if backend == "onnxruntime":
            serve_cuda_provider(patch)
        else:
            if backend == "tensorrt-rtx":
                pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
            serve(patch, folder, backend)
        yield _build(folder, backend, GPU.compute_capability)


def test_a_target_that_is_built_here_runs_and_is_verified(built: Built) -> None:
    assert why_not(built.manifest, built.target) is None
    target = built.manifest.targets[built.target]
    assert target.precision == "fp16"
    if target.backend in MODULES:
        assert target.compute_capabilities == (built.compute_capability,)
        assert target.tolerance is not None
        assert target.tolerance < DIFFERENCE


def test_answers_are_those_of_fp32_on_the_cpu(built: Built) -> None:
    with (
        Engine.load(built.folder, target=built.target) as engine,
        Engine.load(built.folder) as usual,
    ):
        for texts in (TEXTS, TEXTS[:1], TEXTS * 5):
            expected = usual.trace(texts).logits
            for _ in range(3):
                found = engine.trace(texts).logits
                np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
                assert np.nanmax(np.abs(found - expected)) < DIFFERENCE


def test_rows_that_exit_early_are_regrouped_on_the_device(built: Built) -> None:
    rule = FPabee(threshold=THRESHOLD)
    with (
        Engine.load(built.folder, target=built.target) as engine,
        Engine.load(built.folder) as usual,
    ):
        found, expected = (each.trace(TEXTS * 5, rule=rule) for each in (engine, usual))
    assert len(set(expected.exits.tolist())) > 1, "all rows stop at once"
    np.testing.assert_array_equal(found.exits, expected.exits)
    assert np.nanmax(np.abs(found.logits - expected.logits)) < DIFFERENCE
