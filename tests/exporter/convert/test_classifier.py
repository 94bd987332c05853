"""Classifiers become multi-exit models whose last exit gives their logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from fpabee.exporter.checkpoint import load_checkpoint, save_checkpoint
from fpabee.exporter.convert.classifier import Classifier, _load
from fpabee.exporter.exit_config import Pooling
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.errors import ModelError

from ...bad_input.cases import change_config, change_json
from ...closeness import assert_exported
from ...doubles.hub import Hub
from .conftest import KINDS, LABELS

Make = Callable[..., Path]


def batch() -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([[12], [3], [7], [1]])
    mask = (torch.arange(12) < lengths).long()
    return torch.where(mask == 1, torch.randint(5, 60, mask.shape), 1), mask


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_last_exit_gives_the_logits_of_the_classifier(
    kind: str, make: Make, tmp_path: Path
) -> None:
    classifier = Classifier(make(kind))
    pooling = list(Pooling)[len(kind) % 4]
    model = classifier.multi_exit(classifier.exit_config((1, 2), pooling))
    save_checkpoint(model, tmp_path / "model")
    again = load_checkpoint(tmp_path / "model")
    assert again.exit_config == model.exit_config
    assert again.exit_config.exits == (1, 2, 3)
    assert again.exit_config.labels == LABELS
    ids, mask = batch()
    expected = classifier.model(ids, attention_mask=mask).logits
    assert expected.std() > 1e-2
    for each in (model.eval(), again):
        assert_exported(each(ids, mask)[-1], expected)


@pytest.mark.parametrize(("share", "refused"), [(1e-5, False), (1e-3, True)])
def test_a_head_may_round_in_proportion_to_its_logits(
    share: float, refused: bool, classifier: Classifier
) -> None:
    last = classifier.model.classifier
    (ids, mask) = batch()
    with torch.no_grad():
        last.weight *= 500 / classifier.model(ids, attention_mask=mask).logits.abs().max()
    last.register_forward_hook(lambda _, __, logits: logits * (1 + share))
    with pytest.raises(ModelError, match="usual head") if refused else nullcontext():
        classifier.multi_exit(classifier.exit_config(()))


def test_a_classifier_on_the_hub_is_downloaded(hub: Hub, make: Make) -> None:
    hub.add("owner/name", make("bert"))
    here, there = (Classifier(source).model.state_dict() for source in (make("bert"), "owner/name"))
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_classifier_that_an_adapter_changed_is_not_that_of_the_hub(
    hub: Hub, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("owner/name", make("bert"))
    monkeypatch.setattr(
        "fpabee.exporter.convert.classifier._load",
        lambda folder, config, _: _load(folder, config, adapter=None),
    )
    assert Classifier("owner/name").base_model == "owner/name"
    assert Classifier("owner/name", adapter=tmp_path).base_model == ""


def test_what_cannot_be_converted_is_refused(make: Make) -> None:
    folder = make("electra", problem_type="single_label_classification")
    with pytest.raises(ModelError, match="trained for single_label"):
        Classifier(folder, ProblemType.MULTI_LABEL)
    classifier = Classifier(folder)
    config = classifier.exit_config(())
    classifier.model.classifier.activation = nn.Tanh()
    with pytest.raises(ModelError, match="does not have the usual head of its family"):
        classifier.multi_exit(config)


def pickled(content: object, name: str = "pytorch_model") -> Callable[[Path], object]:
    """Weights in a pickle instead of safetensors."""

    def change(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        torch.save(content, folder / f"{name}.bin")

    return change


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_head(folder: Path) -> None:
    build: Any = AutoModelForSequenceClassification.from_pretrained
    build(folder).base_model.save_pretrained(folder)


def nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.LayerNorm.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_index(shard: str) -> Callable[[Path], object]:
    """Instead of its weights, a folder has an index, and another folder has the weights."""

    def change(folder: Path) -> None:
        outside = folder.with_name("outside.safetensors")
        (folder / "model.safetensors").rename(outside)
        index = {"weight_map": dict.fromkeys(load_file(outside), shard), "metadata": {}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def without_labels(folder: Path) -> None:
    change_json(
        folder / "config.json", lambda config: [config.pop("id2label"), config.pop("label2id")]
    )


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (without_head, "no trained head: it lacks 2 weights, first 'classifier"),
    "regression": (lambda f: change_config(f, problem_type="regression"), "is a regression model"),
    "one layer": (lambda f: change_config(f, num_hidden_layers=1), "has one layer"),
    "one label": (lambda f: change_config(f, id2label={"0": "x"}), "names 1 labels, but the heads"),
    "truncated": (truncate, r"model\.safetensors cannot be read"),
    "a pickle with a class": (pickled({"a": LABELS, "b": Path()}), "it holds more than weights"),
    "a task of no kind": (lambda f: change_config(f, problem_type="odd"), "problem_type 'odd'"),
    "an index of files elsewhere": (with_index("../outside.safetensors"), "names '../outside"),
    "an index of itself": (with_index("model.safetensors.index.json"), "names 'model.safetensors"),
    "NaN": (nan, r"embeddings\.LayerNorm\.bias holds NaN"),
    "no labels": (without_labels, "names 2 labels, but the heads give 3 -> .* id2label"),
    "too large a vocabulary": (lambda f: change_config(f, vocab_size=10**12), "asks for 32,0"),
    "other family": (lambda f: change_config(f, model_type="gpt2"), "'gpt2' is not supported"),
    "label twice": (
        lambda f: change_config(f, id2label={"0": "a", "1": "b", "2": "a"}),
        "names a label twice",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_anything_but_a_trained_classifier_is_refused(damage: str, make: Make) -> None:
    change, message = DAMAGE[damage]
    folder = make("bert")
    change(folder)
    with pytest.raises(ModelError, match=message) as caught:
        Classifier(folder)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_weights_in_parts_are_read(make: Make) -> None:
    folder = make("bert")
    whole = Classifier(folder).model
    whole.save_pretrained(folder, max_shard_size="20kB")
    (folder / "model.safetensors").unlink()
    assert len([*folder.glob("model-*.safetensors")]) > 1
    parts = Classifier(folder).model.state_dict()
    assert all(torch.equal(parts[name], value) for name, value in whole.state_dict().items())


def no_kind(config: Any) -> None:
    config["peft_type"] = "NONE"


def no_rank(config: Any) -> None:
    config["r"] = "four"


def change_adapter(folder: Path, change: Callable[[str], list[str]]) -> None:
    """Give each weight of an adapter other names, or none."""
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    names = {new: name for name in weights for new in change(name)}
    save_file({new: weights[name].clone() for new, name in names.items()}, path)


def deeper(folder: Path) -> None:
    """An adapter of a classifier with two more layers."""
    layers = ("layer.0", "layer.8"), ("layer.1", "layer.9")
    change_adapter(
        folder, lambda name: [name, *(name.replace(*pair) for pair in layers if pair[0] in name)]
    )


def headless(folder: Path) -> None:
    change_adapter(folder, lambda name: [] if "classifier" in name else [name])


@pytest.mark.filterwarnings("ignore")  # of peft about transformers
def test_an_adapter_is_merged_exactly_and_one_for_another_base_is_refused(
    make: Make, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    folder = make("bert")
    load: Any = AutoModelForSequenceClassification.from_pretrained
    settings = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=4)
    wrapped = peft.get_peft_model(load(folder), settings)
    for name, weight in wrapped.named_parameters():
        if "lora" in name or "modules_to_save" in name:
            nn.init.normal_(weight, std=0.3)
    wrapped.save_pretrained(tmp_path / "lora")
    ids, mask = batch()
    with torch.no_grad():
        expected = wrapped.eval()(ids, attention_mask=mask).logits
        plain = Classifier(folder).model(ids, attention_mask=mask).logits
        # An adapter often brings the head, and the classifier is a plain encoder.
        for change in (lambda _: None, without_head):
            change(folder)
            merged = Classifier(folder, adapter=tmp_path / "lora")
            found = merged.multi_exit(merged.exit_config(()))(ids, mask)[-1]
            assert_exported(found, expected)
    assert not torch.allclose(plain, expected, atol=1e-2)
    damaged: dict[str, tuple[Callable[[Path], object], str]] = {
        "pickle": (pickled({"a": Path()}, "adapter_model"), "it holds more than weights"),
        "list": (
            lambda f: (f / "adapter_config.json").write_text("[1]"),
            r"config\.json cannot be",
        ),
        "kind": (lambda f: change_json(f / "adapter_config.json", no_kind), "cannot be merged"),
        "number": (lambda f: change_json(f / "adapter_config.json", no_rank), "cannot be merged"),
        "modules": (
            lambda f: change_json(
                f / "adapter_config.json", lambda c: c.update(megatron_config={"a": "b"})
            ),
            "names modules to import",
        ),
        "deep": (deeper, r"4 weights .* no place for, first .*layer\.8"),
        "head": (headless, "cannot be merged"),
    }
    for name, (damage, message) in damaged.items():
        copy = Path(shutil.copytree(tmp_path / "lora", tmp_path / name))
        damage(copy)
        with pytest.raises(ModelError, match=message):
            Classifier(folder, adapter=copy)
    other = make("electra", labels=("no", "yes"))
    with pytest.raises(ModelError, match="cannot be merged into this classifier"):
        Classifier(other, adapter=tmp_path / "lora")
    with pytest.raises(ModelError, match=r"none has no adapter_config\.json"):
        Classifier(folder, adapter=tmp_path / "none")
