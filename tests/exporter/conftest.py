"""Exports that are shared, and a way to export without waiting for torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fpabee.exporter import export, segments

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden_engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines folders of the published checkpoints. Read-only."""
    root = tmp_path_factory.mktemp("golden")
    names = ("pabee_bert", "fpabee_albert")
    return {name: export(GOLDEN / name, root / name).folder for name in names}


@pytest.fixture
def ready_graphs(engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets exports of the tiny BERT take their graphs from the export that is already there."""
    # Those folders that tests copy are made now: afterwards no graph can be exported.
    source, _ = (engines[family] / "onnx" / "fp32" for family in ("bert", "albert"))

    def copy(_module: Any, _inputs: Any, _outputs: Any, path: Path, _positions: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path.name, path)

    monkeypatch.setattr(segments, "export_graph", copy)
