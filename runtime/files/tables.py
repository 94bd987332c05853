"""CSV and TSV: a header row, then a row a record; cells may be quoted and span lines."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from ..errors import InputError, RowError
from . import lines as lines_module
from .lines import Lines
from .rows import ReadOptions, Row, parsed

COMMA, TAB = ",", "\t"

# What else may separate the names of a header, and what to do about it.
_SEPARATORS = {
    ";": ("semicolons", "save the file with commas (.csv) or tabs (.tsv)"),
    TAB: ("tabs", "name the file .tsv, or give --input-format tsv"),
    COMMA: ("commas", "name the file .csv, or give --input-format csv"),
    "|": ("bars", "save the file with commas (.csv) or tabs (.tsv)"),
}


class _Records:
    """Records of a table. One that cannot be read raises, and the next call goes on."""

    def __init__(self, lines: Lines, separator: str, literal_quotes: bool) -> None:
        self.line = 1
        self._lines = lines
        self._characters = 0
        limit = lines_module.MAX_LINE_BYTES
        # The limit of the csv module is its own and small; ours, below, is for the record.
        csv.field_size_limit(max(csv.field_size_limit(), limit))
        self._reader = csv.reader(
            self._measured(),
            delimiter=separator,
            quoting=csv.QUOTE_NONE if literal_quotes else csv.QUOTE_MINIMAL,
            strict=True,
        )

    @property
    def where(self) -> str:
        """File and first line of the latest record."""
        return f"{self._lines.name}, line {self.line}"

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        self.line = self._lines.number + 1
        self._characters = 0
        try:
            return next(self._reader)
        except csv.Error as error:
            if "new-line" in str(error):
                raise RowError(
                    f"{self.where} is not a row of a table: a carriage return is no line end",
                    r"convert the file: tr '\r' '\n' < IN > OUT",
                ) from error
            last = self._lines.number
            upto = f" (up to line {last})" if last > self.line else ""
            raise RowError(
                f"{self.where}{upto} is not a row of a table: {error}",
                'write a quote in a quoted cell twice (""), or give --no-quotes if " is a '
                "character like any other in this file",
            ) from error

    def _measured(self) -> Iterator[str]:
        return _Measured(self, self._lines)

    def took(self, characters: int) -> None:
        """Count what a record has taken; a quote that is never closed takes all that follows."""
        self._characters += characters
        if self._characters > lines_module.MAX_LINE_BYTES:
            raise RowError(
                f"{self.where} begins a row of more than {lines_module.MAX_LINE_BYTES} characters",
                "close the quote that is open there, or give --no-quotes",
            )


class _Measured:
    """The lines, counted: not a generator, which an exception would end."""

    def __init__(self, records: _Records, lines: Lines) -> None:
        self._records = records
        self._lines = lines

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._records.took(len(line))
        return line


def table_rows(lines: Lines, options: ReadOptions, separator: str) -> Iterator[Row | RowError]:
    """A row for each record after the header; empty lines are none.

    Raises:
        InputError: the header cannot be read, or lacks a column.
    """
    _check_separator(lines, options, separator)
    records = _Records(lines, separator, options.literal_quotes)
    header: list[str] = []
    for header in records:
        if header:
            break
    if not header:
        return
    options.check(header, records.where)
    # There is no other way to say "none" in a table.
    blank_is_none = [
        options.pair_name,
        *(name for name in options.label_names if not options.separator_of(name)),
    ]

    def parse(cells: list[str]) -> Row | None:
        if not cells:
            return None
        if len(cells) != len(header):
            raise RowError(
                f"{records.where} has {len(cells)} columns, the header has {len(header)}",
                "quote cells that hold the separator, and write every column in every row",
            )
        content: dict[str, str | None] = dict(zip(header, cells, strict=True))
        for name in blank_is_none:
            content[name] = content.get(name) or None
        return options.row(content, records.where, records.line, table=True)

    yield from parsed(records, parse)


def _check_separator(lines: Lines, options: ReadOptions, separator: str) -> None:
    """Refuse a header whose names something else separates; quotes after it are misread."""
    header = lines.peek().strip()
    if separator in header or header.strip('"') == options.text_column:
        return
    for other, (name, hint) in _SEPARATORS.items():
        if other in header:
            raise InputError(
                f"{lines.name}, line 1 is a header separated by {name}: {header}", hint
            )
