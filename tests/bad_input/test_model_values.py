"""Odd values anywhere in a model folder's JSON: it loads, or it is refused in our words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpabee.exporter.checkpoint import load_checkpoint
from fpabee.exporter.model import MultiExitModel
from fpabee.exporter.tokenizer import save_tokenizer
from fpabee.runtime.errors import ModelError

VALUES = st.sampled_from(
    [None, 0, -1, 3, 2**40, 0.5, 1e300, True, "", "x", [], [1], {}, {"__float__": "NaN"}]
)


def places(value: Any, at: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths to every value; long lists and vocabularies are one value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, content in inner:
        found.append((*at, key))
        if isinstance(content, (dict, list)) and len(content) < 20:
            found += places(content, (*at, key))
    return found


def changed(content: Any, at: tuple[str | int, ...], value: object) -> str:
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return json.dumps(copy)


@pytest.fixture(scope="module")
def folders(
    tiny_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Copies of models, to be changed."""
    root = tmp_path_factory.mktemp("models")
    families = ("bert", "albert", "deberta-v2", "modernbert")
    return {name: Path(shutil.copytree(tiny_models[name], root / name)) for name in families}


@pytest.fixture(scope="module")
def bert(tiny_models: Mapping[str, Path]) -> MultiExitModel:
    return load_checkpoint(tiny_models["bert"])


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_configuration(folders: dict[str, Path], data: st.DataObject) -> None:
    folder = folders[data.draw(st.sampled_from(sorted(folders)))]
    path = folder / "config.json"
    original = path.read_text(encoding="utf-8")
    content = json.loads(original)
    at = data.draw(st.sampled_from(places(content)))
    try:
        path.write_text(changed(content, at, data.draw(VALUES)), encoding="utf-8")
        with suppress(ModelError):
            load_checkpoint(folder)
    finally:
        path.write_text(original, encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_tokenizer(
    folders: dict[str, Path],
    bert: MultiExitModel,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    path = folders["bert"] / name
    original = path.read_text(encoding="utf-8")
    content = json.loads(original)
    at = data.draw(st.sampled_from(places(content)))
    try:
        path.write_text(changed(content, at, data.draw(VALUES)), encoding="utf-8")
        with suppress(ModelError):
            spec = save_tokenizer(folders["bert"], bert, tmp_path_factory.mktemp("out"), None)
            assert 4 <= spec.max_length <= 64
    finally:
        path.write_text(original, encoding="utf-8")
