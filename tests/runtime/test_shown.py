"""What people see of files holds no escape codes, whatever the files hold."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.progress import TextColumn
from rich.table import Table

from fpabee.runtime.cli.console import PlainConsole, Shown, echo
from fpabee.runtime.errors import InputError, printable

NASTY = "\x1b[31mred\x07\r\n\x9b2J\u202eeslaf\x7f [bold]x[/bold] :fire:"
PLAIN = "\\x1b[31mred\\x07\\r\\n\\x9b2J\\u202eeslaf\\x7f [bold]x[/bold] :fire:"


def test_what_is_not_printable_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(NASTY) == PLAIN
    assert printable("Grüße, 日本") == "Grüße, 日本"
    assert str(InputError(NASTY)) == PLAIN
    echo(NASTY)
    echo(NASTY, err=True)
    assert capsys.readouterr() == (f"{PLAIN}\n", f"{PLAIN}\n")


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_and_tables_are_escaped(terminal: bool) -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=200, force_terminal=terminal, color_system=None)
    table = Table(NASTY, title=NASTY)
    table.add_row(NASTY)
    console.print(NASTY)
    console.print(table)
    shown = file.getvalue()
    assert shown.count(PLAIN) == 4
    assert not any(c in shown for c in "\x07\r\x9b\u202e\x7f")
    assert "\x1b[31m" not in shown


def test_progress_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with Shown(quiet=False) as progress:
        progress(f"choose {NASTY}", 0, 1)
    assert capsys.readouterr().err == f"choose {PLAIN} 0/1\n"


def test_the_bar_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[Any] = []
    shown = Shown(quiet=True)
    monkeypatch.setattr(shown._bar, "update", lambda task, **values: updates.append(values))
    with shown as progress:
        progress(NASTY, 0, 1)
    assert updates[0]["description"] == PLAIN
    (column, *_) = shown._bar.columns
    assert isinstance(column, TextColumn)
    assert not column.markup
