"""`fpabee-convert`: its options, what it prints, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors import SafetensorError

from fpabee.commands.convert import main
from fpabee.exporter import single_file
from fpabee.exporter.convert import Conversion, workflow
from fpabee.exporter.convert.options import Chosen, Converted, Form
from fpabee.exporter.exits import Pooling
from fpabee.runtime.artifact.operating_point import Certificate, Promise
from fpabee.runtime.errors import ArtifactError

from ...runtime.running import line_with
from .conftest import SINGLE

CERTIFICATE = Certificate(
    confidence=95.0,
    promises=(
        Promise(of="changed_answers", at_most=1.0, rows=1199),
        Promise(of="missed", at_most=2.0, label="bad", rows=150),
    ),
    thresholds={"bad": 0.7},
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(part) for part in arguments])


def converted(target: str, certificate: Certificate | None, layers: float) -> Converted:
    return Converted(
        target=target,
        point="changed-1" if certificate else None,
        rule={"name": "budget", "exit": 6},
        certificate=certificate,
        refusal="" if certificate else "full depth has 31 changed answers in 1200 texts",
        full_depth_changed=0.0 if certificate else 0.026,
        changed=0.005,
        changed_traffic=0.004,
        layers=layers,
        exits=(100, 50, 50, 0, 0, 0, 100),
        speedup_single=1.9,
        speedup_file=2.25,
        max_logit_difference=1e-6,
        accuracy=0.95,
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Conversions that are not made; each gives the same result. The paths exist."""
    noted: list[Any] = []
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("texts.jsonl").touch()

    def convert(*given: Any) -> Conversion:
        noted.append(given)
        form = Form(Pooling.BOTH, 64, every=2)
        return Conversion(
            folder=Path("engines"),
            default_target="openvino-bf16",
            targets=(
                converted("onnxruntime-fp32", CERTIFICATE, 4.7),
                converted("openvino-bf16", CERTIFICATE, 4.8),
                converted("openvino-int8", None, 6.0),
            ),
            exit_layers=(0, 2, 4, 6),
            chosen=Chosen((0.81, 0.938), form, 0.021, 0.4),
            rows=4000,
            texts=3000,
            parts=(1200, 300, 1200, 300),
            accuracy=0.955,
            warnings=("something is odd",),
            seconds=61.2,
        )

    monkeypatch.setattr(workflow, "convert", convert)
    return noted


def test_the_summary_says_what_is_guaranteed_and_what_is_not(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[Any] = []
    monkeypatch.setattr(single_file, "pack", lambda *given, **_: packed.append(given))
    result = run("model", "texts.jsonl", "--single-file", "one")
    assert result.exit_code == 0, result.output
    assert packed == [(Path("engines"), Path("one"))]
    for facts in (
        ("heads", "64", "first token", "every 2 layers", "81, 94 %"),
        ("engines", "4,000", "3,000"),
        ("1,200 trained", "300 chose", "1,200 certified", "300 decided nothing", "0.33 %"),
        ("openvino-bf16 (default)", "4.80", "1.90", "2.25", "0.50 %", "0.40 %"),
        ("95 % confidence", "1 % of the decisions", "1,199 of 1,200", "2 %", "'bad' (above 0.7)"),
        ("150 of 1,200 texts", "only if the classifier was not trained on"),
        ("openvino-int8", "2.60 %", "no guarantee", "31 changed answers"),
        ("accuracy", "0.9500", "0.9550"),
        ("warning", "something is odd"),
        ("one file: one",),
        ("next: fpabee-run engines texts.txt",),
    ):
        assert line_with(result.stdout, *facts)
    found = json.loads(run("model", "texts.jsonl", "--json").stdout)
    assert found["targets"][1]["certificate"]["confidence"] == 95
    assert found["chosen"]["form"]["pooling"] == "both"


@pytest.mark.parametrize("place", ["full", "engines", "engines/one", "."])
def test_where_the_file_cannot_be_is_known_before_the_conversion(
    place: str, calls: list[Any]
) -> None:
    Path("full").mkdir()
    Path("full", "mine").touch()
    result = run("model", "texts.jsonl", "--single-file", place)
    assert result.exit_code == 1
    assert " -> " in result.stderr
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ("--missed 1", "--missed can be used only with --threshold", 2),
        ("--threshold bad=0.7 --threshold bad=0.5", "--threshold gives bad twice", 2),
        ("--changed 0", "changed_answers is 0 %", 1),
    ],
)
def test_wrong_promises_are_refused(arguments: str, message: str, code: int) -> None:
    result = run("model", "texts.jsonl", *arguments.split())
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    telling: Mapping[str, Path], texts: Path, tmp_path: Path
) -> None:
    """A classifier without a fast tokenizer."""
    folder = Path(shutil.copytree(telling[SINGLE.value], tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    result = run(folder, texts, "-o", tmp_path / "out", "--changed", "10", "--quiet")
    assert result.exit_code == 1, result.output
    assert "tokenizer" in result.stderr
    assert " -> " in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_adapter_needs_a_package(
    telling: Mapping[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # here may be an engines folder
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "peft" else find(name))
    result = run(telling[SINGLE.value], texts, "--adapter", "lora", "--quiet")
    assert result.exit_code == 1
    assert "pip install peft" in result.stderr


NO_SPACE = "No space left on device (os error 28)"


def full(error: Exception) -> Callable[..., None]:
    """A function that fails as on a full disk."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("write", "error"),
    [
        ("numpy.save", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        ("safetensors.torch.save_file", SafetensorError(f"I/O error: {NO_SPACE}")),
        ("safetensors.numpy.save_file", SafetensorError(f"I/O error: {NO_SPACE}")),
        ("fpabee.exporter.convert.workflow.write_whole", ArtifactError("", "")),
        ("transformers.PreTrainedTokenizerBase.save_pretrained", Exception(NO_SPACE)),
        ("numpy.savez", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    ],
)
def test_a_full_disk_keeps_the_finished_steps(
    write: str,
    error: Exception,
    telling: Mapping[str, Path],
    texts: Path,
    quick: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    given = telling[SINGLE.value], texts, "-o", tmp_path / "out", "--changed", "10"
    with monkeypatch.context() as patch:
        patch.setattr(write, full(error))
        result = run(*given, "--quiet")
    assert result.exit_code == 1, result.output
    assert "No space left on device" in result.stderr
    assert result.stderr.count("\n") == 1
    if write == "numpy.save":  # of the first step
        assert not [*tmp_path.iterdir()]
        return
    assert "out.partial keeps the finished steps -> " in result.stderr
    result = run(*given)
    assert result.exit_code == 0, result.output
    assert "classify the texts" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
