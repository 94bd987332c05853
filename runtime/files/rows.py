"""A row of an input, how the named values of a line or record become one, and its labels."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, RowError
from .formats import TextFormat

LABEL_SEPARATOR = "|"
"""Separates labels in a cell of a table: in a column `labels` of an input, and in CSV outputs."""

_TEXT_PAIR = "text_pair"
_LABELS = ("labels", "label")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an input; everything but the text is optional.

    Attributes:
        text: the text, or the first text of a pair.
        text_pair: the second text of a pair; None if the row is a single text.
        labels: names of the true labels, exactly one if the task is single-label; None if they
            are not known.
        fields: all other fields, which are passed through to the output.
        where: file and line, or in Parquet the number of the row, for messages.
    """

    text: str
    text_pair: str | None = None
    labels: tuple[str, ...] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="a row", compare=False)

    @property
    def content(self) -> str | tuple[str, str]:
        """The text or pair of texts, as the engine takes it."""
        return self.text if self.text_pair is None else (self.text, self.text_pair)


@dataclass(frozen=True)
class ReadOptions:
    """How an input is read: its format, and which of its columns are text and labels.

    Attributes:
        input_format: the format, or its name; None: the suffix of the file name decides, and
            standard input is JSON lines if its first line starts with `{`, else plain text.
        text_column: the column or field that holds the text.
        text_pair_column: the one with the second text; empty: there is none. None means
            `text_pair`, unless you named that column as one of the other two.
        label_column: the one with the true label or labels; empty: there is none. None means
            `labels` or `label`, unless you named that column as one of the other two.

    Raises:
        InputError: two of the columns are the same.

    Example:
        ```python
        from fpabee.runtime import ReadOptions, read_rows

        options = ReadOptions(text_column="sentence", label_column="sentiment")
        texts = [row.content for row in read_rows("dev.csv", options)]
        ```
    """

    input_format: TextFormat | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        named = list(filter(None, self._named))
        if len(set(named)) < len(named):
            raise InputError(
                f"text, text pair and label have the columns {', '.join(named)}",
                "name a different column for each",
            )

    @property
    def _named(self) -> tuple[str | None, ...]:
        return self.text_column, self.text_pair_column, self.label_column

    @property
    def names_columns(self) -> bool:
        """Whether any column is not the usual one, which plain text does not have."""
        return self._named != ReadOptions()._named

    @property
    def pair_column(self) -> str:
        """The name of the column that holds the second text; empty if none does."""
        if self.text_pair_column is None:
            return "" if _TEXT_PAIR in self._named else _TEXT_PAIR
        return self.text_pair_column

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns that may hold labels; the first one that has a value counts."""
        if self.label_column is None:
            return tuple(name for name in _LABELS if name not in self._named)
        return (self.label_column,) if self.label_column else ()

    def check(self, names: Sequence[str], where: str) -> None:
        """Check that a table has the columns that will be read.

        Args:
            names: the columns of the table.
            where: the file, for messages.

        Raises:
            InputError: the text column or another column that the options name is missing, or
                two columns have the same name.
        """
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise InputError(
                f'{where} has two columns named "{twice}"', "give every column its own name"
            )
        for option in ("text_column", "text_pair_column", "label_column"):
            name = getattr(self, option)
            if name and name not in names:
                hint = f"set `{option}` to one of these, or rename it in the file"
                if len(names) == 1 and ";" in names[0]:
                    hint = "separate the columns with commas instead of semicolons"
                raise InputError(
                    f'{where} has no column "{name}"; it has: {", ".join(names)}', hint
                )

    def row(self, content: Mapping[str, Any], where: str, table: bool = False) -> Row:
        """Make a row of named values.

        Args:
            content: the values by name.
            where: file and line, for messages.
            table: whether the values are cells, so that a string in `labels` is split.

        Raises:
            RowError: the text or the pair is not a string, or the labels are not names.
        """
        text = content.get(self.text_column)
        if text is None and {"query", "documents"} <= content.keys():
            raise RowError(
                f"{where} is a query with documents, but texts are expected here",
                "queries are for a reranker; give texts to a classifier",
            )
        if not isinstance(text, str):
            raise RowError(
                f'{where} has no string field "{self.text_column}"',
                "give it one, or set `text_column` to the name of the field with the text",
            )
        pair = content.get(self.pair_column) if self.pair_column else None
        if pair is not None and not isinstance(pair, str):
            raise RowError(
                f'{where}: "{self.pair_column}" is a {type(pair).__name__}',
                "make it a string, or leave it out",
            )
        used = {self.text_column, self.pair_column, *self.label_columns} - {""}
        fields = {name: value for name, value in content.items() if name not in used}
        return Row(text, pair, self._labels(content, where, table), fields, where)

    def _labels(
        self, content: Mapping[str, Any], where: str, table: bool
    ) -> tuple[str, ...] | None:
        for name in self.label_columns:
            value = content.get(name)
            if value is None:
                continue
            if table and name == _LABELS[0] and isinstance(value, str):
                parts = map(str.strip, value.split(LABEL_SEPARATOR))
                return tuple(filter(None, parts))
            names = value if isinstance(value, list) else [value]
            if any(part is None or isinstance(part, (dict, list)) for part in names):
                raise RowError(
                    f'{where}: "{name}" is neither a name nor a list of names',
                    'write a string, such as "positive", or ["a", "b"] for several labels',
                )
            return tuple(map(str, names))
        return None


def data_sha256(rows: Sequence[Row], labels: bool = True) -> str:
    """Hash of the texts of rows and, unless left out, of their labels."""
    digest = hashlib.sha256()
    for row in rows:
        content = [row.text, row.text_pair, list(row.labels or ()) if labels else None]
        digest.update(json.dumps(content, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()
