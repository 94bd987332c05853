"""A place for each case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from .cases import Place


@pytest.fixture
def place(
    tmp_path: Path,
    tiny_models: Mapping[str, Path],
    engines: Mapping[str, Path],
    ranking_engines: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Place:
    return Place(tmp_path, tiny_models, engines, ranking_engines, monkeypatch)
