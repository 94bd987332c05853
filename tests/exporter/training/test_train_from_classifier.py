"""The training script on a plain classifier that is to get exits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, RobertaConfig

from fpabee.exporter.checkpoint import load_checkpoint
from fpabee.runtime.artifact.manifest import ProblemType

LABELS = ("bad", "good")
WORDS = ("good", "bad", "film", "music", "rain", "stop", "light", "book")
TEXTS = [f"{one} {other}" for one in WORDS for other in WORDS[:5]]
SINGLE, MULTI = ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def train(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("train")


def make_classifier(
    tiny_models: Mapping[str, Path], folder: Path, problem_type: ProblemType
) -> Path:
    config = RobertaConfig.from_pretrained(tiny_models["roberta"])
    del config.fpabee
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: index for index, label in enumerate(LABELS)}
    config.problem_type = problem_type.value
    torch.manual_seed(3)
    build: Any = AutoModelForSequenceClassification.from_config
    model = build(config).eval()
    trained = load_file(tiny_models["roberta"] / "model.safetensors")
    model.load_state_dict({n: w for n, w in trained.items() if n.startswith("roberta.")}, False)
    rows = AutoTokenizer.from_pretrained(tiny_models["roberta"])(
        TEXTS, return_tensors="pt", padding=True
    )
    with torch.no_grad():  # so that it says something of each text
        logits = model(**rows).logits
        model.classifier.out_proj.weight *= 2 / logits.std()
        model.classifier.out_proj.bias -= model(**rows).logits.mean(dim=0)
    model.save_pretrained(folder)
    for path in tiny_models["roberta"].glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def run(train: ModuleType, tiny_models: Mapping[str, Path], tmp_path: Path) -> Run:
    """Makes a classifier and trains from it on texts without labels."""

    def call(*more: str, problem_type: ProblemType = SINGLE) -> Result:
        rows = [{"text": text} for text in TEXTS]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        dev = [{"text": "good film", "label": "good"}, {"text": "bad", "label": "bad"}]
        (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dev))
        folder = make_classifier(tiny_models, tmp_path / "classifier", problem_type)
        files = ["--train", str(tmp_path / "train.jsonl"), "--dev", str(tmp_path / "dev.jsonl")]
        arguments = ["--from-classifier", str(folder), *files, "--output", str(tmp_path / "model")]
        return CliRunner().invoke(train.main, [*arguments, "--batch-size", "8", *more])

    return call


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_exits_learn_what_the_classifier_says(
    problem_type: ProblemType, run: Run, tmp_path: Path
) -> None:
    arguments = ["--freeze-encoder", "--epochs", "30", "--head-lr", "0.05", "--pooling", "cls"]
    result = run(*arguments, problem_type=problem_type)
    assert result.exit_code == 0, result.output
    load: Any = AutoModelForSequenceClassification.from_pretrained
    classifier = load(tmp_path / "classifier").eval()
    model = load_checkpoint(tmp_path / "model")
    assert model.exit_config.labels == LABELS
    assert model.exit_config.problem_type is problem_type
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        teacher, logits = classifier(**rows).logits, model(**rows)
    torch.testing.assert_close(logits[-1], teacher, rtol=0, atol=1e-5)
    function = torch.softmax if problem_type is SINGLE else lambda z, _: torch.sigmoid(z)
    wanted, *found = (function(z, -1) for z in (teacher, *logits[:-1]))
    spread = (wanted - wanted.mean(dim=0)).abs().mean()
    assert spread > 0.1
    for exit_said in found:
        assert (exit_said - wanted).abs().mean() < 0.5 * spread, "hardly better than the mean"
    given, kept = weights(tmp_path / "classifier"), weights(tmp_path / "model")
    encoder = [name for name in given if name.startswith("roberta.")]
    assert len(encoder) > 40
    assert all(torch.equal(kept[name], given[name]) for name in encoder)


def test_encoder_learns_and_the_classifiers_head_does_not(run: Run, tmp_path: Path) -> None:
    result = run("--epochs", "1", "--exits", "1,3", "--lr", "0.01")
    assert result.exit_code == 0, result.output
    given, kept = weights(tmp_path / "classifier"), weights(tmp_path / "model")
    assert torch.equal(kept["last_head.dense.weight"], given["classifier.dense.weight"])
    assert torch.equal(kept["classifiers.1.weight"], given["classifier.out_proj.weight"])
    name = "roberta.encoder.layer.0.output.dense.weight"
    assert not torch.allclose(kept[name], given[name], atol=1e-3)
    report = json.loads((tmp_path / "model" / "training.json").read_text())
    assert report["exits"] == [1, 3]
    assert report["labels"] == list(LABELS)
    assert report["rows"] == {"train": 40, "dev": 2}


def test_a_label_that_the_classifier_does_not_know_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text('{"text": "x", "label": "other"}\n')
    result = run("--dev", str(path))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "'other', which the model does not know" in line


def test_a_folder_without_a_head_is_one_line(
    run: Run, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    result = run("--from-classifier", str(tiny_models["bert"]))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "not a trained classifier" in line


@pytest.mark.parametrize(
    "arguments", [["--backbone", "x"], ["--from-classifier", ""], ["--random-init"]]
)
def test_usage_errors_exit_2(run: Run, arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2
