"""Progress of a long run on stderr: rows, rate, and the time that remains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..files.summary import Summary
from .console import PlainConsole, duration

_BAR_SECONDS = 0.2
_LINE_SECONDS = 30.0

Advance = Callable[[Summary, int], None]


class Meter:
    """Rate and remaining time, from the share of the input that has been read.

    Args:
        share: tells that share; None where the total is not known.
        clock: seconds.
    """

    def __init__(
        self, share: Callable[[], float | None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._share = share
        self._clock = clock
        self._started = clock()
        self._from: float | None = None

    def state(self, rows: int, completed: int, read: int) -> tuple[str, float | None]:
        """A line on the state of a run, and the share of the rows that are done.

        Args:
            rows: rows done.
            completed: those of them that an earlier run has done.
            read: rows read so far.
        """
        seconds = max(1e-9, self._clock() - self._started)
        rate = (rows - completed) / seconds
        text = f"{rows} rows, {rate:.0f} rows/s"
        share = self._share()
        if share is None or not read:
            return text, None
        # What is read runs ahead of what is done, by up to a block of rows.
        done = share * rows / read
        before = done * completed / max(1, rows)
        if done > before:
            text += f", {duration(seconds * (1 - done) / (done - before))} left"
        return text, done


@contextmanager
def progress(quiet: bool, share: Callable[[], float | None]) -> Iterator[Advance]:
    """Shows progress: a bar on a terminal, else a line every half minute.

    Args:
        quiet: show nothing.
        share: tells the share of the input that has been read, or None.
    """
    if quiet:
        yield lambda summary, read: None
        return
    console = PlainConsole(stderr=True)
    meter = Meter(share)
    bar = Progress(
        SpinnerColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    interval = _BAR_SECONDS if console.is_terminal else _LINE_SECONDS
    with bar:
        task = bar.add_task("loading", total=None)
        due = time.perf_counter() + interval

        def advance(summary: Summary, read: int) -> None:
            nonlocal due
            now = time.perf_counter()
            if now < due:
                return
            due = now + interval
            text, done = meter.state(summary.rows, summary.completed, read)
            total = None if done is None else 1.0
            bar.update(task, description=text, completed=done or 0.0, total=total)
            if not console.is_terminal:
                console.print(text, soft_wrap=True)

        yield advance
