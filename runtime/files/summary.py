"""A running tally of predictions: depth, exits, truncation, bad rows, scores. Flat in memory."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..engine import Engine
from ..errors import InputError, RowError
from ..metrics import encode_labels, evaluate
from ..results import Prediction
from ..rules.rules import ExitRule
from . import Row
from .records import Record


class Summary:
    """Tally of a run.

    Args:
        engine: the engine in use.
        rule: the rule in use; None for full depth.
        metrics: whether to score against the rows' labels.
    """

    def __init__(self, engine: Engine, rule: ExitRule | None, metrics: bool) -> None:
        self.rows = 0
        self.errors = 0
        self.completed = 0
        self._engine = engine
        self._rule = rule
        self._metrics = metrics
        self._exits: Counter[int] = Counter()
        self._truncated = 0
        self._empty = 0
        self._started = time.perf_counter()
        # Small integers only: a million rows of labels are a few megabytes.
        self._expected: list[int | bytes] = []
        self._predicted: list[int | bytes] = []

    def add(self, row: Row, prediction: Prediction) -> None:
        """Count one row.

        Raises:
            InputError: metrics are asked for and the row has no usable label.
        """
        self._count(row, prediction.exit, prediction.labels, prediction.truncated)

    def add_record(self, row: Row, record: Record) -> None:
        """Count a row that an earlier run has written."""
        labels = record["labels"] if self._engine.multi_label else [record["label"]]
        self._count(row, record["exit"], tuple(labels), "truncated" in record)
        self.completed += 1

    def add_error(self) -> None:
        """Count a row that could not be read."""
        self.rows += 1
        self.errors += 1

    def unavailable_reason(self, row: Row) -> RowError | None:
        """Why a row cannot be scored, where metrics are asked for."""
        if not self._metrics:
            return None
        try:
            self._expected_label(row)
        except InputError as error:
            return RowError(error.message, error.remedy)
        return None

    def _count(self, row: Row, exit_number: int, labels: tuple[str, ...], truncated: bool) -> None:
        self.rows += 1
        self._exits[exit_number] += 1
        self._truncated += truncated
        self._empty += not row.text
        if self._metrics:
            self._expected.append(self._expected_label(row))
            self._predicted.append(self._encode(labels, row))

    def _expected_label(self, row: Row) -> int | bytes:
        if row.labels is None:
            raise InputError(
                f"{row.place} has no label, which --metrics needs",
                "give every row one, name its column with --label-column, or leave out --metrics",
            )
        return self._encode(row.labels, row)

    def _encode(self, labels: tuple[str, ...], row: Row) -> int | bytes:
        manifest = self._engine.manifest
        task = manifest.task
        encoded = encode_labels([labels], task.labels, task.problem_type, [row.place])
        return encoded[0].astype(np.uint8).tobytes() if encoded.ndim == 2 else int(encoded[0])

    def scores(self) -> dict[str, float]:
        """Scores of the rows so far."""
        count = len(self._engine.labels)
        expected, predicted = (
            np.frombuffer(b"".join(rows), np.uint8).reshape(-1, count).astype(np.int64)  # type: ignore[arg-type]
            if self._engine.multi_label
            else np.array(rows, np.int64)
            for rows in (self._expected, self._predicted)
        )
        return evaluate(predicted, expected, count)

    @property
    def mean_depth(self) -> float:
        """Mean number of layers that ran for a row."""
        layers = self._engine.manifest.exit_layers
        total = sum(layers[number - 1] * count for number, count in self._exits.items())
        return total / max(1, self.rows - self.errors)

    def to_dict(self, operating_point: str | None) -> dict[str, Any]:
        """The summary for JSON; `operating_point` is the calibrated one in use, if one is."""
        seconds = time.perf_counter() - self._started
        layers = self._engine.manifest.model.layers
        content = {
            "rows": self.rows,
            "rows_before": self.completed,
            "errors": self.errors,
            "truncated": self._truncated,
            "empty": self._empty,
            "seconds": seconds,
            "rows_per_second": (self.rows - self.completed) / seconds,
            "target": self._engine.target,
            "operating_point": operating_point,
            "rule": None if self._rule is None else self._rule.to_dict(),
            "layers": layers,
            "mean_depth": self.mean_depth,
            "saving": 1 - self.mean_depth / layers,
            "exits": [
                {"exit": number, "layer": layer, "rows": self._exits[number]}
                for number, layer in enumerate(self._engine.manifest.exit_layers, start=1)
            ],
        }
        return content | ({"metrics": self.scores()} if self._expected else {})

    def print(self, console: Console, operating_point: str | None) -> None:
        """Print the summary; `operating_point` is the calibrated one in use, if one is."""
        seconds = time.perf_counter() - self._started
        done = self.rows - self.completed
        layers = self._engine.manifest.model.layers
        rule = "full depth" if self._rule is None else _describe(self._rule)
        rule = f"operating point {operating_point}: {rule}" if operating_point else rule
        console.print(
            f"{self.rows} rows in {seconds:.1f} s ({done / seconds:.0f} rows/s) on "
            f"{self._engine.target}, {rule}",
            soft_wrap=True,
        )
        console.print(
            f"mean depth {self.mean_depth:.2f} of {layers} layers, "
            f"saving {1 - self.mean_depth / layers:.1%}; "
            f"{self._truncated} truncated, {self._empty} empty"
        )
        self._print_parts(console)
        table = Table("exit", "layer", "rows", "share", "", box=None, pad_edge=False)
        for number, layer in enumerate(self._engine.manifest.exit_layers, start=1):
            count = self._exits[number]
            share = count / max(1, self.rows - self.errors)
            bar = "█" * round(30 * share)
            table.add_row(str(number), str(layer), str(count), f"{share:.1%}", bar)
        console.print(table)
        if self._metrics:
            self.print_metrics(console)
        if operating_point is None and self._rule is not None:
            target = self._engine.target
            points = ", ".join(self._engine.manifest.targets[target].operating_points)
            console.print(
                f"The rule is none of the operating points of {target}: {points}."
                if points
                else f"The rule is not calibrated for your data on {target}: run "
                "fpabee-calibrate on labelled rows.",
                soft_wrap=True,
            )

    def _print_parts(self, console: Console) -> None:
        if self.completed:
            console.print(f"{self.completed} rows were done by an earlier run")
        if self.errors:
            console.print(f"{self.errors} rows could not be read: their records are errors")

    def print_metrics(self, console: Console) -> None:
        """Print the scores."""
        console.print(", ".join(f"{name} {value:.4f}" for name, value in self.scores().items()))


def _describe(rule: ExitRule) -> str:
    settings = dict(rule.to_dict())
    name = settings.pop("name")
    return f"rule {name} (" + ", ".join(f"{k} {v}" for k, v in settings.items()) + ")"
