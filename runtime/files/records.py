"""What is written for a row: a record, and its cells where the output is a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import InputError, RowError
from ..results import Prediction
from . import LABEL_SEPARATOR, Row

Record = dict[str, Any]

_ALL_SCORES = "all_scores"


@dataclass(frozen=True)
class RecordSchema:
    """What a record holds.

    Attributes:
        labels: the model's labels.
        multi_label: whether a row has any number of them.
        with_text: whether the text is repeated.
        all_scores: whether the probabilities of all labels are given.
        errors: whether a record may be an error.
        separator: between labels, and between scores, in a cell.
    """

    labels: tuple[str, ...]
    multi_label: bool
    with_text: bool = False
    all_scores: bool = False
    errors: bool = False
    separator: str = LABEL_SEPARATOR

    def record(self, index: int, row: Row, prediction: Prediction) -> Record:
        """The record of a row; a field of the input never hides a result."""
        taken = self._names
        fields = {name: value for name, value in row.fields.items() if name not in taken}
        record: Record = {"index": index, **fields}
        if self.with_text:
            record["text"] = row.text
            if row.text_pair is not None:
                record["text_pair"] = row.text_pair
        scores = [round(score, 6) for score in prediction.scores]
        if self.multi_label:
            record |= {"labels": list(prediction.labels), "scores": scores}
        else:
            record |= {"label": prediction.labels[0], "score": scores[0]}
        record |= {"exit": prediction.exit, "layer": prediction.layer}
        if prediction.truncated:
            record["truncated"] = True
        if self.all_scores:
            record[_ALL_SCORES] = {
                label: round(value, 6)
                for label, value in zip(self.labels, prediction.probabilities, strict=True)
            }
        return record

    def error(self, index: int, error: RowError) -> Record:
        """The record in place of a row that could not be read."""
        return {"index": index, "error": str(error)}

    def fits(self, record: Record) -> bool:
        """Whether a record that was read is one of this layout: an error, or labels and an exit."""
        if "error" in record:
            return isinstance(record["error"], str)
        exit_number = record.get("exit")
        labels = record.get("labels") if self.multi_label else [record.get("label")]
        return (
            type(exit_number) is int
            and exit_number >= 1
            and isinstance(labels, list)
            and all(isinstance(label, str) and label in self.labels for label in labels)
        )

    @property
    def _results(self) -> tuple[str, ...]:
        text = ("text", "text_pair") if self.with_text else ()
        answer = ("labels", "scores") if self.multi_label else ("label", "score")
        return (*text, *answer, "exit", "layer", "truncated")

    @cached_property
    def _score_columns(self) -> tuple[str, ...]:
        return tuple(f"{_ALL_SCORES}.{label}" for label in self.labels) if self.all_scores else ()

    @cached_property
    def _names(self) -> set[str]:
        return {"index", "error", _ALL_SCORES, *self._results, *self._score_columns}

    def columns(self, fields: Iterable[str]) -> tuple[str, ...]:
        """The columns of a table: index, the input's other fields, the results."""
        error = ("error",) if self.errors else ()
        return ("index", *fields, *self._results, *self._score_columns, *error)

    def fields(self, record: Record) -> list[str]:
        """The input's fields in a record."""
        names = self._names
        return [name for name in record if name not in names]

    def flat(self, record: Record) -> Record:
        """A record with a value for each column that is not the input's."""
        record = dict(record)
        scores = record.pop(_ALL_SCORES, {})
        record |= {f"{_ALL_SCORES}.{label}": value for label, value in scores.items()}
        if "error" not in record:
            record.setdefault("truncated", False)
        return record

    def cell(self, value: Any) -> str:
        """A value of a flat record as text: nothing for none, labels and scores joined."""
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(part, (str, int, float)) for part in value):
            return self.separator.join(map(self.cell, value))
        return to_json(value)

    def check_separator(self) -> None:
        """Check that labels can be joined and split again.

        Raises:
            InputError: a label holds the separator.
        """
        held = [label for label in self.labels if self.separator in label]
        if self.multi_label and held:
            raise InputError(
                f"the label {held[0]!r} holds {self.separator!r}, which separates labels in a cell",
                "give another --label-separator, or write JSON lines",
            )


def to_json(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False)
