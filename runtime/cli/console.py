"""What commands print for people: every line, table and progress bar goes through here.

Names of labels, targets and points come from files, and a file may contain escape codes that a
terminal obeys. So all characters that are not printable are escaped; JSON does that itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from time import perf_counter
from typing import Any

import rich_click as click
from rich import progress as bars
from rich.console import Console
from rich.text import Text

from ..errors import printable
from ..files.job import Job
from ..progress import Progress

_WIDE = 1000
_UPDATE_SECONDS = 0.2
_LINE_SECONDS = 30.0
_DECIMAL = re.compile(r"\d+\.\d+")


def echo(line: str, err: bool = False) -> None:
    """Print a line on standard output, or on standard error."""
    click.echo(printable(line), err=err)


class PlainConsole(Console):
    """A console without markup, emoji codes and control characters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Escape a line, a cell or a title."""
        return super().render_str(printable(text), **settings)


def table_console() -> Console:
    """Standard output for tables: as wide as the terminal, or in a file as wide as they need."""
    console = PlainConsole()
    # Without a terminal, rich would break cells to fit 80 columns.
    return console if console.is_terminal else PlainConsole(width=_WIDE)


class _Display:
    """One line of text with a bar; without a terminal, the text is printed every half minute.

    A thread prints it, because a single step, such as a build, can take many minutes.

    Args:
        quiet: show nothing.
        text: what happens first.
    """

    def __init__(self, quiet: bool, text: str = "loading") -> None:
        self._console = PlainConsole(stderr=True, quiet=quiet)
        is_bar = self._console.is_terminal and not quiet
        self._prints = not (is_bar or quiet)
        self._bar = bars.Progress(
            bars.SpinnerColumn(),
            bars.BarColumn(bar_width=20),
            bars.TextColumn("{task.description}", markup=False),
            bars.TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not is_bar,
        )
        self._text = text
        self._started = perf_counter()
        self._ended = Event()
        self._thread = Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> _Display:
        self._bar.start()
        self._task = self._bar.add_task(self._text, total=None)
        if self._prints:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._ended.set()
        if self._prints:
            self._thread.join()

    def show(self, text: str, share: float | None, at_once: bool = False) -> None:
        """Change the text and the bar.

        Args:
            text: what happens now.
            share: how much of it is done, from 0 to 1; None: not known.
            at_once: where there is no bar, print the text now, too.
        """
        total = None if share is None else 1.0
        self._text = printable(text)
        self._bar.update(self._task, description=self._text, completed=share or 0.0, total=total)
        if at_once and self._prints:
            self._console.print(self._text, soft_wrap=True)

    def _repeat(self) -> None:
        while not self._ended.wait(_LINE_SECONDS):
            elapsed = timedelta(seconds=round(perf_counter() - self._started))
            self._console.print(f"{self._text} ({elapsed})", soft_wrap=True)


@contextmanager
def step_progress(quiet: bool) -> Iterator[Progress]:
    """Show the steps of an operation; without a terminal, a line for each, and every half minute.

    A step is the same if only a decimal number in its text changed, such as the loss of a training.

    Args:
        quiet: show nothing.
    """
    last = ""

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        step = _DECIMAL.sub("", what)
        display.show(f"{what} {done}/{total}", done / total if total else None, step != last)
        last = step

    with _Display(quiet) as display:
        yield progress


@contextmanager
def row_progress(job: Job, quiet: bool) -> Iterator[Callable[[], None]]:
    """Show rows and rate; without a terminal, one line every half minute.

    Args:
        job: whose rows are shown whenever what this gives is called.
        quiet: show nothing.
    """
    with _Display(quiet, "0 rows") as display:
        due = perf_counter() + _UPDATE_SECONDS

        def advance() -> None:
            nonlocal due
            now = perf_counter()
            if now >= due:
                due = now + _UPDATE_SECONDS
                display.show(f"{job.rows} rows, {job.rows_per_second:.0f} rows/s", None)

        yield advance
