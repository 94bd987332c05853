"""Running a command in the tests: what it gave, and that a refusal is one line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest


@dataclass(frozen=True)
class Result:
    """What a run of the command gave."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Result]


def execute(
    main: click.Command, capfd: pytest.CaptureFixture[str], arguments: Sequence[object]
) -> Result:
    """Run a command in this process; its output is taken at the file descriptors."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return Result(int(caught.value.code or 0), *capfd.readouterr())


def check_refused(result: Result, *says: str) -> None:
    """One line on stderr, nothing on stdout, exit code 1."""
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert "Traceback" not in result.err
    message, arrow, hint = result.err.partition(" -> ")
    assert arrow
    assert hint.strip()
    for part in says:
        assert part in message or part in hint


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something is so, which is soon unless the test fails."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


def line_with(text: str, *facts: str) -> str:
    """The line of a text that has all of these facts; its other words are free."""
    (line,) = [line for line in text.splitlines() if all(fact in line for fact in facts)]
    return line


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path
