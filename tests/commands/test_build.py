"""`fpabee-build`: what goes to stdout, what to stderr, and the exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from fpabee.commands.build import main
from fpabee.exporter.targets import BuildResult
from fpabee.runtime import BackendError, FPabee, FpabeeError
from fpabee.runtime.artifact.folder import read_manifest

from ..doubles.device import Double
from ..programs import invoke
from ..runtime.running import line_with

FP32 = "onnxruntime-fp32"
CUDA = "onnxruntime-fp16-cuda"
PLAN = "tensorrt-fp32-sm86"


run = partial(invoke, main)


def test_a_new_target_is_calibrated_next_unless_its_points_are_kept(
    double: Double, set_points: Callable[..., None], tmp_path: Path
) -> None:
    folder = double.folder
    set_points(folder, usual=FPabee(threshold=0.3))
    build = (folder, "tensorrt-fp32", "--sequence", "8,16,32")
    added, default, after = run(*build).stdout.splitlines()
    assert added == f"added {PLAN}: verified on 8 texts", "the others are too long"
    assert default == f"default target: {FP32}"
    assert after == f"next: fpabee-calibrate {folder} --data DATA --target {PLAN}"
    set_points(folder, PLAN, fast=FPabee(threshold=0.3))
    assert run(*build).stdout.splitlines()[-1] == f"next: fpabee-run {folder} TEXTS"
    texts = tmp_path / "my texts.txt"
    texts.write_text("rain\nsun\n")
    after = run(*build, "--texts", texts).stdout.splitlines()[-1]
    assert after == f"next: fpabee-run {folder} '{texts}'"


def test_a_text_that_is_given_twice_verifies_once(double: Double, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("rain\n" * 9 + "sun\n")
    build = (double.folder, "tensorrt-fp32", "--sequence", "8,16,32", "--texts", texts)
    assert run(*build).stdout.startswith(f"added {PLAN}: verified on 2 texts\n")


def test_what_was_lost_is_named_and_calibrated_next(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(engines["bert"])
    lost: dict[str, tuple[str, ...]] = {FP32: ("fast",), "gone": ("safe",)}
    result = BuildResult(manifest, {CUDA: None}, lost_points=lost)
    monkeypatch.setattr("fpabee.commands.build.build_targets", lambda *_: result)
    said = run(engines["bert"], CUDA).stdout
    assert line_with(said, "no longer valid", f"fast of {FP32}")
    assert line_with(said, "no longer valid", "safe of gone")
    assert line_with(said, "next: ").endswith(f"{engines['bert']} --data DATA --target {FP32}")


@pytest.mark.parametrize("kept", [True, False])
def test_each_refusal_is_one_line_of_stderr(
    kept: bool, engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(engines["bert"])
    refused: dict[str, FpabeeError] = {
        "one": BackendError("no device", "use `texts`"),
        "two": BackendError("no memory"),
    }
    result = BuildResult(manifest, {FP32: None} if kept else {}, refused)
    monkeypatch.setattr("fpabee.commands.build.build_targets", lambda *_: result)
    names = ("openvino-fp32", "openvino-bf16", CUDA)
    found = run(engines["bert"], *names, "--quiet")
    assert found.exit_code == 1
    assert found.stderr.splitlines() == [
        "error: one was not added: no device -> use --texts",
        "error: two was not added: no memory",
    ]
    assert (f"added {FP32}" in found.stdout) == (found.stdout != "") == kept


def test_json_is_one_object(double: Double) -> None:
    found = run(double.folder, "tensorrt-fp32", "tensorrt-rtx-fp32", CUDA, "--json", "--quiet")
    content = json.loads(found.stdout)
    assert content["folder"] == str(double.folder)
    assert content["added"][PLAN]["rows"] == 12
    assert content["added"][CUDA] is None, "not run here"
    assert content["default_target"] == FP32
    assert content["targets"] == [*read_manifest(double.folder).targets]
    assert found.exit_code == bool(content["refused"])
