"""Tiny data and encoders to train on."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from fpabee.exporter.training import TrainOptions, bag_of_ngrams, workflow
from fpabee.exporter.training.examples import Examples

GOLDEN = Path(__file__).parents[2] / "golden" / "pabee_bert"

WriteRows = Callable[[str, Iterable[Mapping[str, Any]]], str]
Options = Callable[..., TrainOptions]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Writes rows as JSON lines to a file of that name, and returns its path."""

    def write(name: str, rows: Iterable[Mapping[str, Any]]) -> str:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return str(path)

    return write


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder with random weights, and a tokenizer."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(42)
    config = BertConfig(
        vocab_size=200,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / name, folder)
    return folder


@pytest.fixture
def options(backbone: Path, write_rows: WriteRows) -> Options:
    """Makes options for 24 rows to train on and 8 in dev; the arguments replace some of them."""
    words = ("good film", "bad film", "a film")
    rows = [{"text": words[i % 3] * (1 + i % 4), "label": words[i % 3][:3]} for i in range(24)]
    settings: dict[str, Any] = {
        "train": write_rows("train.jsonl.gz", rows),
        "dev": write_rows("dev.jsonl", rows[:8]),
        "backbone": str(backbone),
        "epochs": 1.0,
        "batch_size": 8,
        "max_length": 16,
    }
    return lambda **changes: TrainOptions(**(settings | changes))


@pytest.fixture(autouse=True)
def short_trainings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few passes for exit 0, whose table is large."""
    monkeypatch.setattr(bag_of_ngrams, "_MOST_EPOCHS", 4)


@dataclass
class Call:
    """What the training of exits was called with."""

    options: TrainOptions
    train: Examples
    dev: Examples


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Lets exits stay untrained, and notes what their training is called with."""
    noted: list[Call] = []

    def note(
        _: Any, train: Examples, dev: Examples, __: Any, options: TrainOptions, ___: Any
    ) -> None:
        noted.append(Call(options, train, dev))

    monkeypatch.setattr(workflow, "train_exits", note)
    return noted
