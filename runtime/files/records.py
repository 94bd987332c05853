"""The record that is written for a row, and its cells if the output is a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import InputError, RowError
from ..results import Prediction
from .rows import LABEL_SEPARATOR, Row

Record = dict[str, Any]

_ALL_SCORES = "all_scores"


@dataclass(frozen=True)
class RecordSchema:
    """What a record contains.

    Attributes:
        labels: the labels of the model.
        multi_label: whether a row may have any number of labels.
        with_text: whether the text is repeated.
        all_scores: whether the probabilities of all labels are included.
        errors: whether a record may be an error.
    """

    labels: tuple[str, ...]
    multi_label: bool
    with_text: bool = False
    all_scores: bool = False
    errors: bool = False

    def record(self, index: int, row: Row, prediction: Prediction) -> Record:
        """The record of a row; a field of the input never replaces a result."""
        record: Record = {"index": index}
        record |= {name: v for name, v in row.fields.items() if name not in self._names}
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
            pairs = zip(self.labels, prediction.probabilities, strict=True)
            record[_ALL_SCORES] = {label: round(value, 6) for label, value in pairs}
        return record

    def error(self, index: int, error: RowError) -> Record:
        """The record of a row that has an error instead of an answer."""
        return {"index": index, "error": str(error)}

    @cached_property
    def _results(self) -> tuple[str, ...]:
        text = ("text", "text_pair") if self.with_text else ()
        answer = ("labels", "scores") if self.multi_label else ("label", "score")
        scores = (f"{_ALL_SCORES}.{label}" for label in self.labels if self.all_scores)
        return (*text, *answer, "exit", "layer", "truncated", *scores)

    @cached_property
    def _names(self) -> set[str]:
        return {"index", "error", _ALL_SCORES, *self._results}

    def columns(self, fields: Iterable[str]) -> tuple[str, ...]:
        """The columns of a table: the index, the other fields of the input, and the results."""
        return ("index", *fields, *self._results, *(("error",) if self.errors else ()))

    def fields(self, record: Record) -> list[str]:
        """The fields in a record that come from the input."""
        return [name for name in record if name not in self._names]

    def flat(self, record: Record) -> Record:
        """A record with one value for each column of results."""
        record = dict(record)
        scores = record.pop(_ALL_SCORES, {})
        record |= {f"{_ALL_SCORES}.{label}": score for label, score in scores.items()}
        if "error" not in record:
            record.setdefault("truncated", False)
        return record

    def check_separator(self) -> None:
        """Check that labels which are joined in a cell can be told apart again.

        Raises:
            InputError: a label contains the separator.
        """
        for label in self.labels if self.multi_label else ():
            if LABEL_SEPARATOR in label:
                raise InputError(
                    f"the label {label!r} contains {LABEL_SEPARATOR!r}, which separates labels",
                    "write JSON lines or Parquet",
                )


def to_json(value: Any) -> str:
    """JSON in one line."""
    return json.dumps(value, ensure_ascii=False)


def cell(value: Any) -> str:
    """A value as text: empty for None; labels and scores are joined; the rest is JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(part, (str, int, float)) for part in value):
        return LABEL_SEPARATOR.join(map(cell, value))
    return to_json(value)
