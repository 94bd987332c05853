"""What the manifest says after something was added to a folder, or could not be."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from fpabee.exporter.add_targets import AddTargetsOptions, add_targets
from fpabee.exporter.cli.export import main as export
from fpabee.exporter.targets import tensorrt
from fpabee.exporter.targets.backends import TENSORRT
from fpabee.exporter.targets.plan_worker import PlanRequest
from fpabee.exporter.targets.plans import PlanOptions
from fpabee.runtime import BackendError, Engine, FPabee, VerificationError, read_manifest
from fpabee.runtime.agreement import REQUIREMENTS

from ..bad_input.cases import changed_heads
from ..doubles.device import Double

SMALL = PlanOptions((1, 2, 4), (8, 16, 32), ("8.6",))
OPTIONS = AddTargetsOptions(backends=(TENSORRT,), plans=SMALL)
NAME = "tensorrt-fp32-sm86"


def patch_builds(double: Double, monkeypatch: pytest.MonkeyPatch, **errors: str) -> None:
    """Let builds give other plans than before, and some of them errors."""

    def other(module: str, request: PlanRequest, **environment: str) -> str:
        plan = Path(request.plan)
        if plan.stem in errors:
            return errors[plan.stem]
        double.build(module, request, **environment)
        plan.write_bytes(plan.read_bytes() + b"other")
        return ""

    monkeypatch.setattr(tensorrt, "run_worker", other)


def test_the_result_says_what_was_not_built(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    add_targets(folder, AddTargetsOptions(fp16=True, backends=()))
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        result = add_targets(folder, AddTargetsOptions(plans=SMALL))
        said = CliRunner().invoke(export, ["--from", str(folder), "--quiet"]).stdout
    install = "pip install 'fpabee[tensorrt-{}cu13]'"
    assert {one.name: one.refused.hint for one in result.checked if one.refused} == {
        "tensorrt-fp16": install.format(""),
        "tensorrt-rtx-fp16": install.format("rtx-"),
    }
    assert f"not added: tensorrt-fp16: tensorrt is not installed -> {install.format('')}\n" in said


def test_a_failed_build_removes_the_target_until_it_succeeds(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = add_targets(double.folder, OPTIONS).manifest.targets[NAME]
    assert built.tolerance is not None, "it was verified"
    with monkeypatch.context() as patch:
        patch_builds(double, patch, segment_02="no tactics")
        with pytest.raises(BackendError, match="segment_02: no tactics"):
            add_targets(double.folder, OPTIONS)
    manifest = read_manifest(double.folder)
    assert NAME not in manifest.targets, "its plans were replaced"
    with Engine.load(double.folder) as engine:
        assert len(engine.predict(["rain"])) == 1
    add_targets(double.folder, OPTIONS)
    manifest = read_manifest(double.folder)
    assert manifest.targets[NAME] == built


def test_points_stay_with_their_plans_and_are_named_when_lost(
    double: Double, set_points: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_targets(double.folder, OPTIONS)
    set_points(double.folder, NAME, default="fast", fast=FPabee(threshold=0.3))
    assert add_targets(double.folder, OPTIONS).lost_points == {}
    assert read_manifest(double.folder).targets[NAME].default_operating_point == "fast"
    only_default = AddTargetsOptions(default_target=NAME)
    assert add_targets(double.folder, only_default).checked == [], "it is there"
    patch_builds(double, monkeypatch)
    assert add_targets(double.folder, OPTIONS).lost_points == {NAME: ("fast",)}
    assert read_manifest(double.folder).targets[NAME].operating_points == {}


def test_a_target_that_does_not_reproduce_the_model_is_removed(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_targets(double.folder, OPTIONS)
    patch_builds(double, monkeypatch)
    monkeypatch.setitem(REQUIREMENTS, "fp32", dataclasses.replace(REQUIREMENTS["fp32"], labels=1.1))
    with pytest.raises(VerificationError, match="removed from the manifest"):
        add_targets(double.folder, OPTIONS)
    assert NAME not in read_manifest(double.folder).targets


def test_new_graphs_of_a_precision_remove_the_plans_of_the_old_ones(double: Double) -> None:
    options = dataclasses.replace(OPTIONS, fp16=True)
    name = add_targets(double.folder, options).checked[-1].name
    # With texts, graphs are made again.
    again = dataclasses.replace(options, backends=(), verify_data=["the film"])
    assert name in add_targets(double.folder, again).manifest.targets, "the graphs are the same"
    changed_heads(double.folder, "onnx/fp32/segment_02.onnx", lambda weight: 1.0001 * weight)
    assert name not in add_targets(double.folder, again).manifest.targets


@pytest.mark.slow
def test_building_needs_neither_torch_nor_transformers_nor_onnx(
    engine_copy: Callable[..., Path],
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    folder = engine_copy()
    command = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
        "from fpabee.exporter.cli.export import main\n"
        "main()"
    )
    arguments = ["--from", str(folder), "--backend", "tensorrt-rtx", "--sm", "86", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "added tensorrt-rtx-fp32: not run here" in done.stdout
