"""Output for people: escaped text, and progress on standard error."""

from __future__ import annotations

import io
from queue import SimpleQueue
from threading import Semaphore
from types import SimpleNamespace
from typing import Any

import pytest
from rich import progress as bars
from rich.table import Table

from fpabee.commands import console as console_module
from fpabee.commands.console import (
    PlainConsole,
    echo,
    echo_cells,
    row_progress,
    step_progress,
)
from fpabee.runtime.errors import InputError, printable

NASTY = "\x1b[31mred\x07\r\n\x9b2J\u202eeslaf\x7f [bold]x[/bold] :fire:"
PLAIN = "\\x1b[31mred\\x07\\r\\n\\x9b2J\\u202eeslaf\\x7f [bold]x[/bold] :fire:"


def test_unprintable_characters_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(NASTY) == PLAIN
    assert printable("Grüße, 日本") == "Grüße, 日本"
    assert str(InputError(NASTY)) == PLAIN
    echo(NASTY)
    echo(NASTY, err=True)
    assert capsys.readouterr() == (f"{PLAIN}\n", f"{PLAIN}\n")


def test_lines_and_tables_are_escaped() -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=200, force_terminal=True, color_system=None)
    table = Table(NASTY, title=NASTY)
    table.add_row(NASTY)
    console.print(NASTY)
    console.print(table)
    shown = file.getvalue()
    assert shown.count(PLAIN) == 4
    assert not any(c in shown for c in "\x07\r\x9b\u202e\x7f")
    assert "\x1b[31m" not in shown


def test_figures_stand_under_each_other_and_names_are_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    echo_cells("short", ("1.5", "2"), (6, 4))
    echo_cells(70 * "long", ("1.5", "2"), (6, 4))
    short, name, long = capsys.readouterr().out.splitlines()
    assert name == 70 * "long"
    assert (len(short), len(long)) == (80, 80)
    assert short.split() == ["short", *long.split()]


def test_steps_are_escaped_in_lines_and_in_the_bar_of_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with step_progress(quiet=False) as progress:
        for done in range(3):
            progress(f"choose {NASTY}", done, 2)
        progress("write", 0, 0)
    assert capsys.readouterr() == ("", f"choose {PLAIN} 0/2\nwrite\n")
    with step_progress(quiet=True) as progress:
        progress("choose", 0, 1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with step_progress(quiet=False) as progress:
        progress(NASTY, 1, 2)
    shown = capsys.readouterr().err
    assert f"{PLAIN} 1/2" in shown
    assert not any(c in shown for c in "\x07\x9b\u202e\x7f")


class Clock:
    """A clock whose half minutes pass when a test says so, and the event that waits for them."""

    def __init__(self) -> None:
        self.now = 0.0
        self._waits = Semaphore(0)
        self._answers = SimpleQueue[bool]()

    def wait(self, seconds: float) -> bool:
        assert seconds == 30.0
        self._waits.release()
        return self._answers.get(timeout=60)

    def set(self) -> None:
        self._answers.put(True)

    def pass_half_a_minute(self) -> None:
        self._waits.acquire(timeout=60)
        self.now += 30.0
        self._answers.put(False)
        self._waits.acquire(timeout=60)  # what was due is printed
        self._waits.release()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(console_module, "Event", lambda: made)
    monkeypatch.setattr(console_module, "perf_counter", lambda: made.now)
    return made


def test_without_a_terminal_the_state_is_printed_every_half_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with step_progress(quiet=False) as progress:
        clock.pass_half_a_minute()
        for done in range(3):
            progress(f"train, loss 2.{done}", done, 125)
        clock.pass_half_a_minute()
        clock.pass_half_a_minute()
    assert capsys.readouterr().err.splitlines() == [
        "loading (0:00:30)",
        "train, loss 2.0 0/125",
        "train, loss 2.2 2/125 (0:01:00)",
        "train, loss 2.2 2/125 (0:01:30)",
    ]


def test_steps_that_take_turns_have_a_line_at_most_every_ten_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with step_progress(quiet=False) as progress:
        for done in range(30):
            progress(f"segment_{done:02}", done, 30)
            progress(f"target {done}: check", done, 30)
            clock.now += 1.0
    assert capsys.readouterr().err.splitlines() == [
        line
        for done in (0, 10, 20)
        for line in (f"segment_{done:02} {done}/30", f"target {done}: check {done}/30")
    ]


def test_the_rows_that_are_shown_are_all_that_are_done(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are counted in large blocks, so what was true at the last count may be long ago."""
    shown: Any = SimpleNamespace(rows=0, rate=0.0, job=SimpleNamespace(unit="rows", part="rows"))
    with row_progress(shown, quiet=False):
        shown.rows = 4096
        shown.rate = 136.5
        clock.pass_half_a_minute()
    assert capsys.readouterr().err == "4096 rows, 136 rows/s (0:00:30)\n"


def test_the_clock_of_a_full_bar_runs_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rich keeps the time at which a task was first complete."""
    now = 0.0
    made: list[bars.Progress] = []

    class Bar(bars.Progress):
        def __init__(self, *columns: bars.ProgressColumn, **settings: Any) -> None:
            super().__init__(*columns, get_time=lambda: now, **settings)
            made.append(self)

    monkeypatch.setattr(bars, "Progress", Bar)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with step_progress(quiet=False) as progress:
        progress("first", 2, 2)
        now = 75.0
        progress("second", 1, 2)
        (task,) = made[0].tasks
        assert not task.finished
        assert task.elapsed == 75.0
    capsys.readouterr()
