"""What an engines folder says of itself after something was, or was not, added to it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from fpabee.exporter.add_targets import AddTargetsOptions, add_targets
from fpabee.exporter.cli.export import main as export
from fpabee.exporter.precision.formats import Half
from fpabee.exporter.targets import tensorrt
from fpabee.exporter.targets.options import PlanOptions
from fpabee.exporter.targets.plan_worker import PlanRequest, PlanResult
from fpabee.runtime import BackendError, Engine, FPabee, read_manifest
from fpabee.runtime.cli.inspect import main as inspect

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")

SMALL = PlanOptions((1, 2, 4), (8, 16, 32), ("8.6",))


def test_what_was_not_built_stands_in_the_manifest(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy()
    result = add_targets(folder, AddTargetsOptions((Half.FP16,), plans=SMALL))
    assert result.built == ("tensorrt-rtx-fp16",)
    (name,) = result.not_built
    left = read_manifest(folder).not_built[name]
    assert name == "tensorrt-fp16"
    assert left.command == "fpabee-export --from ENGINES --backend tensorrt --fp16"
    assert "tensorrt is not installed" in left.reason
    said = CliRunner().invoke(inspect, [str(folder)]).stdout
    assert f"not built: tensorrt-fp16: {left.reason}\n" in said
    assert f"there: fpabee-export --from {folder} --backend tensorrt --fp16\n" in said


@pytest.mark.parametrize(
    ("error", "command"), [("no tactics", "--fp16"), ("out of memory", "--fp16 --resume")]
)
def test_a_failed_build_is_noted_until_it_succeeds(
    error: str, command: str, engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    options = AddTargetsOptions((Half.FP16,), backends=("tensorrt-rtx",), plans=SMALL)
    add_targets(folder, options)
    worker = tensorrt._run_worker

    def fails(request: PlanRequest) -> PlanResult:
        if request.plan.endswith("segment_02.plan"):
            return PlanResult(error=error)
        return worker(request)

    other = AddTargetsOptions(
        (Half.FP16,), backends=("tensorrt-rtx",), plans=PlanOptions((1, 1, 2), (8, 8, 16), ("8.6",))
    )
    with monkeypatch.context() as patch:
        patch.setattr(tensorrt, "_run_worker", fails)
        with pytest.raises(BackendError, match=f"first segment_02: {error}"):
            add_targets(folder, other)
    manifest = read_manifest(folder)
    assert error in manifest.not_built["tensorrt-rtx-fp16"].reason
    assert manifest.not_built["tensorrt-rtx-fp16"].command.endswith(command)
    assert manifest.precisions["fp16"].keys() == manifest.graphs.keys()
    assert "onnxruntime-fp16-cuda" in manifest.targets
    assert "tensorrt-rtx-fp16" not in manifest.targets, "its plans were written over"
    with Engine.load(folder) as engine:
        assert len(engine.predict(["rain"])) == 1
    add_targets(folder, other)
    manifest = read_manifest(folder)
    assert "tensorrt-rtx-fp16" in manifest.targets
    assert manifest.not_built == {}


def test_points_stay_with_their_plans_and_are_named_when_lost(
    engine_copy: Callable[..., Path], set_points: Callable[..., None]
) -> None:
    folder, name = engine_copy(), "tensorrt-rtx-fp32"
    options = AddTargetsOptions(backends=("tensorrt-rtx",), plans=SMALL)
    add_targets(folder, options)
    set_points(folder, name, default="fast", fast=FPabee(threshold=0.3))
    again = add_targets(folder, replace(options, resume=True))
    assert again.lost_points == {}
    assert read_manifest(folder).targets[name].default_operating_point == "fast"
    shapes = ["--batch", "1,1,2", "--sequence", "8,8,16", "--sm", "86"]
    command = ["--from", str(folder), "--backend", "tensorrt-rtx", "--quiet", *shapes]
    said = CliRunner().invoke(export, command).stdout
    assert f"not valid any more: fast of {name}" in said
    assert f"fpabee-calibrate {folder} --data DATA --target {name}" in said
    assert read_manifest(folder).targets[name].operating_points == {}


def test_building_needs_neither_torch_nor_transformers_nor_onnx(
    engine_copy: Callable[..., Path],
) -> None:
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
    assert "built tensorrt-rtx-fp32" in done.stdout
