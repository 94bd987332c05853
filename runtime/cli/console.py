"""What commands show people: every line, table and bar goes through here.

Names of labels, targets and points come from files, and a file may hold escape codes that a
terminal obeys. So everything that is not printable is escaped; JSON does that itself.
"""

from __future__ import annotations

from typing import Any

import click
from rich import progress as bars
from rich.console import Console
from rich.text import Text

from ..errors import printable
from ..progress import Progress

_WIDE = 1000


def echo(line: str, err: bool = False) -> None:
    """Print a line on standard output, or on standard error."""
    click.echo(printable(line), err=err)


class PlainConsole(Console):
    """A console that prints text as it is: no markup, no emoji codes, no control characters."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """A line, a cell or a title, escaped."""
        return super().render_str(printable(text), **settings)


def table_console() -> Console:
    """Standard output for tables: as wide as the terminal, or into a file as wide as they need."""
    console = PlainConsole()
    # Without a terminal rich would take 80 columns and break cells; tables take what they need.
    return console if console.is_terminal else PlainConsole(width=_WIDE)


def duration(seconds: float) -> str:
    """A time for people, such as `1:05` or `1:00:05`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Shown:
    """Progress on stderr: a bar on a terminal, else a line for each new thing.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self._console = PlainConsole(stderr=True, quiet=quiet)
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._last = ""

    def __enter__(self) -> Progress:
        self._bar.start()
        task = self._bar.add_task("load", total=None)

        def progress(what: str, done: int, total: int) -> None:
            self._bar.update(task, description=printable(what), completed=done, total=total)
            if self._bar.disable and what != self._last:
                self._console.print(f"{what} {done}/{total}", soft_wrap=True)
            self._last = what

        return progress

    def __exit__(self, *_: object) -> None:
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.stop()
