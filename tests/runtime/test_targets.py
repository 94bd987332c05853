"""Which target runs, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from fpabee.calibration import calibrate
from fpabee.runtime import BackendError, Engine, FPabee, read_manifest
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.backends import openvino
from fpabee.runtime.machine import CudaDevice
from fpabee.runtime.targets import why_not

from ..calibration.conftest import label_rows
from ..doubles.device import GPU, install, install_cuda_provider, set_gpu
from ..doubles.openvino import add_openvino

FP32 = "onnxruntime-fp32"
PLAN = "tensorrt-fp32-sm86"


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings about targets; a folder that a fixture exports logs other things."""
    return [record.message for record in caplog.records if record.name.endswith(".targets")]


@pytest.mark.parametrize("case", ["said", "no gpu", "chosen by hand", "named", "the default"])
def test_a_gpu_that_the_default_target_does_not_use_is_named_once(
    case: str,
    engine_copy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = engine_copy()
    install(monkeypatch, folder)
    set_gpu(monkeypatch, CudaDevice(error="no GPU") if case == "no gpu" else GPU)
    manifest = msgspec.structs.replace(
        read_manifest(folder),
        default_is_fixed=case == "chosen by hand",
        default_target=PLAN if case == "the default" else FP32,
    )
    EnginesFolder(folder, manifest).write()
    for _ in range(2):
        with Engine.load(folder, target=FP32 if case == "named" else None) as engine:
            assert engine.target == (PLAN if case == "the default" else FP32)
    warnings = told(caplog)
    assert len(warnings) == (case == "said")
    assert all(f"default target {FP32}" in each and PLAN in each for each in warnings)


def test_of_targets_for_the_gpu_the_one_that_was_built_for_it_or_has_the_same_points_is_named(
    engine_copy: Callable[..., Path],
    set_points: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = engine_copy()
    install_cuda_provider(monkeypatch, folder)
    install(monkeypatch, folder)
    assert list(read_manifest(folder).targets) == [FP32, "onnxruntime-fp32-cuda", PLAN]
    Engine.load(folder).close()
    assert f"but {PLAN} can run on the GPU" in caplog.text
    manifest = read_manifest(folder)
    EnginesFolder(folder, manifest).with_target("other", manifest.targets[PLAN]).write()
    for name in (FP32, "other"):
        set_points(folder, name, default="fast", fast=FPabee(threshold=0.3))
    Engine.load(folder).close()
    assert "but other can run on the GPU" in caplog.text


def test_a_target_without_points_says_so_before_it_runs(
    engine_copy: Callable[..., Path],
    set_points: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = engine_copy()
    rows = label_rows(folder, count=60)
    set_points(folder, "copy", default="fast", fast=FPabee(threshold=0.3))
    Engine.load(folder, target="copy").close()
    Engine.load(folder, rule=FPabee(threshold=0.3)).close()
    calibrate(folder, rows)
    assert told(caplog) == []
    set_points(folder)
    for _ in range(2):
        Engine.load(folder).close()
    (warning,) = told(caplog)
    assert f"{FP32} has no operating points, unlike copy" in warning


def test_a_folder_that_this_machine_cannot_run_gives_the_error_of_its_default_target(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    install(monkeypatch, folder)
    manifest = read_manifest(folder)
    targets = {PLAN: manifest.targets[PLAN]}
    EnginesFolder(folder, manifest).with_manifest(targets=targets, default_target=PLAN).write()
    set_gpu(monkeypatch, CudaDevice(error="there is no GPU in this test"))
    with pytest.raises(BackendError, match="there is no GPU in this test"):
        Engine.load(folder)


@pytest.mark.parametrize(
    ("flags", "capabilities", "runs"),
    [
        ("avx2 avx_vnni", [], False),
        ("avx512_vnni", ["BF16"], False),  # it would be emulated
        ("avx512_vnni avx512_bf16", ["BF16"], True),
        ("avx512_vnni amx_bf16", ["BF16"], True),
    ],
)
def test_what_runs_in_bf16_is_refused_on_cpus_that_lack_it(
    flags: str,
    capabilities: list[str],
    runs: bool,
    engine_copy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Points hold for one precision only, so the rest of int8 never runs in another one."""
    folder = engine_copy()
    add_openvino(folder, "int8", "int8-bf16", "bf16")
    core = SimpleNamespace(get_property=lambda device, name: capabilities)
    monkeypatch.setattr(openvino, "_core", lambda: core)
    monkeypatch.setattr(openvino, "cpu_info", lambda: {"flags": flags})
    manifest = read_manifest(folder)
    assert why_not(manifest, "openvino-int8") is None
    for name in ("openvino-bf16", "openvino-int8-bf16"):
        refused = why_not(manifest, name)
        assert (refused is None) == runs
        if not runs:
            assert f"{name} needs a CPU with bf16 instructions" in str(refused)
            with pytest.raises(BackendError, match=r"bf16 instructions.*openvino-fp32"):
                Engine.load(folder, name)
