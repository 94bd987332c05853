"""Errors of commands: one line in terms of options, and the exit code."""

from __future__ import annotations

import ast
import string
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import rich_click as click
from click.testing import CliRunner

from fpabee.runtime.cli.errors import exits_with_one_line, in_terms_of_options
from fpabee.runtime.errors import Call, InputError, Remedy

ROOT = Path(__file__).parents[3]
COMMANDS = (
    "fpabee.exporter.cli.train",
    "fpabee.exporter.cli.export",
    "fpabee.exporter.cli.bench",
    "fpabee.calibration.cli",
    "fpabee.runtime.cli.run",
    "fpabee.runtime.cli.inspect",
)


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
        "no room",
        Remedy("set {output}, {source}, {model_dir} or {cache} to {size}", size=5),
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
        (
            Call("drop_exits", "OLD", "NEW", exits="2,4"),
            "fpabee-export --from OLD -o NEW --exits 2,4",
        ),
        (Call("calibrate", "ENGINES", "DATA"), "fpabee-calibrate ENGINES --data DATA"),
        (Call("inspect", "ENGINES", check=True), "fpabee-inspect ENGINES --check"),
    ],
    ids=str,
)
def test_calls_become_commands(call: Call, expected: str) -> None:
    assert in_terms_of_options(InputError("x", Remedy("{call}", call=call))) == f"x -> {expected}"


# Parameters of functions that no command has as an option.
PYTHON_ONLY = {"bound", "goals"}


def test_every_parameter_in_a_remedy_is_an_option_of_some_command() -> None:
    options = {
        name
        for module in COMMANDS
        for option in import_module(module).main.params
        for name in (option.name, *(flag.lstrip("-").replace("-", "_") for flag in option.opts))
    }
    unknown = {
        f"{path.relative_to(ROOT)}: {field}"
        for package in ("exporter", "runtime", "calibration")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Remedy"
        for field in _parameters(node)
        if field not in options | PYTHON_ONLY
    }
    assert unknown == set()


def _parameters(remedy: ast.Call) -> set[str]:
    """Fields of a remedy whose text is written in place, without those that have values."""
    if not remedy.args or not isinstance(remedy.args[0], ast.Constant):
        return set()
    fields = {field for _, field, _, _ in string.Formatter().parse(str(remedy.args[0].value))}
    return {field for field in fields if field} - {keyword.arg for keyword in remedy.keywords}
