"""The examples in the runtime's docstrings."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..docstrings import run_code, run_sessions


def test_code_runs(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engines").symlink_to(bert)
    (tmp_path / "dev.jsonl").write_text('{"text": "play music", "label": "music"}\n')
    (tmp_path / "dev.csv").write_text("sentence,sentiment\nfine,positive\n")
    monkeypatch.chdir(tmp_path)

    ran = run_code("fpabee.runtime")
    assert ran == ["", "Engine", "Manifest", "ReadOptions", "read_rows"]
    assert run_code("fpabee.runtime.serving") == ["Scheduler"]


def test_sessions_print_what_they_say() -> None:
    assert run_sessions("fpabee.runtime") == ["ExitRule", "Tally.drift", "simulate"]
