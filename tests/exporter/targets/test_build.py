"""Targets are built by name: verified or not kept, and whatever fails loses nothing."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from fpabee.calibration.progress import silent
from fpabee.exporter import staging
from fpabee.exporter.targets import (
    BuildResult,
    PlanOptions,
    build,
    build_targets,
    builders,
    tensorrt,
)
from fpabee.exporter.targets.builders import (
    BUILDERS,
    FP16_TARGETS,
    INT8_TARGETS,
    OPENVINO_TARGETS,
    Builder,
)
from fpabee.exporter.targets.check import FP32_TARGET, checked_target, engine_of, exact_logits
from fpabee.exporter.targets.plan_worker import PlanRequest
from fpabee.runtime import (
    ArtifactError,
    BackendError,
    CheckError,
    Engine,
    FPabee,
    FpabeeError,
    InputError,
    read_manifest,
)
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.backends import openvino
from fpabee.runtime.check import EXPORT_LIMIT, logit_differences
from fpabee.runtime.machine import package

from ...bad_input.cases import changed_heads, contents
from ...doubles.device import Double
from ...programs import python
from ..conftest import require

SMALL = PlanOptions((1, 2, 4), (8, 16, 32), ("8.6",))
PLAN = "tensorrt-fp32-sm86"
FP32 = "openvino-fp32"
needs_openvino = pytest.mark.skipif(
    BUILDERS[FP32].why_not() is not None, reason="OpenVINO is not installed"
)


def add(folder: Path, *names: str, texts: Sequence[str] = ()) -> BuildResult:
    return build_targets(folder, names, texts, SMALL)


def patch_builds(double: Double, monkeypatch: pytest.MonkeyPatch, **errors: str) -> None:
    """Let builds give other plans than before, and some of them errors."""

    def other(module: str, request: PlanRequest, **environment: str) -> str:
        plan = Path(request.plan)
        if plan.name in errors:
            return errors[plan.name]
        double.build(module, request, **environment)
        plan.write_bytes(plan.read_bytes() + b"other")
        return ""

    monkeypatch.setattr(tensorrt, "run_worker", other)


def test_an_unknown_name_is_refused_with_what_this_machine_can_build(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    can = {"openvino-fp32", "onnxruntime-int8"}

    def why_not(builder: Builder) -> FpabeeError | None:
        return None if builder.name in can else BackendError("not here")

    for kind in {type(builder) for builder in BUILDERS.values()}:
        monkeypatch.setattr(kind, "why_not", why_not)
    with pytest.raises(InputError, match="no target 'openvino-fp8'") as refused:
        add(engines["bert"], FP32, "openvino-fp8")
    assert refused.value.hint == "this machine can build openvino-fp32, onnxruntime-int8"
    assert {*OPENVINO_TARGETS, *INT8_TARGETS, *FP16_TARGETS} == BUILDERS.keys()


@needs_openvino
def test_a_target_that_cannot_be_built_does_not_stop_the_others(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = add(folder, "tensorrt-fp16", FP32, "tensorrt-rtx-fp16", FP32)
    assert {name: error.hint for name, error in result.refused.items()} == {
        "tensorrt-fp16": f"pip install {package('tensorrt-cu13')}",
        "tensorrt-rtx-fp16": f"pip install {package('tensorrt-rtx-cu13')}",
    }
    assert list(result.added) == [FP32]
    agreement = result.added[FP32]
    assert agreement is not None
    assert agreement.rows == 12
    assert FP32 in read_manifest(folder).targets


def test_without_its_library_a_target_is_refused(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    before = contents(folder)
    monkeypatch.setitem(sys.modules, "openvino", None)
    openvino._core.cache_clear()
    result = add(folder, *OPENVINO_TARGETS)
    openvino._core.cache_clear()
    assert list(result.refused) == [*OPENVINO_TARGETS]
    for error in result.refused.values():
        assert "OpenVINO is not installed" in str(error)
    assert (result.added, result.default) == ({}, "")
    assert contents(folder) == before


@needs_openvino
def test_a_target_that_changes_answers_is_not_kept(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    before = contents(folder)
    require(monkeypatch, 1.1, "fp32")
    refused = add(folder, FP32).refused[FP32]
    assert isinstance(refused, CheckError)
    assert "not the model that was exported" in str(refused)
    assert contents(folder) == before


@needs_openvino
def test_texts_are_checked_as_well_and_are_within_the_tolerance(
    engine_copy: Callable[..., Path],
) -> None:
    folder = engine_copy()
    texts = ["the film is good", "turn on the light"]
    result = add(folder, FP32, texts=texts)
    agreement = result.added[FP32]
    assert agreement is not None
    assert agreement.rows == len(texts)
    engines = EnginesFolder.read(folder)
    measured = engines.manifest.targets[FP32].tolerance
    seen: list[tuple[str, int, int]] = []
    _, logits = exact_logits(engines, texts, lambda *state: seen.append(state))
    assert seen == [("run the exact target", 0, len(texts))]
    with engine_of(engines, FP32_TARGET) as engine:
        assert (logits == engine.trace(texts).logits).all()
    for difference in (0.0, 0.5):
        more = texts, logits + np.float32(difference)
        found, _ = checked_target(engines, FP32, more, silent)
        tolerance = found.manifest.targets[FP32].tolerance
        assert tolerance is not None
        expected = logit_differences(logits, more[1]).max()
        assert abs(tolerance - expected) <= max(EXPORT_LIMIT, measured or 0.0)
    with pytest.raises(CheckError, match=r"from exit 1 on \(2 texts\).* another target"):
        checked_target(engines, FP32, (texts, -logits), silent)
    without = engines.keep_targets(lambda name, _: name == FP32)
    with pytest.raises(BackendError, match="no target 'onnxruntime-fp32'"):
        exact_logits(without, texts)


@pytest.mark.parametrize("how", ["refused", "failed", "interrupted", "killed"])
def test_an_earlier_target_stays_until_the_new_one_has_passed(
    how: str, double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = add(double.folder, "tensorrt-fp32").manifest.targets[PLAN]
    assert built.tolerance is not None, "it was verified"
    before = contents(double.folder)
    with monkeypatch.context() as patch:
        patch_builds(double, patch, **{"segment_02": "no tactics"} if how == "failed" else {})
        if how in ("interrupted", "killed"):
            patch.setattr(build, "checked_target", lambda *_: 1 / 0)
        if how == "killed":  # nothing is tidied up then
            patch.setattr(builders.Workbench, "drop_unused_files", lambda _: None)
        if how == "refused":
            require(patch, 1.1, "fp32")
        if how in ("refused", "failed"):
            result = add(double.folder, "tensorrt-fp32")
            assert list(result.refused) == ["tensorrt-fp32"]
            reason = "segment_02: no tactics" if how == "failed" else "not the model"
            assert reason in str(result.refused["tensorrt-fp32"])
        else:
            with pytest.raises(ZeroDivisionError):
                add(double.folder, "tensorrt-fp32")
    after = contents(double.folder)
    timings = f"targets/{PLAN}/timing.cache"  # no answer depends on them
    same = {file: after.get(file) == sha256 for file, sha256 in before.items() if file != timings}
    assert all(same.values()), same
    assert (after.keys() == before.keys()) == (how != "killed")
    with Engine.load(double.folder, PLAN) as engine:
        engine.check()
    add(double.folder, "tensorrt-fp32")
    assert read_manifest(double.folder).targets[PLAN] == built
    assert contents(double.folder).keys() == before.keys(), "what was left is deleted"


def test_points_stay_with_their_files_and_are_named_when_lost(
    double: Double, set_points: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(double.folder, "tensorrt-fp32")
    set_points(double.folder, PLAN, default="fast", fast=FPabee(threshold=0.3))
    assert add(double.folder, "tensorrt-fp32").lost_points == {}
    assert read_manifest(double.folder).targets[PLAN].default_operating_point == "fast"
    patch_builds(double, monkeypatch)
    assert add(double.folder, "tensorrt-fp32").lost_points == {PLAN: ("fast",)}
    target = read_manifest(double.folder).targets[PLAN]
    assert (target.operating_points, target.default_operating_point) == ({}, "")


def test_a_file_of_somebody_else_beside_the_plans_stays(double: Double) -> None:
    add(double.folder, "tensorrt-fp32")
    mine = double.folder / "targets" / PLAN / "my.plan"
    mine.touch()
    add(double.folder, "tensorrt-fp32")
    assert mine.exists()


def test_new_graphs_of_a_precision_remove_the_plans_of_the_old_ones(
    double: Double, set_points: Callable[..., None]
) -> None:
    cuda = "onnxruntime-fp16-cuda"
    plan = "tensorrt-fp16-sm86"
    assert list(add(double.folder, "tensorrt-fp16", cuda).added) == [plan, cuda]
    for name in (plan, cuda):
        set_points(double.folder, name, fast=FPabee(threshold=0.3))
    # With texts, graphs are made again.
    again = add(double.folder, cuda, texts=["the film"])
    assert (again.lost_points, plan in again.manifest.targets) == ({}, True), "they are the same"
    changed_heads(double.folder, "onnx/fp32/segment_02.onnx", lambda weight: 1.0001 * weight)
    again = add(double.folder, cuda, texts=["the film"])
    assert plan not in again.manifest.targets
    assert again.lost_points == {plan: ("fast",), cuda: ("fast",)}
    files = {graph.file for graph in again.manifest.graphs_in("fp16").values()}
    left = {f"onnx/fp16/{path.name}" for path in (double.folder / "onnx" / "fp16").iterdir()}
    assert left == files, "older graphs are deleted"


def test_graphs_that_several_targets_run_are_made_once(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the first of these targets is refused, and the graphs remain for the others."""
    from fpabee.exporter.targets import fp16

    lowered_graphs = Mock(wraps=fp16.lowered_graphs)
    monkeypatch.setattr(fp16, "lowered_graphs", lowered_graphs)
    patch_builds(double, monkeypatch, segment_01="no tactics")
    names = ("tensorrt-fp16", "onnxruntime-fp16-cuda")
    result = add(double.folder, *names)
    assert (list(result.refused), list(result.added)) == ([names[0]], [names[1]])
    assert not any(EnginesFolder.read(double.folder).damage())
    require(monkeypatch, 1.1, "fp16")
    lowered_graphs.reset_mock()
    result = add(double.folder, *names, texts=["rain"])
    assert list(result.refused) == [*names]
    assert "fp16 changes answers" in str(result.refused[names[1]])
    assert lowered_graphs.call_count == 1, "neither is a refusal found twice"


def test_a_folder_that_cannot_be_written_is_refused_first(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engines["bert"]

    error = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=error))
    monkeypatch.setattr(build, "_build", lambda *_: 1 / 0)
    with pytest.raises(ArtifactError, match=f"cannot write {folder}: Read-only file system"):
        add(folder, "onnxruntime-fp16-cuda")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot lock folders")
def test_a_second_build_at_the_same_time_is_refused(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(double.folder)
    held = "another process is building"
    with staging.locked(double.folder), pytest.raises(ArtifactError, match=held):
        add(double.folder, "tensorrt-fp32")
    assert contents(double.folder) == before

    unable = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(staging, "lock", Mock(side_effect=unable))
    assert list(add(double.folder, "tensorrt-fp32").added) == [PLAN], "as on some network drives"


@pytest.mark.slow
@pytest.mark.usefixtures("rtx")
def test_building_needs_neither_torch_nor_transformers_nor_onnx(
    engine_copy: Callable[..., Path],
) -> None:
    folder = engine_copy()
    add(folder, "onnxruntime-fp16-cuda")  # on another machine
    command = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx'): sys.modules[name] = None\n"
        "from fpabee.commands.build import main\n"
        "main()"
    )
    done = python(command, folder, "tensorrt-rtx-fp16", "--sm", "86", "--quiet")
    assert "added tensorrt-rtx-fp16: not run here" in done.stdout
