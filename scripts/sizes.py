"""How large the project is: `scripts/check --sizes` prints it.

A line of code is one that holds more than a comment or a docstring.
"""

from __future__ import annotations

import ast
import tokenize
from collections.abc import Sequence
from pathlib import Path

import click

from fpabee.commands import main

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "exporter", "calibration", "src/fpabee/commands")


def code_lines(folders: Sequence[str]) -> int:
    """The lines of code of the Python files in folders."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sum(len(_lines_of_code(path)) for path in paths)


def _lines_of_code(path: Path) -> set[int]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    lines = set[int]()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.string.strip() and token.type != tokenize.COMMENT:
                lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines - {0}  # where the encoding is named


def options() -> list[str]:
    """The options of all commands, each as often as commands have it."""
    context = click.Context(main)
    commands = [main.resolve_command(context, [name])[1] for name in main.list_commands(context)]
    parameters = [parameter for command in commands if command for parameter in command.params]
    return [max(p.opts, key=len) for p in parameters if isinstance(p, click.Option)]


def words(path: Path) -> int:
    """The words of a Markdown file, or of all of them in a folder."""
    paths = path.rglob("*.md") if path.is_dir() else [path]
    return sum(len(each.read_text(encoding="utf-8").split()) for each in paths)


def print_sizes() -> None:
    """Print lines of code, words and options."""
    every_option = options()
    print("lines of code")
    for folder in (*PACKAGES, "scripts", "tests"):
        print(f"  {folder:12} {code_lines([folder]):7,}")
    print(f"  {'packages':12} {code_lines(PACKAGES):7,}")
    print("words")
    print(f"  {'README.md':12} {words(ROOT / 'README.md'):7,}")
    print(f"  {'docs/':12} {words(ROOT / 'docs'):7,}")
    print("options of commands")
    print(f"  {'all':12} {len(every_option):7,}")
    print(f"  {'distinct':12} {len(set(every_option)):7,}")


if __name__ == "__main__":
    print_sizes()
