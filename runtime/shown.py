"""What commands show: progress on stderr, tables on stdout."""

from __future__ import annotations

from collections.abc import Callable

from rich import progress as bars
from rich.console import Console

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


_WIDE = 1000


def table_console() -> Console:
    """Standard output for tables: as wide as the terminal, or into a file as wide as they need."""
    # Names of labels and files are no markup.
    console = Console(highlight=False, markup=False)
    # Without a terminal rich would take 80 columns and break cells; tables take what they need.
    return console if console.is_terminal else Console(highlight=False, markup=False, width=_WIDE)


class Shown:
    """Progress on stderr: a bar on a terminal, else a line for each new thing.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
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
            self._bar.update(task, description=what, completed=done, total=total)
            if self._bar.disable and what != self._last:
                self._console.print(f"{what} {done}/{total}", highlight=False, soft_wrap=True)
            self._last = what

        return progress

    def __exit__(self, *_: object) -> None:
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.stop()
