"""Reading and writing model_dir: published checkpoints load, damaged ones are refused."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig

from fpabee.exporter.checkpoint import (
    label_names,
    load_checkpoint,
    problem_type_of,
    resolve_model_dir,
    save_checkpoint,
)
from fpabee.exporter.exit_config import MultiExitConfig, Pooling
from fpabee.exporter.model import MultiExitModel
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.errors import ModelError
from fpabee.runtime.tasks import MultiLabel

from ..bad_input.cases import change_config
from ..doubles.hub import Hub

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A copy of a published checkpoint, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "pabee_bert", tmp_path / "bert"))


def weights_of(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return weights


def test_a_kind_with_one_logit_has_one_label(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BertConfig(id2label={"0": "a", "1": "b"}, problem_type="multi_label_classification")
    assert problem_type_of(Path("model"), config, None) is ProblemType.MULTI_LABEL
    monkeypatch.setattr(MultiLabel, "has_one_logit", True)
    with pytest.raises(ModelError, match="model is a regression model with 2 labels"):
        problem_type_of(Path("model"), config, None)


def test_checkpoint_without_our_block_has_an_exit_per_layer_at_the_first_token() -> None:
    model = load_checkpoint(GOLDEN / "pabee_bert")
    assert model.exit_config == MultiExitConfig(
        exits=(1, 2, 3, 4),
        labels=("negative", "neutral", "positive"),
        problem_type=ProblemType.SINGLE_LABEL,
        pooling=Pooling.CLS,
    )
    assert not model.training


@pytest.mark.parametrize(("pooling", "queries"), [(Pooling.MEAN, 0), (Pooling.ATTENTION, 3)])
def test_save_and_load_give_the_same_model(
    pooling: Pooling, queries: int, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    encoder = load_checkpoint(tiny_models["bert"]).backbone.encoder
    labels = ("no", "ja", "да")
    task = ProblemType.MULTI_LABEL
    config = MultiExitConfig(
        (1, 3),
        labels,
        task,
        pooling,
        hidden_layers=1,
        queries=queries,
        label_thresholds=(0.5, 0.25, 0.75),
    )
    model = MultiExitModel(encoder, config).eval()
    save_checkpoint(model, tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    assert again.exit_config == config
    ids = torch.tensor([[2, 5, 6, 3]])
    mask = torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(again(ids, mask), model(ids, mask))
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    heads = {f"classifiers.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")}
    theirs = {"bert.pooler.dense.weight", "bert.embeddings.word_embeddings.weight"}
    assert heads | theirs <= names, "those of published training code"
    ours = {"classifiers", "hidden", *["queries"] * (queries > 0)}
    assert {name.split(".")[0] for name in names} == {"bert", *ours}


def test_safetensors_is_preferred_and_half_precision_becomes_float32(bert: Path) -> None:
    weights = {name: value.bfloat16() for name, value in weights_of(bert).items()}
    save_file(weights, bert / "model.safetensors")
    model = load_checkpoint(bert)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    name = "classifiers.2.weight"
    assert torch.equal(model.state_dict()[name], weights[name].float())


def test_problem_type_comes_from_the_checkpoint_then_from_the_caller(bert: Path) -> None:
    single = ProblemType.SINGLE_LABEL
    multi = ProblemType.MULTI_LABEL
    for named, asked, expected in (
        (None, None, single), (None, multi, multi), (multi, None, multi), (multi, multi, multi)
    ):  # fmt: skip
        change_config(bert, problem_type=named and named.value)
        assert load_checkpoint(bert, asked).exit_config.problem_type is expected


def test_weights_that_no_exit_uses_are_left_out_and_named(
    bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"extra.weight": torch.ones(2), "bert.embeddings.position_ids": torch.arange(64)}
    torch.save(weights_of(bert) | more, bert / "pytorch_model.bin")
    with caplog.at_level(logging.WARNING, logger="fpabee"):
        load_checkpoint(bert)
    (record,) = [record for record in caplog.records if record.name.startswith("fpabee")]
    assert "extra.weight" in record.getMessage()
    assert "position_ids" not in record.getMessage()


def test_hub_id_is_downloaded(
    hub: Hub, bert: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (bert / "tf_model.h5").touch()
    hub.add("someone/tiny-bert", bert)
    assert load_checkpoint("someone/tiny-bert").backbone.model_type == "bert"
    assert {"config.json", "pytorch_model.bin", "tokenizer.json"} <= {*hub.downloaded()}
    assert not list(tmp_path.rglob("snapshots/*/tf_model.h5")), "of another framework"
    for name, says in (
        (
            "someone/else",
            "is not a folder here, and the hub has no such repository -> check the name",
        ),
        ("someone--else/model", "on the hub: Cannot have --"),  # which the hub does not allow
    ):
        with pytest.raises(ModelError, match=f"{name} {says}"):
            resolve_model_dir(name)
    (tmp_path / "models").mkdir()
    hub.requests.clear()
    for name in ("model_dir", "models/mine", "/no/such/folder"):
        with pytest.raises(ModelError, match=f"{name} does not exist .*train"):
            resolve_model_dir(name)
    assert hub.requests == []


def test_labels_are_in_the_order_of_their_numbers() -> None:
    """Not in the order of the file, and not in that of their names as text."""
    config = BertConfig(id2label={"10": "k", "0": "a", "2": "c", "1": "b"})
    assert label_names(Path("model"), config, 4) == ("a", "b", "c", "k")
