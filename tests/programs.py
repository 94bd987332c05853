"""What tests run and change: commands, programs, functions that are noted, and packages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from importlib import util
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import click
import pytest
from click.testing import CliRunner, Result


def invoke(command: click.Command, *arguments: object, **settings: Any) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(command, [*map(str, arguments)], **settings)


def printed(command: click.Command, *arguments: object) -> str:
    """What a command prints on standard output, which must succeed."""
    result = invoke(command, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def program(*command: object, code: int = 0, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, which must be with this exit code."""
    words = [*map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def python(script: str, *arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, see `program`."""
    return program(sys.executable, "-c", script, *arguments, **settings)


def spy(patch: pytest.MonkeyPatch, place: Any, name: str) -> Mock:
    """Notes the calls of a function, which does what it did before."""
    noting = Mock(wraps=getattr(place, name))
    patch.setattr(place, name, noting)
    return noting


def hide(patch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if packages were not installed."""
    find = util.find_spec
    patch.setattr(util, "find_spec", lambda n, *p: None if n in packages else find(n, *p))
    for package in packages:
        patch.setitem(sys.modules, package, None)


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
