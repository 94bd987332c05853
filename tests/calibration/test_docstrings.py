"""The examples in calibration's docstrings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ..docstrings import run_code, run_sessions
from .conftest import label_rows, write


def test_code_runs(
    engine_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(label_rows(engine_copy("bert")), tmp_path / "dev.jsonl")
    monkeypatch.chdir(tmp_path)
    found = run_code("fpabee.calibration")
    assert found == ["CalibrationOptions", "calibrate", "threshold_for_depth"]


def test_sessions_print_what_they_say() -> None:
    assert run_sessions("fpabee.calibration") == ["Bound"]
