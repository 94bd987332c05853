"""The activation of a reranker is read as sentence-transformers reads it, without its code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fpabee.exporter.convert.cross_encoder import activation_of
from fpabee.runtime import Activation
from fpabee.runtime.errors import ModelError

SIGMOID = "torch.nn.modules.activation.Sigmoid"
IDENTITY = "torch.nn.modules.linear.Identity"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER = {"type": "sentence_transformers.base.modules.transformer.Transformer"}


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)


NAMED: dict[str, tuple[dict[str, Any], dict[str, Any], Activation]] = {
    "nothing": ({}, {}, Activation.SIGMOID),
    "before version 4": (
        {},
        {"sbert_ce_default_activation_function": IDENTITY},
        Activation.IDENTITY,
    ),
    "version 4": (
        {},
        {"sentence_transformers": {"activation_fn": IDENTITY, "version": "4.1.0"}},
        Activation.IDENTITY,
    ),
    "version 6": (
        {SETTINGS: {"activation_fn": IDENTITY, "prompts": {}}, "modules.json": [TRANSFORMER]},
        {},
        Activation.IDENTITY,
    ),
    "the newest counts": (
        {SETTINGS: {"activation_fn": SIGMOID}},
        {"sentence_transformers": {"activation_fn": IDENTITY}},
        Activation.SIGMOID,
    ),
    "a short name": ({SETTINGS: {"activation_fn": "torch.nn.Identity"}}, {}, Activation.IDENTITY),
    "another block": ({}, {"sentence_transformers": {"version": "4.1.0"}}, Activation.SIGMOID),
}


@pytest.mark.parametrize("case", NAMED)
def test_the_activation_that_a_folder_names_is_known(case: str, tmp_path: Path) -> None:
    files, config, expected = NAMED[case]
    write(tmp_path, files)
    assert activation_of(tmp_path, SimpleNamespace(**config)) is expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another one": ({SETTINGS: {"activation_fn": "torch.nn.modules.activation.Tanh"}}, "Tanh"),
    "code of the folder": ({SETTINGS: {"activation_fn": "mine.Sigmoid"}}, "'mine.Sigmoid'"),
    "no name": ({SETTINGS: {"activation_fn": [1]}}, r"activation \[1\]"),
    "a prompt": (
        {SETTINGS: {"prompts": {"find": "Find: "}, "default_prompt_name": "find"}},
        "prompt 'find'",
    ),
    "another module": (
        {"modules.json": [TRANSFORMER, {"type": "mine.Harmful"}]},
        "modules Transformer, Harmful",
    ),
    "no JSON": ({SETTINGS: "{"}, "cannot be read"),
    "a list": ({SETTINGS: []}, "cannot be read"),
    "modules of no kind": ({"modules.json": {"a": 1}}, "cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused(case: str, tmp_path: Path) -> None:
    files, message = REFUSED[case]
    write(tmp_path, files)
    with pytest.raises(ModelError, match=message) as caught:
        activation_of(tmp_path, SimpleNamespace())
    assert caught.value.hint


@pytest.mark.parametrize("name", ["Sigmoid", "Identity"])
def test_sentence_transformers_agrees(name: str, tiny_models: Any, tmp_path: Path) -> None:
    """What the library writes is what is read."""
    library = pytest.importorskip("sentence_transformers")
    import torch
    from transformers import AutoConfig

    from .conftest import make_reranker

    source = make_reranker(tiny_models["bert"], tmp_path / "source")
    activation = getattr(torch.nn, name)()
    model = library.CrossEncoder(str(source), activation_fn=activation, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert activation_of(tmp_path / "saved", config).value == name.lower()
