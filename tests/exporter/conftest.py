"""Shared exports, and ways to export quickly or wrongly."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fpabee.exporter import ExportOptions, export, segments
from fpabee.runtime.artifact.folder import read_manifest
from fpabee.runtime.artifact.manifest import Graph
from fpabee.runtime.check import REQUIREMENTS

from ..conftest import MadeOnce
from ..doubles.device import Double, serve

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden_engines(shared_root: Path) -> Mapping[str, Path]:
    """Engines folders of two exits of the published checkpoints, to save time. Read-only."""
    options = ExportOptions(exits=(2, 4))
    return MadeOnce(
        shared_root / "golden", lambda name, folder: export(GOLDEN / name, folder, options)
    )


@pytest.fixture
def ready_graphs(engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets exports of the tiny BERT take their graphs from an earlier export."""
    # Folders that tests copy are made now, because afterwards no graph can be exported.
    source, _ = (engines[family] for family in ("bert", "albert"))
    graphs = read_manifest(source).graphs

    def copy(_model: Any, _module: Any, path: Path, file: str) -> Graph:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, path)
        return graphs[path.stem]

    monkeypatch.setattr(segments, "export_graph", copy)


def require(patch: pytest.MonkeyPatch, share: float, *precisions: str) -> None:
    """Let targets in int8, or in other precisions, keep this share of labels and exits."""
    for precision in precisions or ("int8", "int8-bf16"):
        required = replace(REQUIREMENTS[precision], labels=share, exits=share)
        patch.setitem(REQUIREMENTS, precision, required)


@pytest.fixture
def double(engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Double:
    """A copy of the tiny BERT's engines folder, for which doubles build and run plans."""
    return serve(monkeypatch, engine_copy())
