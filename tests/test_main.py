"""`fpabee COMMAND` and `python -m fpabee`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

from fpabee.commands import main
from fpabee.runtime.machine import package

from .commands.test_command import COMMANDS
from .programs import invoke, program, python


def test_the_module_lists_the_commands() -> None:
    result = program(sys.executable, "-m", "fpabee", "--help")
    for part in (*COMMANDS, "_FPABEE_COMPLETE=bash_source fpabee", "python -m fpabee"):
        assert part in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"]])
def test_nothing_is_loaded_that_a_command_does_not_need(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from fpabee.commands import main\n"
        f"main({arguments}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        f"assert {len(arguments) > 1} or 'numpy' not in sys.modules"
    )
    python(code)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_pages(name: str) -> None:
    """`fpabee NAME` and `fpabee-NAME` show the same page, which fits and ends with examples."""
    command = import_module(COMMANDS[name]).main
    width = 80
    environment = {"COLUMNS": str(width)}
    own = invoke(command, "--help", prog_name=f"fpabee {name}", env=environment)
    result = invoke(main, name, "--help", prog_name="fpabee", env=environment)
    assert result.exit_code == 0
    assert result.stdout == own.stdout
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    examples = lines[lines.index("Examples:") + 1 :]
    assert all(line.startswith((f"  fpabee-{name} ", "  cat ")) for line in examples)
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help
        flags = option.opts if isinstance(option, click.Option) else [option.opts[0].upper()]
        assert any(line.startswith(f"  {', '.join(flags)}") for line in lines), option.name
    first = lines[lines.index("Options:") : lines.index("", lines.index("Options:"))]
    assert sum(line.startswith("  -") for line in first) <= 14


def test_wrong_usage_is_one_escaped_line() -> None:
    result = invoke(main, "run", "engines", "--\x1b[2J", prog_name="fpabee")
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(" -> see fpabee run --help")
    assert "\x1b" not in line


@pytest.mark.parametrize(
    ("words", "expected"),
    [("fpabee ", set(COMMANDS)), ("fpabee in", {"inspect"}), ("fpabee inspect --j", {"--json"})],
)
def test_commands_and_their_options_are_completed(words: str, expected: set[str]) -> None:
    environment = {
        "_FPABEE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    result = invoke(main, prog_name="fpabee", env=environment)
    found = {line.split(",")[1] for line in result.stdout.splitlines()}
    assert found == expected


def test_commands_say_what_they_need(tmp_path: Path) -> None:
    """Someone who embeds the runtime installs no click, but has the names of the commands."""
    (tmp_path / "fpabee-run").write_text("from fpabee.__main__ import main; main()")
    code = (
        "import runpy, sys\n"
        "from importlib import util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'rich_click' else find(name)\n"
        "sys.modules['rich_click'] = sys.modules['click'] = sys.modules['rich'] = None\n"
        "runpy.run_path(sys.argv[0])"
    )
    without = f"import sys; sys.argv[0] = {str(tmp_path / 'fpabee-run')!r}\n{code}"
    done = python(without, code=1)
    assert done.stdout == ""
    assert f"pip install {package('cpu')}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_command_starts_under_its_own_name(tmp_path: Path) -> None:
    script = tmp_path / "fpabee-inspect"
    script.write_text("from fpabee.__main__ import main; main()")
    assert "--check" in program(sys.executable, script, "--help").stdout
