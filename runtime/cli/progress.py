"""Progress on standard error: a bar on a terminal, otherwise a few lines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rich import progress as bars

from ..errors import printable
from ..files.summary import Summary
from ..progress import Progress
from .console import PlainConsole

_UPDATE_SECONDS = 0.2
_LINE_SECONDS = 30.0
_DECIMAL = re.compile(r"\d+\.\d+")

Advance = Callable[[Summary], None]


class _Display:
    """One line of text with a bar; without a terminal, some of the texts are printed.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool) -> None:
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
        self._due = perf_counter() + _LINE_SECONDS

    def __enter__(self) -> _Display:
        self._bar.start()
        self._task = self._bar.add_task("loading", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, text: str, share: float | None, at_once: bool = False) -> None:
        """Change the text and the bar.

        Args:
            text: what happens now.
            share: how much of it is done, from 0 to 1; None: not known.
            at_once: where there is no bar, print the text even if another one was printed just now.
        """
        total, now, text = None if share is None else 1.0, perf_counter(), printable(text)
        self._bar.update(self._task, description=text, completed=share or 0.0, total=total)
        if self._prints and (at_once or now >= self._due):
            self._due = now + _LINE_SECONDS
            self._console.print(text, soft_wrap=True)


@contextmanager
def step_progress(quiet: bool) -> Iterator[Progress]:
    """Show the steps of an operation; without a terminal, a line for each.

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
def row_progress(quiet: bool) -> Iterator[Advance]:
    """Show rows and rate; without a terminal, one line every half minute.

    Args:
        quiet: show nothing.
    """
    with _Display(quiet) as display:
        due = perf_counter() + _UPDATE_SECONDS

        def advance(summary: Summary) -> None:
            nonlocal due
            now = perf_counter()
            if now >= due:
                due = now + _UPDATE_SECONDS
                display.show(f"{summary.rows} rows, {summary.rate:.0f} rows/s", None)

        yield advance
