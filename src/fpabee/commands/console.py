"""The output of commands for people: all lines, tables and progress bars go through here.

Names of labels, targets and points come from files, and a file may contain escape codes that a
terminal obeys. So all characters that are not printable are escaped; JSON does that itself.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any

import rich_click as click
from rich import progress as bars
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from ..runtime.errors import printable
from ..runtime.files.run import Run

if TYPE_CHECKING:  # `fpabee-run` starts without calibration
    from ..calibration.progress import Progress

_WIDTH = 80
_WIDE = 1000
_LINE_SECONDS = 30.0
_STEP_SECONDS = 10.0
# A bar that has been full once stops its clock for ever.
_NEARLY_FULL = 0.999
_NUMBER = re.compile(r"\d+(\.\d+)?")

_Show = Callable[[float | None, bool], None]


def echo(line: str, err: bool = False) -> None:
    """Print a line on standard output, or on standard error."""
    click.echo(printable(line), err=err)


def echo_wrapped(text: str) -> None:
    """Print text on standard output in lines of 80 columns."""
    for line in textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False):
        echo(line)


def echo_cells(name: str, cells: Sequence[str], widths: Sequence[int]) -> None:
    """Print a line of a table of 80 columns: a name on the left, and figures on the right.

    Args:
        name: has a line of its own if it is long; people type it, so it is never cut.
        cells: the figures.
        widths: of the columns of figures.
    """
    name = printable(name)
    figures = "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    most = _WIDTH - len(figures)
    if cell_len(name) > most:
        echo(name)
        name = ""
    echo((set_cell_size(name, most) + figures).rstrip())


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


def hide_bars_of_hub(quiet: bool) -> None:
    """With `quiet`, let `huggingface_hub` show no progress: it reads this when it is imported."""
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


class _Words(bars.ProgressColumn):
    """The column with words on what happens now, asked for whenever the bar is drawn."""

    def __init__(self, words: Callable[[], str]) -> None:
        super().__init__()
        self._words = words

    def render(self, task: bars.Task) -> Text:
        """Draw the column."""
        return Text(self._words())


@contextmanager
def _display(quiet: bool, words: Callable[[], str]) -> Iterator[_Show]:
    """One line of text with a bar; without a terminal, the text is printed every half minute.

    A thread prints it, because a single step, such as a build, can take many minutes.

    Args:
        quiet: show nothing.
        words: what happens now, in printable characters; the thread calls this.

    Yields:
        What changes the bar: how much is done from 0 to 1 (None: not known), and whether to print
        the text now, too, where there is no bar.
    """
    console = PlainConsole(stderr=True, quiet=quiet)
    is_bar = console.is_terminal and not quiet
    bar = bars.Progress(
        bars.SpinnerColumn(),
        bars.BarColumn(bar_width=20),
        _Words(words),
        bars.TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not is_bar,
    )
    task = bar.add_task("", total=None)
    started = perf_counter()
    ended = Event()

    def show(share: float | None, at_once: bool) -> None:
        total = None if share is None else 1.0
        bar.update(task, completed=min(share or 0.0, _NEARLY_FULL), total=total)
        if at_once and not is_bar:
            console.print(words(), soft_wrap=True)

    def repeat() -> None:
        while not ended.wait(_LINE_SECONDS):
            elapsed = timedelta(seconds=round(perf_counter() - started))
            console.print(f"{words()} ({elapsed})", soft_wrap=True)

    thread = Thread(target=repeat, daemon=True)
    if not (is_bar or quiet):
        thread.start()
    try:
        with bar:
            yield show
    finally:
        ended.set()
        if not (is_bar or quiet):
            thread.join()


@contextmanager
def step_progress(quiet: bool) -> Iterator[Progress]:
    """Show the steps of an operation; without a terminal, a line for each, and every half minute.

    A step is the same if only numbers in its text changed, such as the loss of a training. If it
    comes again, it has a line at most every ten seconds.

    Args:
        quiet: show nothing.
    """
    last = ""
    text = "loading"
    shown: dict[str, float] = {}

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last, text
        step = _NUMBER.sub("", what)
        now = perf_counter()
        # A single step has no share that is done.
        text = printable(f"{what} {done}/{total}" if total > 1 else what)
        is_due = step != last and now >= shown.get(step, -math.inf) + _STEP_SECONDS
        if is_due:
            shown[step] = now
        show(done / total if total > 1 else None, is_due)
        last = step

    with _display(quiet, lambda: text) as show:
        yield progress


@contextmanager
def row_progress(run: Run, quiet: bool) -> Iterator[None]:
    """Show rows and rate; without a terminal, one line every half minute.

    Args:
        run: whose rows are shown.
        quiet: show nothing.
    """

    def words() -> str:
        return f"{run.rows} {run.job.unit}, {run.rate:.0f} {run.job.part}/s"

    with _display(quiet, words):
        yield
