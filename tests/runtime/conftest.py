"""Fixtures of the commands `fpabee-run` and `fpabee-serve`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pytest

from fpabee.runtime.cli import run as run_command
from fpabee.runtime.cli import serve as serve_command

from .running import Result, Run, execute


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `fpabee-run` in this process."""

    def run(*arguments: str | Path, stdin: bytes = b"") -> Result:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return execute(run_command.main, capfd, arguments)

    return run


@pytest.fixture
def serve(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `fpabee-serve`, which is to end at once, in this process."""
    return lambda *arguments: execute(serve_command.main, capfd, arguments)


@pytest.fixture
def bert(engines: Mapping[str, Path]) -> Path:
    return engines["bert"]
