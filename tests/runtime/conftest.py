"""Fixtures of the command `fpabee-run`."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pytest

from fpabee.runtime.cli.run import main

from .running import Result, Run


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command in this process; stdout is taken at its file descriptor."""

    def run(*arguments: str | Path, stdin: bytes = b"") -> Result:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Result(int(caught.value.code or 0), out, err)

    return run


@pytest.fixture
def bert(engines: Mapping[str, Path]) -> Path:
    return engines["bert"]
