"""`fpabee-export`: what goes to stdout, what to stderr, and the exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from fpabee.exporter.add_targets import drop_graphs
from fpabee.exporter.cli.export import main
from fpabee.runtime import ArtifactError
from fpabee.runtime.artifact.folder import read_manifest


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_one_error(result: Result, message: str) -> None:
    """Exit code 1, nothing on stdout, and one line that says what is wrong and what to do."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert " -> " in line


@pytest.fixture
def bert(tiny_models: Mapping[str, Path], ready_graphs: None) -> Path:
    """The tiny BERT, whose graphs need not be made again."""
    return tiny_models["bert"]


@pytest.fixture
def copy(tiny_models: Mapping[str, Path], ready_graphs: None, tmp_path: Path) -> Path:
    """A copy of the tiny BERT, to be damaged."""
    return Path(shutil.copytree(tiny_models["bert"], tmp_path / "model"))


def test_success_says_what_was_made_and_how_to_go_on(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    result = run(bert, "-o", folder)
    assert result.exit_code == 0, result.output
    made, verified, after = result.stdout.splitlines()
    assert made.startswith(f"{folder}: 3 segments, ")
    assert made.endswith("target onnxruntime-fp32")
    assert "12 texts" in verified
    assert verified.endswith("labels agree 100.00%, exits agree 100.00%")
    assert after == f"next: fpabee-run {folder} texts.txt"
    assert "verify" in result.stderr, "progress goes to stderr"


def test_json_is_one_object_and_quiet_is_quiet(bert: Path, tmp_path: Path) -> None:
    result = run(bert, "-o", tmp_path / "engines", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    content = json.loads(line)
    assert content["folder"] == str(tmp_path / "engines")
    assert content["segments"] == 3
    assert content["targets"] == ["onnxruntime-fp32"]
    assert content["bytes"] > 0
    record = json.loads((tmp_path / "engines" / "verification.json").read_text())
    assert content["verification"] == record


def test_options_reach_the_export(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"problem_type": None}))
    texts = tmp_path / "rows"
    texts.write_text("body\none\ntwo\n")
    result = run(
        copy, "-o", tmp_path / "out", "--exits", "1,2,3", "--max-length", 12, "--verify-data",
        texts, "--input-format", "csv", "--text-column", "body",
        "--problem-type", "multi_label_classification", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["verification"]["rows"] == 14
    manifest = read_manifest(tmp_path / "out")
    assert manifest.tokenizer.max_length == 12
    assert manifest.task.problem_type.value == "multi_label_classification"


def test_force_replaces_an_engines_folder(bert: Path, engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy("albert")
    assert_one_error(run(bert, "-o", folder, "--quiet"), "replace it with --force")
    assert run(bert, "-o", folder, "--force", "--quiet").exit_code == 0
    assert read_manifest(folder).model.model_type == "bert"


def test_failed_verification_is_one_line_and_leaves_nothing(
    bert: Path, tmp_path: Path, spoil_segment_2: Callable[[float], None]
) -> None:
    spoil_segment_2(0.01)
    result = run(bert, "-o", tmp_path / "engines", "--quiet")
    assert_one_error(result, "segment_02 differs from its PyTorch module by 1.00e-02")
    assert list(tmp_path.iterdir()) == []


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return apply


def test_the_command_writes_one_line_and_nothing_of_its_libraries(
    copy: Path, tmp_path: Path
) -> None:
    change_weights(lambda weights: weights["classifiers.1.bias"].fill_(torch.nan))(copy)
    command = "from fpabee.exporter.cli.export import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", command, str(copy), "-o", str(tmp_path / "engines")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    errors = [line for line in result.stderr.splitlines() if not line.startswith("load ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")


def test_fp16_is_checked_written_and_built(bert: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    folder = tmp_path / "engines"
    texts = tmp_path / "texts.csv"
    texts.write_text("body\none\ntwo\n")
    data = ("--verify-data", texts, "--text-column", "body")
    result = run(bert, "-o", folder, "--fp16", "--sm", "86", "--sequence", "8,16,32", *data)
    assert result.exit_code == 0, result.output
    assert "fp16: emulated on 14 texts" in result.stdout
    assert "built tensorrt-rtx-fp16 for compute capability 8.6 (not run here)" in result.stdout
    assert f"fpabee-export --from {folder} --backend tensorrt --fp16" in result.stdout
    manifest = read_manifest(folder)
    assert set(manifest.targets) >= {"onnxruntime-fp32", "tensorrt-rtx-fp16"}
    assert manifest.default_target == "onnxruntime-fp32"


def test_from_adds_to_a_folder_and_prints_json(engine_copy: Callable[..., Path]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    folder = engine_copy("albert")
    before = read_manifest(folder)
    command = ("--from", folder, "--backend", "tensorrt-rtx", "--sm", "8.9,120", "--json")
    result = run(*command)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["built"] == ["tensorrt-rtx-fp32"]
    assert read_manifest(folder).graphs == before.graphs
    built = read_manifest(folder).targets["tensorrt-rtx-fp32"]
    assert built.compute_capabilities == ("8.9", "12.0")
    assert run(*command, "--resume", "--no-onnx").exit_code == 0
    assert not (folder / "onnx").exists()
    manifest = read_manifest(folder)
    assert list(manifest.targets) == [manifest.default_target] == ["tensorrt-rtx-fp32"]


def test_graphs_that_are_run_are_not_dropped(engine_copy: Callable[..., Path]) -> None:
    folder = engine_copy()
    with pytest.raises(ArtifactError, match="no built target: onnxruntime-fp32"):
        drop_graphs(folder)
    assert (folder / "onnx").is_dir()
