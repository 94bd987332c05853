"""The examples in the exporter's docstrings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from ..docstrings import run_code


@pytest.mark.usefixtures("ready_graphs")
def test_code_runs(
    tiny_models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_dir").symlink_to(tiny_models["bert"])
    monkeypatch.chdir(tmp_path)

    assert run_code("fpabee.exporter") == ["export"]
    assert (tmp_path / "engines" / "manifest.json").is_file()


def test_the_example_of_a_build_runs(
    engine_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_copy()
    monkeypatch.chdir(tmp_path)

    assert run_code("fpabee.exporter.targets") == ["build_targets"]


def test_the_example_of_a_training_runs(
    tiny_models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sentence-transformers").mkdir()
    (tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(tiny_models["bert"])
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    monkeypatch.chdir(tmp_path)
    # The table of exit 0 is large, so each of its passes is slow.
    monkeypatch.setattr("fpabee.exporter.training.bag_of_ngrams._MOST_EPOCHS", 2)

    assert run_code("fpabee.exporter.training") == ["train"]
    assert (tmp_path / "model_dir" / "training.json").is_file()
