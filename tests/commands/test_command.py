"""Errors of commands: one line in terms of options, and the exit code."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import rich_click as click

from fpabee.commands.command import exits_with_one_line
from fpabee.runtime import errors
from fpabee.runtime.errors import FpabeeError, InputError
from fpabee.runtime.files import ReadOptions
from fpabee.runtime.rules.rules import RULES

from ..programs import invoke

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "convert": "fpabee.commands.convert",
    "train": "fpabee.commands.train",
    "export": "fpabee.commands.export",
    "build": "fpabee.commands.build",
    "pack": "fpabee.commands.pack",
    "calibrate": "fpabee.commands.calibrate",
    "run": "fpabee.commands.run",
    "serve": "fpabee.commands.serve",
    "inspect": "fpabee.commands.inspect",
}


@click.group()
def group() -> None:
    """A group, as `fpabee` is one."""


@group.command()
@click.argument("model_dir")
@click.option("-o", "--output")
@click.option("--from", "source")
@click.option("--column", "columns")
@exits_with_one_line
def fails(**_: Any) -> None:
    """Fail with a hint that names parameters of every kind."""
    raise InputError(
        "no `room`",
        "set `output`, `source`, `model_dir` or `cache`, or `input_format`; set `text_pair_column`"
        ", or use `export`",
    )


def test_a_hint_names_the_options_of_the_running_command() -> None:
    result = invoke(group, "fails", "DIR")
    assert result.exit_code == 1
    expected = "set --output, --from, MODEL_DIR or cache; set --column text_pair=NAME"
    assert result.stderr == f"error: no `room` -> {expected}, or use fpabee-export\n"
    assert result.stdout == ""


# Parameters of functions and of HTTP requests that no command has as an option.
OTHERS = {"bound", "device", "goals", "predict", "rank", "truncate"}


def _hints() -> Iterator[tuple[Path, str]]:
    """The texts of all hints in the packages, with the expressions in them left out."""
    classes = {name for name, value in vars(errors).items() if _is_error(value)}
    for package in ("exporter", "runtime", "calibration"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in classes:
                    for part in (inner for hint in node.args[1:] for inner in ast.walk(hint)):
                        if isinstance(part, ast.Constant):
                            yield path.relative_to(ROOT), str(part.value)


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, FpabeeError)


def _options(module: str) -> set[str]:
    """Parameters of a command, by their names and as their options are spelled."""
    parameters = import_module(module).main.params
    return {
        name
        for parameter in parameters
        for name in (parameter.name, *(o.lstrip("-").replace("-", "_") for o in parameter.opts))
    }


def test_every_parameter_in_a_hint_is_an_option_of_some_command() -> None:
    settings = {name for rule in RULES.values() for name in rule.__struct_fields__}
    columns = {field.name for field in dataclasses.fields(ReadOptions)}
    known = OTHERS.union(settings, columns, COMMANDS, *map(_options, COMMANDS.values()))
    named = {(path, name) for path, text in _hints() for name in re.findall(r"`(\w+)`", text)}
    assert len(named) > 50
    assert {f"{path}: {name}" for path, name in named if name not in known} == set()
