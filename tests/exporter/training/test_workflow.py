"""Trainings of tiny models: what they write, report and refuse."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, BertModel

from fpabee.exporter.checkpoint import load_checkpoint, load_config
from fpabee.exporter.exit_0_files import EXIT_0_FILE
from fpabee.exporter.exit_config import MultiExitConfig, Pooling
from fpabee.exporter.training import TrainOptions, train, workflow
from fpabee.exporter.training.report import model_card
from fpabee.exporter.training.workflow import has_fast_bf16
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.manifest import TRAINED_ON_NAME, ProblemType
from fpabee.runtime.errors import ArtifactError, InputError, ModelError
from fpabee.runtime.files import read_rows

from ...bad_input.cases import contents
from .conftest import Call

GOLDEN = Path(__file__).parents[2] / "golden" / "pabee_bert"
SINGLE = ProblemType.SINGLE_LABEL
MULTI = ProblemType.MULTI_LABEL

Options = Callable[..., TrainOptions]
WriteRows = Callable[..., str]


def test_a_training_writes_a_model_its_scores_and_a_model_card(
    options: Options, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    settings = options(test=str(tmp_path / "dev.jsonl"), lr=1e-3, epochs=2.0)
    folder = tmp_path / "model"
    report = train(folder, settings, lambda *state: seen.append(state), "fpabee-train --of tests")

    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    names |= {"exit_0.safetensors", "README.md", "training.json", "trained_on.npz"}
    assert {path.name for path in folder.iterdir()} == names
    assert report.exits == (0, 1, 2)
    model = load_checkpoint(folder)
    labels = ("a f", "bad", "goo")
    config = model.exit_config
    assert (config.exits, config.labels, config.problem_type) == ((1, 2), labels, SINGLE)
    assert (config.pooling, config.queries, config.hidden_layers) == (Pooling.ATTENTION, 4, 2)
    named = model.named_parameters()
    learnt = [weight.abs().max() > 0 for name, weight in named if name.startswith("queries.")]
    assert learnt == [True, True]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = list(read_rows(tmp_path / "dev.jsonl"))
    shape: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 16}
    encoded = tokenizer([row.text for row in rows], **shape, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**encoded).argmax(dim=-1)
    truth = torch.tensor([report.labels.index(label) for row in rows for label in row.labels or ()])
    accuracies = (predicted == truth).float().mean(dim=1).tolist()
    for name in ("dev", "test"):
        for row in report.scores[name]:
            assert set(row) == {"accuracy", "macro_f1", "matthews"}
        assert [row["accuracy"] for row in report.scores[name][1:]] == pytest.approx(accuracies)

    encoder = [state for state in seen if state[0].startswith("train")]
    assert {done for what, done, _ in encoder if "loss" in what} == {1, 2, 3, 4, 5, 6}
    assert {total for *_, total in encoder} == {6}
    without = {done for what, done, _ in encoder if "loss" not in what}
    assert without == {0, 3, 6}, "at first and after every epoch"
    scores = " ".join(f"{value:.3f}" for value in accuracies)
    assert encoder[-1][0] == f"train, dev accuracy by exit: {scores}"
    after = [what for what, *_ in seen[len(encoder) :]]
    assert after[0] == "answers of the last exit, to train exit 0"
    assert [what.partition(" loss ")[0] for what in after[1:]] == ["exit 0, dev"] * 4
    losses = [float(what.partition(" loss ")[2]) for what in after[1:]]
    assert losses == sorted(losses, reverse=True), "it falls"

    with np.load(folder / TRAINED_ON_NAME) as trained_on:
        texts = {row.content for row in read_rows(tmp_path / "train.jsonl.gz")}
        assert len(trained_on["digests"]) == len(texts)

    stored = json.loads((folder / "training.json").read_text())
    assert stored == report.to_dict()
    assert stored["options"]["distill"] == 0.5, "the documented default"
    counts = {name: data["rows"] for name, data in stored["data"].items()}
    assert counts == {"train": 24, "dev": 8, "test": 8}
    card = (folder / "README.md").read_text()
    metadata: Any = ModelCard(card).data
    assert metadata.library_name == "fpabee"
    for part in (
        "fpabee-train --of tests",
        "train.jsonl.gz | 24",
        sha256_of(tmp_path / "train.jsonl.gz"),
        f"| 0 | 0 | {report.scores['dev'][0]['accuracy']:.4f} |",
        f"| 2 | 2 | {accuracies[1]:.4f} |",
        "after the layers 1, 2:",
        "bag of words and word pairs (0.4 MB)",
        f"torch {version('torch')}",
    ):
        assert part in card
    assert str(tmp_path) not in card, "folders exist only on this machine"
    odd = dataclasses.replace(report, labels=("[a](b)", "<c>"))
    assert r"Labels: \[a\](b), &lt;c&gt;." in str(model_card(odd)), "labels are no markup"


def test_a_multi_label_training_can_start_from_another_model_dir(
    options: Options, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [{"text": f"text {i}", "labels": ["a", "b"][: 1 + i % 2]} for i in range(16)]
    path = write_rows("multi.jsonl", rows)
    start = {"backbone": str(GOLDEN), "train": path, "dev": path}
    more = {"problem_type": MULTI, "pooling": Pooling.MEAN}
    settings = options(**start, exits=(2, 4), lr=1e-9, **more)
    report = train(tmp_path / "model", settings)
    for row in report.scores["dev"]:
        assert set(row) == {"exact_match", "micro_f1", "macro_f1"}
    trained = load_checkpoint(tmp_path / "model")
    given = load_checkpoint(GOLDEN)
    assert trained.exit_config == MultiExitConfig((2, 4), ("a", "b"), MULTI, Pooling.MEAN)
    found, expected = (
        each.state_dict()["bert.encoder.layer.3.output.dense.weight"] for each in (trained, given)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_exits_may_see_the_mean_of_the_tokens(options: Options, tmp_path: Path) -> None:
    train(tmp_path / "model", options(pooling=Pooling.MEAN))
    config = load_checkpoint(tmp_path / "model").exit_config
    assert (config.pooling, config.queries, config.hidden_layers) == (Pooling.MEAN, 0, 1)


def test_rows_are_truncated_and_the_report_says_how_many_epochs_there_were(
    options: Options, write_rows: WriteRows, calls: list[Call], tmp_path: Path
) -> None:
    rows = [{"text": "film " * 30, "label": label} for label in "ab"]
    long = write_rows("long.jsonl", rows)
    report = train(tmp_path / "model", options(train=long, dev=long, max_length=8, epochs=None))
    (call,) = calls
    assert [len(row) for part in (call.train, call.dev) for row in part.rows] == [8] * 4
    assert report.options.epochs == call.options.epochs == 20


@pytest.mark.parametrize(
    ("rows", "changes", "epochs"),
    [
        (1, {}, 20),  # at most 20
        (1601, {}, 20),  # 51 steps each: 19.6
        (3668, {"batch_size": 8}, 3),
        (10_656, {}, 4),  # 333 steps each
        (10_688, {}, 3),  # 334 steps each
        (100, {"epochs": 0.5}, 0.5),
    ],
)
def test_little_data_is_trained_on_more_often(
    rows: int, changes: dict[str, Any], epochs: float
) -> None:
    options = TrainOptions(train="train", dev="dev", backbone="backbone", **changes)
    assert options.epochs_for(rows) == epochs


def test_a_model_is_replaced_only_on_request_with_its_exit_0(
    options: Options, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    train(folder, options(epochs=0.3))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="already holds a model -> give `force`"):
        train(folder, options(seed=7))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    report = train(folder, options(epochs=0.3, seed=7, exit_0=False, force=True))
    assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert (report.exits, report.exit_0_bytes, list(report.numbers)) == ((1, 2), 0, [1, 2])
    assert len(report.scores["dev"]) == 2
    assert before.keys() - {path.name for path in folder.iterdir()} == {EXIT_0_FILE}
    assert "exit_0" not in load_config(folder).fpabee
    assert "Exit 0" not in (folder / "README.md").read_text()


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
# The same as a library in Rust says it.
NO_SPACE_IN_RUST = SafetensorError("I/O error: No space left on device (os error 28)")
# What fails on a full disk, and whether the trained encoder is kept.
FULL: dict[str, tuple[str, Exception, bool]] = {
    "space for the weights": ("fpabee.exporter.staging.reserve", NO_SPACE, False),
    "weights": ("safetensors.torch.save_file", NO_SPACE_IN_RUST, False),
    "configuration": ("transformers.PreTrainedConfig.save_pretrained", NO_SPACE, True),
    "tokenizer": ("transformers.PreTrainedTokenizerBase.save_pretrained", NO_SPACE, True),
    "exit 0": ("safetensors.numpy.save_file", NO_SPACE_IN_RUST, True),
    "card": ("huggingface_hub.ModelCard.save", NO_SPACE, True),
    "the end": ("shutil.move", NO_SPACE, True),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("case", FULL)
def test_a_full_disk_keeps_the_trained_encoder_and_never_leaves_half_a_model(
    case: str, force: bool, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "model"
    settings = options(epochs=0.3, force=force)
    if force:
        train(folder, options(epochs=0.3, seed=7))
        (folder / "notes.txt").touch()
    before = contents(folder)
    name, error, is_kept = FULL[case]
    with monkeypatch.context() as patch:
        patch.setattr(name, Mock(side_effect=error))
        with pytest.raises(ArtifactError, match="No space left on device") as caught:
            train(folder, settings)
    assert contents(folder) == before
    assert ("model.partial keeps the finished steps" in str(caught.value)) == is_kept
    assert (folder.parent / "model.partial").exists() == is_kept
    assert not [*folder.parent.rglob("*.unfinished")]
    with monkeypatch.context() as patch:
        if is_kept:
            patch.setattr(workflow, "train_exits", lambda *_: 1 / 0)
        train(folder, settings)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert (folder / "notes.txt").exists() == force
    train(tmp_path / "other", settings)
    for file in ("model.safetensors", "exit_0.safetensors", "config.json"):
        assert (folder / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_a_training_with_other_settings_does_not_take_what_an_interrupted_one_kept(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "train_exit_0", stopped)
        with pytest.raises(KeyboardInterrupt, match="keeps the finished steps"):
            train(folder, options(epochs=0.3))
    monkeypatch.setattr(workflow, "train_exits", lambda *_: 1 / 0)
    for changes in ({"seed": 7}, {"lr": 1e-3}, {"train": options().dev}):
        with pytest.raises(ZeroDivisionError):
            train(folder, options(epochs=0.3, **changes))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no file": ({"train": "missing.jsonl"}, InputError, "missing.jsonl does not exist"),
    "no encoder": ({"backbone": "missing"}, ModelError, "missing does not exist"),
    "half an encoder": ({"backbone": "half"}, ModelError, "lacks 16 weights of its encoder"),
    "tokenizer": ({"backbone": "small"}, ModelError, "gives token ids up to 199, but .* 150"),
    "labels": ({"train": "two.jsonl"}, InputError, "has 2 labels"),
    "no label": ({"train": "none.jsonl"}, InputError, "row 1 has no label"),
    "one label": ({"train": "one.jsonl"}, InputError, "are a; expected at least 2"),
    "empty lists": (
        {"train": "empty.jsonl", "problem_type": ProblemType.MULTI_LABEL},
        InputError,
        "are none; expected at least 1",
    ),
    "unknown label": ({"dev": "other.jsonl"}, InputError, "line 1 has label 'other'"),
}


@pytest.mark.parametrize("case", BAD)
def test_nothing_is_written_when_the_input_is_bad(
    case: str,
    options: Options,
    backbone: Path,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(backbone, "small")
    config = BertConfig.from_pretrained("small")
    config.vocab_size = 150
    BertModel(config).save_pretrained("small")
    shutil.copytree(backbone, "half")
    weights = load_file("half/model.safetensors")
    half = {name: value for name, value in weights.items() if "layer.1." not in name}
    save_file(half, "half/model.safetensors")
    write_rows("two.jsonl", [{"text": "x", "labels": ["a", "b"]}])
    write_rows("none.jsonl", [{"text": "x"}])
    write_rows("one.jsonl", [{"text": "x", "label": "a"}])
    write_rows("empty.jsonl", [{"text": "x", "labels": []}])
    write_rows("other.jsonl", [{"text": "x", "label": "other"}])
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        train("model", options(**changes))
    assert not Path("model").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0.0}, "epochs is 0.0 -> give `epochs` above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"max_length": 3}, "give `max_length` above 3"),
        ({"distill": 1.5}, "give `distill` from 0 to 1"),
    ],
)
def test_bad_options_are_refused(options: Options, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(**changes)


def test_bfloat16_is_refused_on_a_cpu_that_is_slow_in_it(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for slow in ("DEFAULT", "NO AVX", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda slow=slow: slow)
        with pytest.raises(InputError, match=r"slower in bfloat16 .* -> leave out `bf16`"):
            train(tmp_path / "model", options(bf16=True))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert has_fast_bf16()
