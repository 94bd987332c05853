"""What a row is, and how one is made of named values, whatever file they stand in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from ..errors import InputError, Remedy, RowError

T = TypeVar("T")

LABEL_SEPARATOR = "|"
"""Between the labels of a cell of a column `labels`, in and out."""

# Far above any data, and far below what Python's JSON writes.
_MOST_NESTED = 100

_TEXT_PAIR = "text_pair"
_LABELS = ("labels", "label")


class TextFormat(str, Enum):
    """How an input is read; all but Parquet are UTF-8, and may be compressed with gzip."""

    TEXT = "txt"
    """A text a line; an empty line is an empty text."""
    JSON_LINES = "jsonl"
    """An object a line."""
    CSV = "csv"
    """A header row, and cells between commas; empty lines are no rows."""
    TSV = "tsv"
    """As CSV, with cells between tabs."""
    PARQUET = "parquet"
    """A file, not a pipe; needs pyarrow."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an input; all but the text may be left out.

    Attributes:
        text: the text, or the first of a pair.
        text_pair: the second of a pair; None: there is none.
        labels: the true label names, one for single-label; None: not known.
        fields: any other fields, to be passed through.
        line: line number, counted from 1; in Parquet the number of the row.
        where: file and line, for messages.
    """

    text: str
    text_pair: str | None = None
    labels: tuple[str, ...] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    line: int = 0
    where: str = field(default="", compare=False)

    @property
    def place(self) -> str:
        """What to call the row in messages: file and line, or the line alone."""
        return self.where or f"line {self.line}"

    @property
    def content(self) -> str | tuple[str, str]:
        """What the engine takes: a text or a pair."""
        return self.text if self.text_pair is None else (self.text, self.text_pair)


@dataclass(frozen=True)
class ReadOptions:
    """How an input is read: its format, and which of its columns are text and labels.

    Attributes:
        input_format: the format, or its name; None: the suffix of the file name decides, and
            standard input is JSON lines if its first line starts with `{`, else plain text.
        text_column: name of the column or field of the text.
        text_pair_column: that of the second text; None: `text_pair`, if there is one.
        label_column: that of the true label or labels; None: `labels` or `label`, if there is one.
        label_separator: splits a string into labels; None: `|` splits the cells of a column
            named `labels` in a table, and nothing else is split.
        literal_quotes: whether `"` is an ordinary character in CSV and TSV; by default it
            quotes cells.

    Raises:
        InputError: `input_format` is not the name of a format.

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
    label_separator: str | None = None
    literal_quotes: bool = False

    def __post_init__(self) -> None:
        if self.input_format is None:
            return
        try:
            object.__setattr__(self, "input_format", TextFormat(self.input_format))
        except ValueError as error:
            raise InputError(
                f"there is no text format {self.input_format!r}",
                Remedy(
                    "set {input_format} to one of {formats}",
                    formats=", ".join(known.value for known in TextFormat),
                ),
            ) from error

    @property
    def pair_name(self) -> str:
        """The name of the column of the second text."""
        return self.text_pair_column or _TEXT_PAIR

    @property
    def label_names(self) -> tuple[str, ...]:
        """The columns that may hold labels; the first one that has a value counts."""
        return _LABELS if self.label_column is None else (self.label_column,)

    def separator_of(self, name: str) -> str | None:
        """What separates the labels in a cell of a table, by the name of the cell's column."""
        return self.label_separator or (LABEL_SEPARATOR if name == "labels" else None)

    def check(self, names: Sequence[str], where: str) -> None:
        """Check that a table has the columns.

        Args:
            names: the columns that it has.
            where: the file, for messages.

        Raises:
            InputError: the text column, or one that was asked for by name, is not there, or
                any column is there twice.
        """
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise InputError(
                f'{where} names the column "{twice}" twice', "give every column its own name"
            )
        for option in ("text_column", "text_pair_column", "label_column"):
            name = getattr(self, option)
            if name is not None and name not in names:
                raise InputError(
                    f'{where} has no column "{name}"; it has: {", ".join(names)}',
                    Remedy("set {" + option + "} to one of these, or rename it in the file"),
                )

    def row(self, content: Mapping[str, Any], where: str, number: int, table: bool = False) -> Row:
        """A row of named values.

        Args:
            content: values by name.
            where: file and line, for messages.
            number: the line.
            table: whether a string in a column `labels` is split.

        Raises:
            RowError: the text is no string, the pair or labels are not what they should be, or
                another field is nested too deeply to be written again.
        """
        text = content.get(self.text_column)
        if not isinstance(text, str):
            raise RowError(
                f'{where} has no string field "{self.text_column}"',
                Remedy(
                    "give every row one, or set {text_column} to the name of the field that holds "
                    "the text"
                ),
            )
        pair = content.get(self.pair_name)
        if pair is not None and not isinstance(pair, str):
            raise RowError(
                f'{where}: "{self.pair_name}" is a {type(pair).__name__}',
                "expected a string, or no such field",
            )
        used = (self.text_column, self.pair_name, *self.label_names)
        fields = {name: value for name, value in content.items() if name not in used}
        if _is_deep(fields):
            raise RowError(
                f"{where} has a field that is nested deeper than {_MOST_NESTED} lists or objects",
                "leave that field out",
            )
        return Row(text, pair, self._labels(content, where, table), fields, number, where)

    def _labels(
        self, content: Mapping[str, Any], where: str, table: bool
    ) -> tuple[str, ...] | None:
        for name in self.label_names:
            value = content.get(name)
            if value is None:
                continue
            separator = self.separator_of(name) if table else self.label_separator
            if separator and isinstance(value, str):
                return tuple(part.strip() for part in value.split(separator) if part.strip())
            is_list = isinstance(value, list)
            if name == "labels" and not is_list:
                raise RowError(f'{where}: "labels" is not a list of names', 'such as ["a", "b"]')
            if isinstance(value, dict) or (is_list and name == "label"):
                raise RowError(f'{where}: "{name}" is not a name', 'such as "positive"')
            if is_list and any(part is None or isinstance(part, (dict, list)) for part in value):
                raise RowError(f'{where}: "{name}" is not a list of names', 'such as ["a", "b"]')
            return tuple(str(part) for part in (value if is_list else [value]))
        return None


def class_name(value: Any, names: Sequence[str]) -> Any:
    """The name of a numbered class, or of each in a list, as the `datasets` library has them.

    Args:
        value: what stands in a label column.
        names: of the classes.

    Returns:
        The name; None for -1, which data sets write where the class is not known; other values
        as they are.
    """
    if isinstance(value, list):
        return [class_name(part, names) for part in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if 0 <= value < len(names):
        return names[value]
    return None if value == -1 else value


def _is_deep(value: object) -> bool:
    """Whether a value is nested too deeply; without recursion, which could itself be too deep."""
    level = [value]
    for _ in range(_MOST_NESTED + 2):  # the first is the value itself
        inner = [part for part in level if isinstance(part, (dict, list)) and part]
        if not inner:
            return False
        level = [x for part in inner for x in (part.values() if isinstance(part, dict) else part)]
    return True


def parsed(lines: Iterator[T], parse: Callable[[T], Row | None]) -> Iterator[Row | RowError]:
    """What is made of each line; the error in place of a row that cannot be read."""
    while True:
        try:
            row = parse(next(lines))
        except StopIteration:
            return
        except RowError as error:
            yield error
            continue
        if row is not None:
            yield row
