"""Errors of commands: one line in terms of options, and the exit code."""

from __future__ import annotations

import ast
import string
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import rich_click as click
from click.testing import CliRunner

from fpabee.runtime.cli.errors import exits_with_one_line, in_terms_of_options
from fpabee.runtime.errors import Call, InputError, Remedy

ROOT = Path(__file__).parents[3]
COMMANDS = {
    "train": "fpabee.exporter.cli.train",
    "export": "fpabee.exporter.cli.export",
    "bench": "fpabee.exporter.cli.bench",
    "calibrate": "fpabee.calibration.cli",
    "run": "fpabee.runtime.cli.run",
    "serve": "fpabee.runtime.cli.serve",
    "inspect": "fpabee.runtime.cli.inspect",
}


@click.group()
def group() -> None:
    """A group, as `fpabee` is one."""


@group.command()
@click.argument("model_dir")
@click.option("-o", "--output")
@click.option("--from", "source")
@exits_with_one_line
def fails(**_: Any) -> None:
    """Fail with a remedy that names parameters of every kind."""
    raise InputError(
        "no room", Remedy("set {output}, {source}, {model_dir} or {cache} to {size}", size=5)
    )


def test_a_remedy_names_the_options_of_the_running_command() -> None:
    result = CliRunner().invoke(group, ["fails", "DIR"])
    assert result.exit_code == 1
    expected = "error: no room -> set --output, --from, MODEL_DIR or cache to 5\n"
    assert result.stderr == expected
    assert result.stdout == ""


def test_python_users_read_parameters() -> None:
    remedy = Remedy("set {output}, or {call}", call=Call("calibrate", "engines", max_drop=1.0))
    error = InputError("no room", remedy)
    assert error.hint == "set output, or calibrate(engines, max_drop=1.0)"
    assert in_terms_of_options(error) == (
        "no room -> set output, or fpabee-calibrate engines --max-drop 1.0"
    )


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (Call("export", "MODEL_DIR", "my engines"), "fpabee-export MODEL_DIR -o 'my engines'"),
        (Call("add_targets", "ENGINES", fp16=True), "fpabee-export --from ENGINES --fp16"),
        (Call("calibrate", "ENGINES", "DATA"), "fpabee-calibrate ENGINES --data DATA"),
        (Call("inspect", "ENGINES", check=True), "fpabee-inspect ENGINES --check"),
    ],
    ids=str,
)
def test_calls_become_commands(call: Call, expected: str) -> None:
    assert in_terms_of_options(InputError("x", Remedy("{call}", call=call))) == f"x -> {expected}"


# Parameters of functions that no command has as an option.
PYTHON_ONLY = {"bound", "goals"}


def _nodes(name: str) -> Iterator[tuple[Path, ast.Call]]:
    """Everything in the packages that creates a `Remedy` or a `Call`."""
    for package in ("exporter", "runtime", "calibration"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == name:
                    yield path.relative_to(ROOT), node


def _options(module: str) -> set[str]:
    """Parameters of a command, by their names and as their options are spelled."""
    parameters = import_module(module).main.params
    return {
        name
        for parameter in parameters
        for name in (parameter.name, *(o.lstrip("-").replace("-", "_") for o in parameter.opts))
    }


def test_every_parameter_in_a_remedy_is_an_option_of_some_command() -> None:
    known = PYTHON_ONLY.union(*map(_options, COMMANDS.values()))
    unknown = {
        f"{path}: {field}"
        for path, node in _nodes("Remedy")
        if node.args and isinstance(node.args[0], ast.Constant)
        for _, field, _, _ in string.Formatter().parse(str(node.args[0].value))
        if field and field not in known | {keyword.arg for keyword in node.keywords}
    }
    assert unknown == set()


def test_every_call_in_a_remedy_is_a_command_with_its_options() -> None:
    for path, node in _nodes("Call"):
        if not isinstance(node.args[0], ast.Constant):
            continue  # another class of that name
        words = in_terms_of_options(
            InputError("", Remedy("{call}", call=Call(str(node.args[0].value))))
        ).split()
        options = _options(COMMANDS[words[1].removeprefix("fpabee-")])
        given = {keyword.arg for keyword in node.keywords if keyword.arg}
        assert given <= options, f"{path}, line {node.lineno}"
