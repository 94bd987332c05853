"""A running tally of a run: depth, exits, truncation, bad rows and scores, in flat memory."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np

from ..engine import Engine
from ..errors import RowError
from ..rules.base import ExitRule
from .labels import encode_labels, evaluate
from .records import Record
from .rows import Row


class Summary:
    """The tally of a run.

    Args:
        engine: the engine that runs.
        rule: the rule that decides; None for full depth.
        metrics: whether predictions are scored against the labels of the rows.

    Attributes:
        engine: as given.
        rule: as given.
        metrics: as given.
        rows: number of rows.
        completed: how many of these an earlier run has done.
        errors: rows that could not be read, or that have no usable label if predictions are
            scored.
        first_error: the error of the first of these.
        truncated: rows that were longer than the engine takes.
        empty: rows with an empty text.
        exits: rows by the exit at which they stopped.
    """

    def __init__(self, engine: Engine, rule: ExitRule | None, metrics: bool) -> None:
        self.rule = rule
        self.metrics = metrics
        self.rows = 0
        self.completed = 0
        self.errors = 0
        self.first_error: RowError | None = None
        self.truncated = 0
        self.empty = 0
        self.exits: Counter[int] = Counter()
        self.engine = engine
        self._started = time.perf_counter()
        # How often each pair of true and predicted labels occurred.
        self._answers: Counter[tuple[tuple[str, ...], tuple[str, ...]]] = Counter()

    def add(self, item: Row | RowError, record: Record) -> None:
        """Count a row, which has a usable label if predictions are scored, and its record."""
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

    def check_label(self, row: Row) -> None:
        """Check that a row can be scored, if predictions are scored.

        Raises:
            RowError: it has no label, or one that the model does not know.
        """
        if not self.metrics:
            return
        if row.labels is None:
            raise RowError(
                f"{row.where} has no label to score against",
                "give every row a label, set `label_column`, or leave out `metrics`",
            )
        task = self.engine.manifest.task
        encode_labels([row.labels], task.labels, task.problem_type, [row.where])

    def scores(self) -> dict[str, float]:
        """The scores of the rows so far, by `evaluate`; empty without any row."""
        if not self._answers:
            return {}
        task = self.engine.manifest.task
        counts = list(self._answers.values())
        expected, predicted = (
            np.repeat(encode_labels(labels, task.labels, task.problem_type), counts, axis=0)
            for labels in zip(*self._answers, strict=True)
        )
        return evaluate(predicted, expected, len(task.labels))

    @property
    def rate(self) -> float:
        """Rows that this run has done per second, without those of an earlier run."""
        return (self.rows - self.completed) / (time.perf_counter() - self._started)

    def to_dict(self, operating_point: str | None) -> dict[str, Any]:
        """The tally for JSON; mean depth and saving are None without answered rows.

        Args:
            operating_point: the name of the calibrated rule that was run, if it was one.
        """
        manifest, answered = self.engine.manifest, self.exits.total()
        seconds = time.perf_counter() - self._started
        exits = [
            {"exit": number, "layer": layer, "rows": self.exits[number]}
            for number, layer in zip(manifest.exits, manifest.exit_layers, strict=True)
        ]
        ran = sum(part["layer"] * part["rows"] for part in exits)
        depth = ran / answered if answered else None
        return {
            "rows": self.rows,
            "rows_before": self.completed,
            "errors": self.errors,
            "truncated": self.truncated,
            "empty": self.empty,
            "seconds": seconds,
            "rows_per_second": (self.rows - self.completed) / seconds,
            "target": self.engine.target,
            "operating_point": operating_point,
            "rule": None if self.rule is None else self.rule.to_dict(),
            "layers": manifest.model.layers,
            "mean_depth": depth,
            "saving": None if depth is None else 1 - depth / manifest.model.layers,
            "exits": exits,
            **({"metrics": self.scores()} if self._answers else {}),
        }
