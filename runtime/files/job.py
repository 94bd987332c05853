"""A job: the rows of inputs are classified in blocks, and counted; see `Job`.

Where a block ends depends only on the rows, and each block runs separately. A resumed run repeats
the unfinished block with the same batches, so it writes the same bytes. (The last digits of a row's
scores may depend on the rows in its batch.)
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..encoding import blocks, characters
from ..engine import Engine
from ..errors import RowError
from ..quality import Labels, evaluate
from ..rules.rules import ExitRule
from .records import Record, RecordSchema
from .rows import Row, encode_labels

BLOCK_ROWS = 4096
BLOCK_CHARACTERS = 512 * 2**10

Item = Row | RowError


class Job:
    """Classifies rows, and keeps a tally of them in flat memory.

    Args:
        engine: the engine that runs.
        rule: the rule that decides; None for full depth.
        schema: what is written for a row. If records may be errors, the record of a row that
            cannot be read is its error; otherwise such a row ends the job.
        metrics: whether predictions are scored against the labels of the rows.

    Attributes:
        engine: as given.
        rule: as given.
        metrics: as given.
        rows: number of rows.
        rows_before: how many of these an earlier run has done.
        errors: rows that could not be read, or that have no usable label if predictions are
            scored.
        first_error: the error of the first of these.
        truncated: rows that were longer than the engine takes.
        empty: rows with an empty text.
        exits: rows by the exit at which they stopped.
    """

    def __init__(
        self, engine: Engine, rule: ExitRule | None, schema: RecordSchema, metrics: bool = False
    ) -> None:
        self.engine = engine
        self.rule = rule
        self.metrics = metrics
        self.rows = self.rows_before = self.errors = self.truncated = self.empty = 0
        self.first_error: RowError | None = None
        self.exits: Counter[int] = Counter()
        self._schema = schema
        self._task = engine.manifest.task
        self._started = time.perf_counter()
        # How often each pair of true and predicted labels occurred.
        self._answers: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = Counter()

    def run(
        self,
        items: Iterable[Item],
        write: Callable[[Record], object],
        completed: Iterator[Record],
        advance: Callable[[], None],
        unbuffered: bool = False,
    ) -> None:
        """Classify rows and write their records in order.

        Args:
            items: the rows.
            write: takes the next record.
            completed: the records that an earlier run has written; they are only counted.
            advance: called after every record.
            unbuffered: whether the record of a row is written before the next row is read.

        Raises:
            RowError: a row cannot be read and is not to be skipped.
        """
        most_rows = 1 if unbuffered else BLOCK_ROWS
        checked = map(self._checked, items)
        for block in blocks(checked, _characters, BLOCK_CHARACTERS, most_rows):
            start = self.rows
            for item, record in zip(block, itertools.islice(completed, len(block)), strict=False):
                self._count(item, record)
                self.rows_before += 1
            if self.rows == start + len(block):
                continue
            # The whole block is run even if some of its rows are completed already.
            rows = [item.content for item in block if isinstance(item, Row)]
            answers = self.engine.stream(rows, rule=self.rule, full_depth=self.rule is None)
            for item, record in zip(
                block, self._schema.records(block, answers, start), strict=True
            ):
                if record["index"] == self.rows:
                    write(record)
                    self._count(item, record)
                    advance()

    def _checked(self, item: Item) -> Item:
        """The row, or its error if it cannot be scored although scores are wanted."""
        try:
            if isinstance(item, RowError):
                raise item
            if self.metrics and item.labels is None:
                raise RowError(
                    f"{item.where} has no label to score against",
                    "give every row a label, set `label_column`, or leave out `metrics`",
                )
            if self.metrics:
                self._encoded([item.labels or ()], [item.where])
        except RowError as error:
            if not self._schema.errors:
                raise
            return error
        return item

    def _count(self, item: Item, record: Record) -> None:
        self.rows += 1
        if isinstance(item, RowError):
            self.first_error = self.first_error or item
            self.errors += 1
            return
        self.exits[record["exit"]] += 1
        self.truncated += "truncated" in record
        self.empty += not item.text
        if self.metrics:
            labels = record["labels"] if self.engine.multi_label else [record["label"]]
            self._answers[item.labels or (), tuple(labels)] += 1

    def scores(self) -> dict[str, float]:
        """The scores of the rows so far, by `evaluate`; empty without any row."""
        if not self._answers:
            return {}
        counts = list(self._answers.values())
        expected, predicted = (
            np.repeat(self._encoded(labels), counts, axis=0)
            for labels in zip(*self._answers, strict=True)
        )
        return evaluate(predicted, expected, len(self._task.labels))

    def _encoded(self, labels: Sequence[Sequence[str]], places: Sequence[str] = ()) -> Labels:
        return encode_labels(labels, self._task.labels, self._task.problem_type, places)

    @property
    def rows_per_second(self) -> float:
        """Rows that this run has done per second, without those of an earlier run."""
        return (self.rows - self.rows_before) / (time.perf_counter() - self._started)

    def to_dict(self, operating_point: str | None) -> dict[str, Any]:
        """The tally for JSON; mean depth and saving are None without answered rows.

        Args:
            operating_point: the name of the calibrated rule that was run, if it was one.
        """
        manifest = self.engine.manifest
        layers = manifest.model.layers
        answered = self.exits.total()
        exits = [
            {"exit": number, "layer": layer, "rows": self.exits[number]}
            for number, layer in zip(manifest.exits, manifest.exit_layers, strict=True)
        ]
        ran = sum(part["layer"] * part["rows"] for part in exits)
        depth = ran / answered if answered else None
        counts = ("rows", "rows_before", "errors", "truncated", "empty")
        return {
            **{name: getattr(self, name) for name in counts},
            "seconds": time.perf_counter() - self._started,
            "rows_per_second": self.rows_per_second,
            "target": self.engine.target,
            "operating_point": operating_point,
            "rule": None if self.rule is None else self.rule.to_dict(),
            "layers": layers,
            "mean_depth": depth,
            "saving": None if depth is None else 1 - depth / layers,
            "exits": exits,
            **({"metrics": self.scores()} if self._answers else {}),
        }


def _characters(item: Item) -> int:
    return characters(item.content) if isinstance(item, Row) else 0
