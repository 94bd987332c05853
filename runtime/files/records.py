"""The record that is written for a row: a line of JSON, or a row of a table."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec

from ..artifact.manifest import ProblemType
from ..encoding import blocks
from ..errors import InputError, RowError
from ..predictions import Prediction
from .formats import TextFormat
from .rows import LABEL_SEPARATOR, Row

Record = dict[str, Any]
ItemT = TypeVar("ItemT")
AnswerT = TypeVar("AnswerT")

_PROBABILITIES = "probabilities"
_GROUP_ROWS = 16_384
_GROUP_BYTES = 32 * 2**20
# Beyond this, a float cannot represent all integers.
_MAX_EXACT = 2**53


@dataclass(frozen=True)
class RecordSchema(ABC):
    """The contents of the record of a classified row.

    Attributes:
        answer: the fields of the answer.
        labels: the labels of the model.
        with_text: whether the text is repeated.
        probabilities: whether the probabilities of all labels are included.
        errors: whether a record may be an error.
    """

    answer: ClassVar[tuple[str, ...]]

    labels: tuple[str, ...]
    with_text: bool = False
    probabilities: bool = False
    errors: bool = False

    def record(self, index: int, row: Row, prediction: Prediction) -> Record:
        """The record of a row; a field of the input never replaces a result."""
        record: Record = {"index": index}
        record |= {name: v for name, v in row.fields.items() if name not in self.names}
        if self.with_text:
            record["text"] = row.text
            if row.text_pair is not None:
                record["text_pair"] = row.text_pair
        scores = [round(score, 6) for score in prediction.scores]
        record |= zip(self.answer, self._values(list(prediction.labels), scores), strict=True)
        record |= {"exit": prediction.exit, "layer": prediction.layer}
        if prediction.truncated:
            record["truncated"] = True
        if self.probabilities:
            pairs = zip(self.labels, prediction.probabilities, strict=True)
            record[_PROBABILITIES] = {label: round(value, 6) for label, value in pairs}
        return record

    @cached_property
    def results(self) -> tuple[str, ...]:
        """The columns of a table that hold the results of a row."""
        text = ("text", "text_pair") if self.with_text else ()
        all_labels = (f"{_PROBABILITIES}.{label}" for label in self.labels if self.probabilities)
        error = ("error",) if self.errors else ()
        return (*text, *self.answer, "exit", "layer", "truncated", *all_labels, *error)

    @cached_property
    def names(self) -> set[str]:
        """The fields of records that do not come from the input."""
        return {"index", "error", _PROBABILITIES, *self.results}

    def flat(self, record: Record) -> Record:
        """A record with one value for each column of results."""
        record = dict(record)
        pairs = record.pop(_PROBABILITIES, {}).items()
        record |= {f"{_PROBABILITIES}.{label}": value for label, value in pairs}
        if "error" not in record:
            record.setdefault("truncated", False)
        return record

    @abstractmethod
    def _values(self, labels: list[str], scores: list[float]) -> tuple[Any, ...]:
        """The values of the fields of the answer."""

    @abstractmethod
    def labels_of(self, record: Record) -> tuple[str, ...]:
        """The predicted labels in a record."""

    def check_separator(self) -> None:  # noqa: B027 - one label is not joined to others
        """Check that labels which are joined in a cell can be told apart again.

        Raises:
            InputError: a label contains the separator.
        """


class OneLabel(RecordSchema):
    """The record of a row that gets one label."""

    answer = ("label", "score")

    def _values(self, labels: list[str], scores: list[float]) -> tuple[Any, Any]:
        return labels[0], scores[0]

    def labels_of(self, record: Record) -> tuple[str, ...]:
        """The label."""
        return (record["label"],)


class AnyLabels(RecordSchema):
    """The record of a row that gets any number of labels."""

    answer = ("labels", "scores")

    def _values(self, labels: list[str], scores: list[float]) -> tuple[Any, Any]:
        return labels, scores

    def labels_of(self, record: Record) -> tuple[str, ...]:
        """The labels, in the order of the record."""
        return tuple(record["labels"])

    def check_separator(self) -> None:
        """Check that no label contains the separator; see `RecordSchema`."""
        for label in self.labels:
            if LABEL_SEPARATOR in label:
                raise InputError(
                    f"the label {label!r} contains {LABEL_SEPARATOR!r}, which separates labels",
                    "write JSON lines or Parquet",
                )


SCHEMAS: dict[ProblemType, type[RecordSchema]] = {
    ProblemType.SINGLE_LABEL: OneLabel,
    ProblemType.MULTI_LABEL: AnyLabels,
}
"""For each kind of classifier, what its records contain."""


def records(
    items: Iterable[ItemT | RowError],
    answers: Iterator[AnswerT],
    record: Callable[[int, ItemT, AnswerT], Record],
    first: int = 0,
) -> Iterator[Record]:
    """The records of rows, or of the errors of rows that have no answer.

    Args:
        items: the rows.
        answers: those of the rows that could be read.
        record: makes the record of an index, a row and its answer.
        first: the index of the first row.
    """
    for index, item in enumerate(items, first):
        if isinstance(item, RowError):
            yield {"index": index, "error": str(item)}
        else:
            yield record(index, item, next(answers))


def to_json(value: Any) -> str:
    """JSON in one line. As many lists in each other can be written as msgspec reads."""
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


def records_of(partial: Path) -> Iterator[Record]:
    """The records of a file of JSON lines."""
    with partial.open("rb") as stream:
        for line in stream:
            yield msgspec.json.decode(line)


def convert(partial: Path, target: Path, chosen: TextFormat, schema: RecordSchema) -> None:
    """Convert a file of JSON lines to a table, in flat memory.

    A table needs its columns before its first row, and Parquet cannot be appended to. So there are
    two passes: find the columns, then write the rows.

    Args:
        partial: the JSON lines.
        target: the file to write.
        chosen: CSV or Parquet.
        schema: what the records contain.
    """
    kinds: dict[str, set[str]] = {}
    for record in records_of(partial):
        for field in [name for name in record if name not in schema.names]:
            kinds.setdefault(field, set()).add(_kind(record[field]))
    if chosen is TextFormat.PARQUET:
        _write_parquet(partial, target, schema, kinds)
        return
    with target.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ("index", *kinds, *schema.results))
        writer.writeheader()
        for record in records_of(partial):
            cells = {name: _cell(value) for name, value in schema.flat(record).items()}
            try:
                writer.writerow(cells)
            except csv.Error as error:
                raise InputError(
                    f"row {record['index']} cannot be written as CSV with this Python: {error}",
                    "write .jsonl or .parquet, or use Python 3.11 or later, which writes NUL",
                ) from error


def _cell(value: Any) -> str:
    """A value as text: empty for None; labels and scores are joined; the rest is JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(part, (str, int, float)) for part in value):
        return LABEL_SEPARATOR.join(map(_cell, value))
    return to_json(value)


def arrow_type(column: str) -> Any:
    """The type of pyarrow of a column of results, such as `score`."""
    import pyarrow

    types = {
        "index": pyarrow.int64(),
        "exit": pyarrow.int32(),
        "layer": pyarrow.int32(),
        "truncated": pyarrow.bool_(),
        "score": pyarrow.float64(),
        "scores": pyarrow.list_(pyarrow.float64()),
        "labels": pyarrow.list_(pyarrow.string()),
        _PROBABILITIES: pyarrow.float64(),
    }
    return types.get(column.partition(".")[0], pyarrow.string())


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) <= _MAX_EXACT:
            return "int"
        return "long" if -(2**63) <= value < 2**63 else "other"
    return type(value).__name__


def _narrowest(kinds: set[str]) -> str:
    """The narrowest type of Arrow that represents all values exactly; a string fits them all."""
    exact = (({"bool"}, "bool"), ({"int", "long"}, "int64"), ({"int", "float"}, "float64"))
    return next((name for known, name in exact if kinds and kinds <= known), "string")


def _write_parquet(
    partial: Path, target: Path, schema: RecordSchema, kinds: dict[str, set[str]]
) -> None:
    import pyarrow
    from pyarrow import parquet

    types = {"index": arrow_type("index")}
    for name, kinds_of_field in kinds.items():
        types[name] = pyarrow.type_for_alias(_narrowest(kinds_of_field - {"NoneType"}))
    types |= {name: arrow_type(name) for name in schema.results}
    table = pyarrow.schema(list(types.items()))
    texts = [name for name, kind in types.items() if kind == pyarrow.string()]
    with partial.open("rb") as stream, parquet.ParquetWriter(target, table) as writer:
        for group in blocks(stream, len, _GROUP_BYTES, _GROUP_ROWS):
            rows = [schema.flat(msgspec.json.decode(line)) for line in group]
            for row in rows:
                for name in texts:
                    value = row.get(name)
                    if value is not None and not isinstance(value, str):
                        row[name] = to_json(value)
            writer.write_table(pyarrow.Table.from_pylist(rows, table))
