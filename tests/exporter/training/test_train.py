"""The training script: its loss, its scores, and one very small run."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, TrainingArguments

from fpabee.exporter.checkpoint import load_checkpoint
from fpabee.exporter.model import MultiExitConfig, Pooling
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.errors import InputError
from fpabee.runtime.files import Row, read_rows

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "pabee_bert"
SINGLE, MULTI = ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def train(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("train")


def options(train: ModuleType, **changes: Any) -> Any:
    settings = {
        "backbone": "none",
        "train": "none",
        "dev": "none",
        "test": None,
        "output": Path("none"),
        "problem_type": SINGLE,
        "epochs": 1.0,
        "lr": 0.25,
        "head_lr": 0.5,
        "batch_size": 8,
        "max_length": 16,
        "pooling": Pooling.MEAN,
        "exits": None,
        "exit_weights": "linear",
        "random_init": True,
        "seed": 1,
        "bf16": False,
        "resume": False,
    }
    return train.Options(**(settings | changes))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and a tokenizer, but no weights."""
    folder = tmp_path_factory.mktemp("backbone")
    BertConfig(
        vocab_size=800,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / name, folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with train.jsonl.gz (24 rows) and dev.jsonl (8 rows)."""
    words = ("good film", "bad film", "a film")
    rows = [{"text": words[i % 3] * (1 + i % 4), "label": words[i % 3][:3]} for i in range(24)]
    write_rows(tmp_path / "train.jsonl.gz", rows)
    write_rows(tmp_path / "dev.jsonl", rows[:8])
    return tmp_path


@pytest.fixture
def run(train: ModuleType, backbone: Path, data: Path) -> Run:
    """Runs the command on that data; arguments given later win."""

    def call(*more: str, random_init: bool = True) -> Result:
        arguments = [
            "--backbone",
            str(backbone),
            "--train",
            str(data / "train.jsonl.gz"),
            "--dev",
            str(data / "dev.jsonl"),
            "--output",
            str(data / "model"),
            "--epochs",
            "1",
            "--batch-size",
            "8",
            "--max-length",
            "16",
            *more,
        ]
        arguments += ["--random-init"] if random_init else []
        return CliRunner().invoke(train.main, arguments)

    return call


def test_loss_weights_exit_j_by_j(train: ModuleType) -> None:
    logits = torch.randn(3, 5, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 2, 2])
    losses = [
        np.mean(
            [-torch.log_softmax(row, -1)[label] for row, label in zip(rows, labels, strict=True)]
        )
        for rows in logits
    ]
    linear = (1 * losses[0] + 2 * losses[1] + 3 * losses[2]) / 6
    assert train.exit_loss(logits, labels, SINGLE, "linear").item() == pytest.approx(linear)
    uniform = train.exit_loss(logits, labels, SINGLE, "uniform").item()
    assert uniform == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("task", [SINGLE, MULTI])
def test_distilled_exits_learn_from_the_last_one(train: ModuleType, task: ProblemType) -> None:
    logits = torch.randn(3, 5, 4, generator=torch.manual_seed(0), dtype=torch.float64)
    logits.requires_grad_()
    hard = torch.eye(4, dtype=torch.float64)[[0, 3, 1, 2, 2]]
    labels = torch.tensor([0, 3, 1, 2, 2]) if task is SINGLE else hard
    last = logits[-1].detach()
    soft = last.softmax(-1) if task is SINGLE else last.sigmoid()

    def loss(exit_logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if task is SINGLE:
            return -(target * torch.log_softmax(exit_logits, -1)).sum(-1).mean()
        p = exit_logits.sigmoid()
        return -(target * p.log() + (1 - target) * (1 - p).log()).mean()

    taught = 0.3 * soft + 0.7 * hard
    expected = (
        loss(logits[0], taught) + 2 * loss(logits[1], taught) + 3 * loss(logits[2], hard)
    ) / 6
    found = train.exit_loss(logits, labels, task, "linear", 0.3)
    assert found.item() == pytest.approx(expected.item())
    # The last exit is taught by labels alone: nothing flows back through what it teaches.
    found.backward()
    wanted = torch.autograd.grad(loss(logits[-1], hard) / 2, logits)[0][-1]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[-1], wanted)


def test_multi_label_loss_is_binary_cross_entropy_over_all_labels(train: ModuleType) -> None:
    logits = torch.randn(2, 5, 3, generator=torch.manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    p = 1 / (1 + np.exp(-logits.numpy()))
    y = labels.numpy()
    losses = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(axis=(1, 2))
    found = train.exit_loss(logits, labels, MULTI, "linear").item()
    assert found == pytest.approx((losses[0] + 2 * losses[1]) / 3)


def test_pooler_and_classifiers_have_the_learning_rate_of_heads(
    train: ModuleType, backbone: Path, tmp_path: Path
) -> None:
    settings = options(train, backbone=str(backbone))
    model, _ = train.build_model(settings, ("a", "b"))
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = train.MultiExitTrainer(options=settings, model=model, args=arguments)
    groups = trainer.create_optimizer().param_groups
    of = {id(value): group for group in groups for value in group["params"]}
    by_name = {name: of[id(value)] for name, value in model.named_parameters()}
    heads = {name for name in by_name if "pooler" in name or "classifiers" in name}
    assert len(heads) == 6
    assert {by_name[name]["lr"] for name in heads} == {0.5}
    assert {by_name[name]["lr"] for name in by_name.keys() - heads} == {0.25}
    assert sum(len(group["params"]) for group in groups) == len(by_name)
    assert by_name["classifiers.0.weight"]["weight_decay"] > 0
    undecayed = {name for name, group in by_name.items() if group["weight_decay"] == 0}
    assert undecayed == {name for name in by_name if name.endswith("bias") or "LayerNorm" in name}


def test_exit_scores_are_those_of_each_exit(train: ModuleType) -> None:
    right, wrong = [0.0, 2.0], [2.0, 0.0]
    logits = np.array([[right, right], [wrong, right], [wrong, right], [wrong, wrong]])
    scores = train.exit_scores(logits, np.array([1, 1, 1, 1]), options(train))
    assert [score["accuracy"] for score in scores] == [0.25, 0.75]


def test_multi_label_exit_scores_cut_at_one_half(train: ModuleType) -> None:
    logits = np.array([[[0.1, -0.1]], [[-0.1, -3.0]]])
    labels = np.array([[1, 0], [1, 0]])
    (score,) = train.exit_scores(logits, labels, options(train, problem_type=MULTI))
    assert score["exact_match"] == 0.5
    assert score["micro_f1"] == pytest.approx(2 / 3)


def test_features_are_those_of_each_row_alone(train: ModuleType, backbone: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    rows = [Row("one", labels=("a",)), Row("two", "three", ("b",)), Row("x " * 99, labels=("a",))]
    first, second, third = train.features(rows, tokenizer, ("a", "b"), options(train))
    assert first["input_ids"] == tokenizer("one")["input_ids"]
    assert second["input_ids"] == tokenizer("two", "three")["input_ids"]
    assert len(third["input_ids"]) == 16
    assert [first["labels"], second["labels"]] == [0, 1]


def test_run_writes_a_model_that_loads_and_scores_of_every_exit(
    train: ModuleType, run: Run, data: Path
) -> None:
    result = run("--test", str(data / "dev.jsonl"), "--lr", "0.001")
    assert result.exit_code == 0, result.output
    report = json.loads((data / "model" / "training.json").read_text())
    assert report["rows"] == {"train": 24, "dev": 8, "test": 8}
    assert report["exits"] == [1, 2]
    assert report["options"]["distill"] == 0.5, "what the README says is the default"
    assert set(report["scores"]) == {"dev", "test"}
    for scores in report["scores"].values():
        assert [set(score) for score in scores] == [{"accuracy", "macro_f1", "matthews"}] * 2
    assert "dev: scores of every exit" in result.stdout
    model = load_checkpoint(data / "model")
    assert model.exit_config == MultiExitConfig((1, 2), ("a f", "bad", "goo"), SINGLE, Pooling.MEAN)
    tokenizer = AutoTokenizer.from_pretrained(data / "model")
    rows = list(read_rows(data / "dev.jsonl"))
    settings: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 16}
    encoded = tokenizer([row.text for row in rows], **settings, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**encoded).argmax(dim=-1)
    truth = torch.tensor(
        [model.exit_config.labels.index(label) for row in rows for label in row.labels or ()]
    )
    accuracies = (predicted == truth).float().mean(dim=1)
    assert [score["accuracy"] for score in report["scores"]["dev"]] == pytest.approx(
        accuracies.tolist()
    )
    assert sorted(path.name for path in (data / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]


def test_multi_label_run_on_the_encoder_of_another_model_dir(run: Run, data: Path) -> None:
    rows = [{"text": f"text {i}", "labels": ["a", "b"][: 1 + i % 2]} for i in range(16)]
    path = str(write_rows(data / "multi.jsonl", rows))
    arguments = [
        "--backbone",
        str(GOLDEN),
        "--train",
        path,
        "--dev",
        path,
        "--exits",
        "2,6",
        "--pooling",
        "cls",
        "--problem-type",
        MULTI.value,
        "--lr",
        "1e-9",
    ]
    result = run(*arguments, random_init=False)
    assert result.exit_code == 0, result.output
    report = json.loads((data / "model" / "training.json").read_text())
    scores = report["scores"]["dev"]
    assert [set(score) for score in scores] == [{"exact_match", "micro_f1", "macro_f1"}] * 2
    assert report["options"]["head_lr"] == 1e-3
    model, backbone = load_checkpoint(data / "model"), load_checkpoint(GOLDEN)
    assert model.exit_config == MultiExitConfig((2, 6), ("a", "b"), MULTI, Pooling.CLS)
    name = "bert.encoder.layer.5.output.dense.weight"
    weight, original = (each.state_dict()[name] for each in (model, backbone))
    torch.testing.assert_close(weight, original, rtol=0, atol=1e-6)


def test_resumed_run_ends_like_one_that_was_not_interrupted(
    train: ModuleType, run: Run, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = data / "whole", data / "broken"
    assert run("--epochs", "2", "--output", str(whole)).exit_code == 0
    steps: list[int] = []
    loss = train.MultiExitTrainer.compute_loss

    def counted(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            steps.append(self.state.global_step)
            if len(steps) == 5:
                raise InputError("the power fails in the second epoch")
        return loss(self, model, *args, **kwargs)

    monkeypatch.setattr(train.MultiExitTrainer, "compute_loss", counted)
    assert run("--epochs", "2", "--output", str(broken)).exit_code == 1
    assert not (broken / "training.json").exists()
    other = run("--epochs", "2", "--output", str(broken), "--resume", "--distill", "0")
    assert (other.exit_code, other.stdout) == (1, "")
    assert "checkpoints was begun with distill 0.5, not 0.0" in other.stderr
    rows = (data / "train.jsonl.gz").read_bytes()
    lines = gzip.decompress(rows).splitlines()
    (data / "train.jsonl.gz").write_bytes(gzip.compress(b"\n".join(reversed(lines))))
    other = run("--epochs", "2", "--output", str(broken), "--resume")
    assert "checkpoints was begun with other rows" in other.stderr
    (data / "train.jsonl.gz").write_bytes(rows)
    half_written = broken / "checkpoints" / "checkpoint-6"
    half_written.mkdir()
    (half_written / "trainer_state.json").touch()
    result = run("--epochs", "2", "--output", str(broken), "--resume")
    assert result.exit_code == 0, result.output
    assert steps == [0, 1, 2, 3, 4, 3, 4, 5], "goes on after the last finished epoch"
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--backbone", "missing_folder"], "missing_folder does not exist"),
        (["--exits", "1,3"], "do not fit an encoder of 2 layers"),
        (["--problem-type", "single_label_classification", "--train", "two.jsonl"], "2 labels"),
        (["--train", "none.jsonl"], "row 1 has no label"),
        (["--dev", "other.jsonl"], "other.jsonl, line 1 has label 'other', which the model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(
    run: Run, data: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(data)
    write_rows(data / "two.jsonl", [{"text": "x", "labels": ["a", "b"]}])
    write_rows(data / "none.jsonl", [{"text": "x"}])
    write_rows(data / "other.jsonl", [{"text": "x", "label": "other"}])
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (data / "model").exists()


def test_a_model_is_replaced_only_with_force(run: Run, data: Path) -> None:
    assert run().exit_code == 0
    before = (data / "model" / "model.safetensors").read_bytes()
    again = run("--seed", "7")
    assert (again.exit_code, again.stdout) == (1, "")
    assert "model holds a model -> replace it with --force" in again.stderr
    finished = run("--resume")
    assert finished.exit_code == 1
    assert "holds a finished model -> leave out --resume" in finished.stderr
    assert (data / "model" / "model.safetensors").read_bytes() == before
    assert run("--seed", "7", "--force").exit_code == 0
    assert (data / "model" / "model.safetensors").read_bytes() != before


def test_nothing_to_resume_leaves_nothing(run: Run, data: Path) -> None:
    result = run("--resume")
    assert result.exit_code == 1
    assert "holds no finished epoch to resume from" in result.stderr
    assert not (data / "model").exists()


def test_an_output_that_cannot_be_a_folder_is_one_line(run: Run, data: Path) -> None:
    (data / "file").touch()
    result = run("--output", str(data / "file" / "model"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Not a directory" in result.stderr


@pytest.mark.parametrize("flag", ["--exits=a", "--epochs=0", "--exit-weights=square", "--typo"])
def test_usage_errors_exit_2(run: Run, flag: str) -> None:
    assert run(flag).exit_code == 2


def test_columns_and_the_format_can_be_named(run: Run, data: Path) -> None:
    lines = (data / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    write_rows(data / "rows", [{"body": row["text"], "kind": row["label"]} for row in rows])
    files = [f"--{part}={data / 'rows'}" for part in ("train", "dev")]
    columns = ["--input-format=jsonl", "--text-column=body", "--label-column=kind"]
    result = run(*files, *columns)
    assert result.exit_code == 0, result.output
    report = json.loads((data / "model" / "training.json").read_text(encoding="utf-8"))
    assert report["rows"] == {"train": len(rows), "dev": len(rows)}
    assert report["options"]["reading"]["text_column"] == "body"
