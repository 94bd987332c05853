"""Reading and writing model_dir: published checkpoints load, damaged ones are refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, BertConfig

from fpabee.exporter.checkpoint import (
    label_names,
    load_checkpoint,
    resolve_model_dir,
    save_checkpoint,
)
from fpabee.exporter.model import MultiExitConfig, MultiExitModel, Pooling
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.errors import ModelError

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("bert", "albert", "mpnet")

Change = Callable[[Path], None]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A copy of a published checkpoint, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "pabee_bert", tmp_path / "bert"))


def weights_of(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return weights


def change_weights(**changes: Any) -> Change:
    """Set weights (`__` stands for a dot); None drops them."""

    def change(folder: Path) -> None:
        new = {name.replace("__", "."): value for name, value in changes.items()}
        weights = {**weights_of(folder), **new}
        kept = {name: value for name, value in weights.items() if value is not None}
        torch.save(kept, folder / "pytorch_model.bin")

    return change


def change_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def write(name: str, content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def inputs_of(tokenizer: Any, row: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs that the tokenizer says the model takes, and no others."""
    encoded = tokenizer(row["text"], row.get("text_pair"), return_tensors="pt")
    return {name: encoded[name] for name in tokenizer.model_input_names}


@pytest.mark.parametrize("name", ["pabee_bert", "fpabee_albert"])
def test_published_checkpoint_gives_its_logits(name: str) -> None:
    folder = GOLDEN / name
    rows = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    texts = [row["text"] for row in rows]
    assert "" in texts
    assert not all(text.isascii() for text in texts)
    assert any("text_pair" in row for row in rows)
    model = load_checkpoint(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row in rows:
        with torch.no_grad():
            logits = model(**inputs_of(tokenizer, row))[:, 0]
        np.testing.assert_allclose(logits, row["logits"], rtol=0, atol=1e-4)


def test_checkpoint_without_our_block_has_an_exit_per_layer_at_the_first_token() -> None:
    model = load_checkpoint(GOLDEN / "pabee_bert")
    assert model.exit_config == MultiExitConfig(
        exits=(1, 2, 3, 4, 5, 6),
        labels=("negative", "neutral", "positive"),
        problem_type=ProblemType.SINGLE_LABEL,
        pooling=Pooling.CLS,
    )
    assert not model.training


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_give_the_same_model(
    family: str, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    encoder = load_checkpoint(tiny_models[family]).backbone.encoder
    config = MultiExitConfig(
        (1, encoder.config.num_hidden_layers),
        ("no", "ja", "да"),
        ProblemType.MULTI_LABEL,
        Pooling.MEAN,
    )
    model = MultiExitModel(encoder, config).eval()
    save_checkpoint(model, tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    assert again.exit_config == config
    ids, mask = torch.tensor([[2, 5, 6, 3]]), torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(again(ids, mask), model(ids, mask))


def test_saved_names_are_those_of_published_training_code(
    tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    model = load_checkpoint(tiny_models["bert"])
    save_checkpoint(model, tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    heads = {f"classifiers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert heads | {"bert.pooler.dense.weight", "bert.embeddings.word_embeddings.weight"} <= names
    assert {name.split(".")[0] for name in names} == {"bert", "classifiers"}


def test_safetensors_is_preferred_and_half_precision_becomes_float32(bert: Path) -> None:
    weights = {name: value.bfloat16() for name, value in weights_of(bert).items()}
    save_file(weights, bert / "model.safetensors")
    model = load_checkpoint(bert)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    name = "classifiers.2.weight"
    assert torch.equal(model.state_dict()[name], weights[name].float())


@pytest.mark.parametrize(
    ("named", "asked", "expected"),
    [
        (None, None, ProblemType.SINGLE_LABEL),
        (None, ProblemType.MULTI_LABEL, ProblemType.MULTI_LABEL),
        (ProblemType.MULTI_LABEL, None, ProblemType.MULTI_LABEL),
        (ProblemType.MULTI_LABEL, ProblemType.MULTI_LABEL, ProblemType.MULTI_LABEL),
    ],
)
def test_problem_type_comes_from_the_checkpoint_then_from_the_caller(
    bert: Path, named: ProblemType | None, asked: ProblemType | None, expected: ProblemType
) -> None:
    change_config(problem_type=named and named.value)(bert)
    assert load_checkpoint(bert, asked).exit_config.problem_type is expected


def test_problem_type_that_contradicts_the_checkpoint_is_refused(bert: Path) -> None:
    change_config(problem_type="multi_label_classification")(bert)
    with pytest.raises(ModelError, match=r"trained for multi_label.*leave out problem_type"):
        load_checkpoint(bert, ProblemType.SINGLE_LABEL)


def test_weights_that_no_exit_uses_are_left_out_and_named(
    bert: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_weights(extra__weight=torch.ones(2), bert__embeddings__position_ids=torch.arange(64))(
        bert
    )
    with caplog.at_level(logging.WARNING, logger="fpabee"):
        load_checkpoint(bert)
    (record,) = [record for record in caplog.records if record.name.startswith("fpabee")]
    assert "extra.weight" in record.getMessage()
    assert "position_ids" not in record.getMessage()


def test_hub_id_is_downloaded(
    tiny_models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def download(repo: str, **_: Any) -> str:
        asked.append(repo)
        return str(tiny_models["bert"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint("someone/tiny-bert").backbone.model_type == "bert"
    assert asked == ["someone/tiny-bert"]


def test_hub_failure_is_one_error_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(repo: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("the hub cannot be reached\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="the hub cannot be reached") as caught:
        resolve_model_dir("someone/tiny-bert")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["someone--else/model", "ünï/code"])
def test_an_id_that_the_hub_does_not_allow_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=name):
        resolve_model_dir(name)


def test_labels_are_in_the_order_of_their_numbers() -> None:
    """Not in the order of the file, and not in that of their names as text."""
    config = BertConfig(id2label={"10": "k", "0": "a", "2": "c", "1": "b"})
    assert label_names(Path("model"), config, 4) == ("a", "b", "c", "k")


@pytest.mark.parametrize("name", ["model_dir", "models/mine", "/no/such/folder"])
def test_a_missing_folder_is_not_searched_for_on_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(repo: str, **_: Any) -> str:
        pytest.fail(f"asked the hub for {repo}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelError, match=f"{name} does not exist .*train"):
        resolve_model_dir(name)


class _TouchesAFile:
    """Unpickling this runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_does_not_run(bert: Path, tmp_path: Path, new_format: bool) -> None:
    marker, path = tmp_path / "ran", bert / "pytorch_model.bin"
    torch.save(
        {"classifiers.0.weight": _TouchesAFile(marker)},
        path,
        _use_new_zipfile_serialization=new_format,
    )
    with pytest.raises(ModelError, match="cannot be read") as caught:
        load_checkpoint(bert)
    assert not marker.exists()
    check_text(caught.value)
    torch.load(path, weights_only=False)
    assert marker.exists(), "this pickle would not have run anything anyway"


def torch_file(folder: Path) -> bytes:
    return (folder / "pytorch_model.bin").read_bytes()


# Other damage is in tests/bad_input/test_model_dir.py.
DAMAGE: dict[str, tuple[Change, str]] = {
    "head too many": (change_weights(classifiers__6__weight=torch.ones(3, 48)), "7 heads"),
    "scalar head": (change_weights(classifiers__0__weight=torch.ones(())), "classifiers.0.weight"),
    "infinity": (
        change_weights(classifiers__1__bias=torch.full((3,), -torch.inf)),
        r"classifiers\.1\.bias",
    ),
    "truncated pickle": (
        lambda folder: write("pytorch_model.bin", torch_file(folder)[:-1000])(folder),
        "pytorch_model.bin",
    ),
    "text": (write("pytorch_model.bin", b"hello world\n" * 9), "pytorch_model.bin"),
    "not a tensor": (change_weights(bert__pooler__dense__bias=[1.0]), "pooler.dense.bias|pytorch_"),
    "no family": (write("config.json", b"{}"), "config.json"),
    "labels not numbered": (change_config(id2label={"a": "b"}), "config.json"),
    "exits not ascending": (change_config(fpabee={"exits": [6, 5, 4, 3, 2, 1]}), "ascending"),
    "exits too deep": (change_config(fpabee={"exits": [2, 3, 4, 5, 6, 7]}), "of 6 layers"),
    "unknown pooling": (change_config(fpabee={"pooling": "max"}), "'max'"),
    "width not a multiple of heads": (change_config(num_attention_heads=5), "config.json"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning:torch")
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(bert: Path, damage: str) -> None:
    load_checkpoint(bert)
    change, message = DAMAGE[damage]
    change(bert)
    with pytest.raises(ModelError, match=message) as caught:
        load_checkpoint(bert)
    check_text(caught.value)


def check_text(error: ModelError) -> None:
    assert error.hint
    assert "\n" not in str(error)
    assert "\033" not in str(error), "holds the control codes of a terminal"
    assert "weights_only" not in str(error), "advises to switch the safe loader off"
