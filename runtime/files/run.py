"""A run: the rows of inputs are answered in blocks, and counted; see `Run`.

Where a block ends depends only on the rows, and each block runs separately. A resumed run repeats
the unfinished block with the same batches, so it writes the same bytes. (The last digits of a row's
scores may depend on the rows in its batch.)
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from operator import mul
from typing import Any

from ..encoding import blocks
from ..errors import RowError
from .jobs import Job
from .records import Record, records
from .rows import Row

BLOCK_ROWS = 4096
BLOCK_CHARACTERS = 512 * 2**10


class Run:
    """Answers rows, and keeps a tally of them in flat memory.

    Args:
        job: what a row becomes, and what is written for it.

    Attributes:
        job: as given.
        rows: number of rows.
        rows_before: how many of these an earlier run has done.
        errors: rows that could not be used.
        first_error: the error of the first of these.
        truncated: texts that were longer than the engine takes.
        empty: empty texts.
        exits: texts by the exit at which they stopped: rows, or documents of queries.
    """

    def __init__(self, job: Job[Any, Any]) -> None:
        self.job = job
        self.rows = self.rows_before = self.errors = self.truncated = self.empty = 0
        self.first_error: RowError | None = None
        # Without new keys, another thread can count them.
        self.exits = Counter(dict.fromkeys(job.route.exits.numbers, 0))
        self._answered_before = 0
        self._started = time.perf_counter()

    def answer(
        self,
        items: Iterable[Row | RowError],
        write: Callable[[Record], object],
        completed: Iterator[Record],
        unbuffered: bool = False,
    ) -> None:
        """Answer rows and write their records in order.

        Args:
            items: the rows.
            write: takes the next record.
            completed: the records that an earlier run has written; they are only counted.
            unbuffered: whether the record of a row is written before the next row is read.

        Raises:
            RowError: a row cannot be used and is not to be skipped.
        """
        most_rows = 1 if unbuffered else BLOCK_ROWS
        checked = map(self._checked, items)
        for block in blocks(checked, self._size, BLOCK_CHARACTERS, most_rows):
            start = self.rows
            for item, record in zip(block, itertools.islice(completed, len(block)), strict=False):
                self._count(item, record)
                self.rows_before += 1
                self._answered_before = self.exits.total()
            if self.rows == start + len(block):
                continue
            # The whole block is run even if some of its rows are completed already.
            answers = self.job.answers([each for each in block if not isinstance(each, RowError)])
            made = records(block, answers, self.job.record, start)
            for item, record in zip(block, made, strict=True):
                if record["index"] == self.rows:
                    write(record)
                    self._count(item, record)

    def _checked(self, row: Row | RowError) -> Any:
        """The item of the row, or its error if it cannot be used."""
        try:
            if isinstance(row, RowError):
                raise row
            return self.job.item(row)
        except RowError as error:
            if not self.job.options.skips_errors:
                raise
            return error

    def _size(self, item: Any) -> int:
        return 0 if isinstance(item, RowError) else self.job.size(item)

    def _count(self, item: Any, record: Record) -> None:
        self.rows += 1
        if isinstance(item, RowError):
            self.first_error = self.first_error or item
            self.errors += 1
            return
        for part in self.job.parts(record):
            self.exits[part["exit"]] += 1
            self.truncated += "truncated" in part
        self.empty += self.job.empty(item)
        self.job.count(item, record)

    @property
    def rate(self) -> float:
        """Texts that this run has answered per second, without those of an earlier run."""
        answered = self.exits.total() - self._answered_before
        return answered / (time.perf_counter() - self._started)

    @property
    def is_full_depth(self) -> bool:
        """Whether all layers run for every row, and no rule stops any."""
        return self.job.route is self.job.engine.core.full_depth

    def to_dict(self) -> dict[str, Any]:
        """The tally for JSON; mean depth and saving are None without answered rows."""
        job = self.job
        manifest = job.engine.manifest
        layers = manifest.model.layers
        answered = self.exits.total()
        seen = job.route.exits
        exits = [
            {"exit": number, "layer": layer, job.part: self.exits[number]}
            for number, layer in zip(seen.numbers, seen.layers, strict=True)
        ]
        ran = sum(map(mul, seen.layers_ran, (self.exits[number] for number in seen.numbers)))
        depth = ran / answered if answered else None
        saving = None if depth is None else 1 - depth / layers
        passes: dict[str, Any] = {}
        if seen.quick:  # layers say what is saved only where all of them run in one target
            saving = None
            in_doubt = self.exits[seen.last] / answered if answered else None
            passes = {"quick_target": seen.quick, "doubt_share": in_doubt}
        scores = job.scores()
        parts = {} if job.part == job.unit else {job.part: answered}
        return {
            job.unit: self.rows,
            f"{job.unit}_before": self.rows_before,
            **parts,
            **{name: getattr(self, name) for name in ("errors", "truncated", "empty")},
            "seconds": time.perf_counter() - self._started,
            f"{job.part}_per_second": self.rate,
            "target": job.engine.target,
            "operating_point": job.route.point,
            "rule": None if self.is_full_depth else job.route.rule.to_dict(),
            "layers": layers,
            "mean_depth": depth,
            "saving": saving,
            **passes,
            "exits": exits,
            **({"metrics": scores} if scores else {}),
        }
