"""`fpabee-export`: what goes to stdout, what to stderr, and the exit codes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from fpabee.calibration.progress import Progress
from fpabee.commands import export as command
from fpabee.commands.export import main
from fpabee.commands.run import main as run_command
from fpabee.exporter.targets import BuildResult, backends, builders
from fpabee.runtime import BackendError, CheckError, FpabeeError
from fpabee.runtime.artifact.folder import EnginesFolder, read_manifest
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.encoding import Text

from ..bad_input.cases import change_config, change_json
from ..conftest import make_model
from ..programs import hide, invoke, printed

FP32 = "onnxruntime-fp32"


run = partial(invoke, main)


@pytest.fixture
def bert(tiny_models: Mapping[str, Path], ready_graphs: None) -> Path:
    """The tiny BERT, whose graphs need not be made again."""
    return tiny_models["bert"]


def test_success_says_what_was_made_and_how_to_go_on(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "engines"
    result = run(bert, "-o", folder)
    assert result.exit_code == 0, result.output
    # With OpenVINO, lines about its targets come between, see test_build.py.
    made, verified, *_, after = result.stdout.splitlines()
    assert made.startswith(f"{folder}: 3 segments, ")
    assert re.fullmatch(r"added onnxruntime-fp32: verified on \d+ texts", verified)
    assert after == f"next: fpabee-calibrate {folder} --data DATA"
    assert "check" in result.stderr, "progress goes to stderr"


def test_a_reranker_is_not_calibrated_but_runs(tmp_path: Path) -> None:
    """The next step that is shown works."""
    folder = tmp_path / "engines"
    model = make_model("bert", tmp_path / "model", ranks=True)
    result = run(model, "-o", folder)
    assert result.exit_code == 0, result.output
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"query": "rain", "documents": ["a film", "the sun", "music"]}\n')
    after = result.stdout.splitlines()[-1]
    assert after == f"next: fpabee-run {folder} QUERIES"
    ranked = tmp_path / "ranked.jsonl"
    printed(run_command, folder, queries, "-o", ranked)
    assert len(ranked.read_text().splitlines()) == 1


def test_quiet_json_is_one_object(bert: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bert, tmp_path / "model"))
    change_json(copy / "config.json", lambda c: c["fpabee"].update(label_thresholds=[0, 0.5, 1, 1]))
    change_config(copy, problem_type=None)
    texts = tmp_path / "rows.csv"
    texts.write_text("text_pair,body\n,good film\nsun,rain\n")
    result = run(
        copy, "-o", tmp_path / "out", "--exits", "1,2,3", "--max-length", 12, "--texts",
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


def test_openvino_that_cannot_be_used_is_named_and_the_rest_is_exported(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = BackendError("the installed OpenVINO has no CPU plugin")
    monkeypatch.setattr(backends, "openvino_version", Mock(side_effect=error))
    said = printed(main, bert, "-o", tmp_path / "engines")
    assert "not added: openvino-fp32: the installed OpenVINO has no CPU plugin" in said
    assert list(read_manifest(tmp_path / "engines").targets) == [FP32]


def test_fp16_is_built_as_one_types_it(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that can build no plans, too."""
    hide(monkeypatch, "tensorrt", "tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    said = printed(main, bert, "--fp16")
    assert "added onnxruntime-fp16-cuda: not run here" in said
    assert "tensorrt" not in said
    # That target cannot run here, so the default target is calibrated.
    assert said.splitlines()[-1] == "next: fpabee-calibrate engines --data DATA"
    manifest = read_manifest(tmp_path / "engines")
    assert manifest.precisions.keys() == {"fp16"}
    assert not manifest.targets[manifest.default_target].on_gpu


@pytest.mark.parametrize("left", [[], ["onnxruntime-int8"]])
def test_it_fails_if_nothing_is_kept_of_what_was_asked_for(
    left: list[str], bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export stays, with its other targets."""
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"rain {number}\n" for number in range(32)) * 2)
    asked: list[str] = []

    def build_targets(
        folder: Path, names: Sequence[str], texts: Sequence[Text], progress: Progress
    ) -> BuildResult:
        assert len(texts) == 32
        asked.extend(names)
        refused: dict[str, FpabeeError] = {
            name: CheckError("it changes answers")
            for name in names
            if name.endswith("int8") and name not in left
        }
        return BuildResult(read_manifest(folder), dict.fromkeys(left), refused)

    monkeypatch.setattr(command, "require", lambda feature: None)
    monkeypatch.setattr(command, "build_targets", build_targets)
    monkeypatch.setattr(command, "buildable", list)
    monkeypatch.setattr(command, "INT8_TARGETS", ("onnxruntime-int8", "openvino-int8"))
    monkeypatch.setattr(builders._Int8, "why_not", lambda _: None)
    result = run(bert, "-o", tmp_path / "engines", "--int8", "--texts", texts)
    assert asked[-2:] == ["onnxruntime-int8", "openvino-int8"]
    assert "not added: openvino-int8: it changes answers" in result.stdout
    assert result.exit_code == (not left)
    assert ("onnxruntime-int8 was not added: it changes" in result.stderr) == (not left)
    assert "not added: onnxruntime-int8" not in result.stdout, "an error is printed once"
    assert FP32 in read_manifest(tmp_path / "engines").targets


def test_an_engines_folder_is_no_model(engines: Mapping[str, Path]) -> None:
    result = run(engines["bert"])
    assert result.exit_code == 1
    assert f"{engines['bert']} is an engines folder, not a model -> run it" in result.stderr
