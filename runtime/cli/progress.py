"""Progress on standard error: a bar on a terminal, otherwise a line now and then."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich import progress as bars

from ..errors import printable
from ..files.summary import Summary
from ..progress import Progress
from .console import PlainConsole

_BAR_SECONDS = 0.2
_LINE_SECONDS = 30.0
_DECIMAL = re.compile(r"\d+\.\d+")

Advance = Callable[[Summary, int], None]


class _Display:
    """One line of text with a bar.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self._console = PlainConsole(stderr=True, quiet=quiet)
        self.is_bar = self._console.is_terminal and not quiet
        self._bar = bars.Progress(
            bars.SpinnerColumn(),
            bars.BarColumn(bar_width=20),
            bars.TextColumn("{task.description}", markup=False),
            bars.TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self.is_bar,
        )

    def __enter__(self) -> _Display:
        self._bar.start()
        self._task = self._bar.add_task("loading", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, text: str, share: float | None, as_line: bool = True) -> None:
        """Update the bar, or print a line where there is none.

        Args:
            text: what happens now.
            share: how much of it is done, from 0 to 1; None: not known.
            as_line: whether to print the line.
        """
        total = None if share is None else 1.0
        text = printable(text)
        self._bar.update(self._task, description=text, completed=share or 0.0, total=total)
        if as_line and not self.is_bar:
            self._console.print(text, soft_wrap=True)


@contextmanager
def step_progress(quiet: bool) -> Iterator[Progress]:
    """Show the steps of an operation; without a terminal, one line for each.

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


def state_of_run(summary: Summary, read: int, share: float | None) -> tuple[str, float | None]:
    """A line about the state of a run, and the share of the rows that are done.

    Args:
        summary: the tally so far, of at least one row.
        read: rows read so far.
        share: the share of the input that has been read; None: not known.
    """
    text = f"{summary.rows} rows, {summary.rate:.0f} rows/s"
    if not share:
        return text, None
    # Reading is ahead of classifying by up to one block of rows.
    total = read / share
    if summary.rate:
        left = (total - summary.rows) / summary.rate
        text += f", {timedelta(seconds=round(left))} left"
    return text, summary.rows / total


@contextmanager
def row_progress(quiet: bool, share: Callable[[], float | None]) -> Iterator[Advance]:
    """Show rows, rate and remaining time; without a terminal, one line every half minute.

    Args:
        quiet: show nothing.
        share: gives the share of the input that has been read, or None.
    """
    with _Display(quiet) as display:
        interval = _BAR_SECONDS if display.is_bar else _LINE_SECONDS
        due = time.perf_counter() + interval

        def advance(summary: Summary, read: int) -> None:
            nonlocal due
            now = time.perf_counter()
            if now >= due:
                due = now + interval
                display.show(*state_of_run(summary, read, share()))

        yield advance
