"""`fpabee-export`: what goes to stdout, what to stderr, and the exit codes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from fpabee.exporter.add_targets import AddTargetsResult

from fpabee.exporter.cli.export import main
from fpabee.exporter.targets.check import Checked
from fpabee.runtime import FPabee
from fpabee.runtime.artifact.folder import EnginesFolder, read_manifest
from fpabee.runtime.artifact.reference import read_reference

from ...bad_input.cases import change_config, change_json
from ...doubles.device import Double

FP32 = "onnxruntime-fp32"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def bert(tiny_models: Mapping[str, Path], ready_graphs: None) -> Path:
    """The tiny BERT, whose graphs need not be made again."""
    return tiny_models["bert"]


def test_success_says_what_was_made_and_how_to_go_on(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    result = run(bert, "-o", folder)
    assert result.exit_code == 0, result.output
    # With OpenVINO, lines about its targets come between, see tests/exporter/targets/test_cpu.py.
    made, verified, *_, after = result.stdout.splitlines()
    assert made.startswith(f"{folder}: 3 segments, ")
    assert re.fullmatch(r"added onnxruntime-fp32: verified on \d+ texts", verified)
    assert after == f"next: fpabee-calibrate {folder} --data DATA"
    assert "verify" in result.stderr, "progress goes to stderr"


def test_options_reach_the_export_and_quiet_json_is_one_object(bert: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bert, tmp_path / "model"))
    change_json(copy / "config.json", lambda c: c["fpabee"].update(label_thresholds=[0, 0.5, 1, 1]))
    change_config(copy, problem_type=None)
    texts = tmp_path / "rows.csv"
    texts.write_text("text_pair,body\n,good film\nsun,rain\n")
    result = run(
        copy, "-o", tmp_path / "out", "--exits", "1,2,3", "--max-length", 12, "--verify-data",
        texts, "--column", "text=body",
        "--problem-type", "multi_label_classification", "--json", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    content = json.loads(result.stdout)
    assert (content["folder"], content["segments"]) == (str(tmp_path / "out"), 3)
    assert content["bytes"] > 0
    stored = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert content["verification"] == stored
    assert (stored["rows"], stored["passed"]) == (14, True)
    manifest = read_manifest(tmp_path / "out")
    assert content["targets"] == [*manifest.targets]
    assert manifest.tokenizer.max_length == 12
    assert manifest.task.problem_type.value == "multi_label_classification"
    assert manifest.task.label_thresholds == (0, 0.5, 1, 1)
    known, _ = read_reference(EnginesFolder(tmp_path / "out", manifest))
    assert known[-2:] == ["good film", ("rain", "sun")]


def test_from_adds_a_precision_and_its_plans(
    engine_copy: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    folder = engine_copy("albert")
    before = read_manifest(folder)
    texts = tmp_path / "texts.csv"
    texts.write_text("body\none\ntwo\n")
    options = ("--from", folder, "--fp16", "--sm", "8.9,120", "--sequence", "8,16,32")
    result = run(*options, "--verify-data", texts, "--column", "text=body")
    assert result.exit_code == 0, result.output
    assert "added fp16: verified on 14 texts" in result.stdout
    assert "added tensorrt-rtx-fp16: not run here" in result.stdout
    assert "not added: tensorrt-fp16: tensorrt is not installed" in result.stdout
    manifest = read_manifest(folder)
    assert manifest.graphs == before.graphs
    assert manifest.targets["tensorrt-rtx-fp16"].compute_capabilities == ("8.9", "12.0")
    # The fastest target for CPUs is measured, and tiny models run as fast in both libraries.
    assert manifest.default_target.startswith(("onnxruntime-", "openvino-"))


def test_a_new_target_is_calibrated_next_unless_its_points_are_kept(
    double: Double, set_points: Callable[..., None]
) -> None:
    folder, name = double.folder, "tensorrt-fp32-sm86"
    set_points(folder, usual=FPabee(threshold=0.3))
    build = ("--from", folder, "--backend", "tensorrt", "--sequence", "8,16,32")
    *_, default, after = run(*build).stdout.splitlines()
    assert default == f"default target: {FP32}"
    assert after == f"next: fpabee-calibrate {folder} --data DATA --target {name}"
    set_points(folder, name, fast=FPabee(threshold=0.3))
    *_, default, after = run(*build, "--target", name).stdout.splitlines()
    assert default.startswith(f"default target: {name}")
    assert after == f"next: fpabee-run {folder} texts.txt"


def test_what_was_lost_or_asked_for_is_calibrated_next(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engines["bert"]
    calibrate = f"next: fpabee-calibrate {folder} --data DATA"
    added: list[AddTargetsResult] = []
    monkeypatch.setattr("fpabee.exporter.cli.export.add_targets", lambda *_: added[-1])
    for name, option in ((FP32, f" --target {FP32}"), ("gone", "")):
        lost = AddTargetsResult(read_manifest(folder), lost_points={name: ("fast",)})
        added.append(lost)
        assert run("--from", folder).stdout.splitlines()[1:] == [
            f"no longer valid: fast of {name}, whose graphs or plans have changed",
            calibrate + option,
        ]
    added.append(AddTargetsResult(read_manifest(folder), checked=[Checked(FP32)]))
    after = run("--from", folder, "--backend", "onnxruntime").stdout.splitlines()[-1]
    assert after == f"{calibrate} --target {FP32}"


def test_an_engines_folder_is_no_model(engines: Mapping[str, Path]) -> None:
    result = run(engines["bert"])
    assert result.exit_code == 1
    adding = f"to add targets: fpabee-export --from {engines['bert']};"
    assert f"engines folder, not a model_dir -> {adding}" in result.stderr
