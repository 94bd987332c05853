"""CSV and TSV inputs: a header row, then one row per record; quoted cells may span lines."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from ..errors import InputError, Remedy, RowError
from . import lines as lines_module
from .lines import Lines
from .rows import ReadOptions, Row, all_rows

# Other separators, with which a header may be written by mistake.
_SEPARATORS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}


class _Records:
    """The records of a table. `RowError` is raised for a bad one; the next call continues after it.

    Attributes:
        line: the first line of the latest record.
    """

    def __init__(self, lines: Lines, separator: str, literal_quotes: bool) -> None:
        self.line = 1
        self._lines = lines
        # This also limits the memory that a quote which is never closed can take. The limit is
        # global: one that was set higher elsewhere remains.
        csv.field_size_limit(max(csv.field_size_limit(), lines_module.MAX_LINE_BYTES))
        self._reader = csv.reader(
            lines,
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
        try:
            return next(self._reader)
        except csv.Error as error:
            if "new-line" in str(error):
                raise RowError(
                    f"{self.where} is not a row of a table: a carriage return is not a line ending",
                    r"convert the file: tr '\r' '\n' < IN > OUT",
                ) from error
            last = self._lines.number
            span = f" (up to line {last})" if last > self.line else ""
            raise RowError(
                f"{self.where}{span} is not a row of a table: {error}",
                Remedy(
                    'close the quote, and double each quote within a cell (""); or set '
                    '{literal_quotes} if " is an ordinary character in this file'
                ),
            ) from error


def table_rows(lines: Lines, options: ReadOptions, separator: str) -> Iterator[Row | RowError]:
    """One row for each record after the header; empty lines are ignored.

    Raises:
        InputError: the header cannot be read, or lacks a column.
    """
    _check_separator(lines, options, separator)
    records = _Records(lines, separator, options.literal_quotes)
    header = next(filter(None, records), None)
    if header is None:
        return
    options.check(header, records.where)
    # A table has no other way to say that a row has no pair or no label.
    blank_is_none = [
        options.pair_column,
        *(name for name in options.label_columns if not options.separator_of(name)),
    ]

    def read() -> Row | None:
        cells = next(records)
        if not cells:
            return None
        if len(cells) != len(header):
            raise RowError(
                f"{records.where} has {len(cells)} cells, but the header has {len(header)}",
                "quote cells that contain the separator, and write all columns in every row",
            )
        content: dict[str, str | None] = dict(zip(header, cells, strict=True))
        for name in blank_is_none:
            content[name] = content.get(name) or None
        return options.row(content, records.where, records.line, table=True)

    yield from all_rows(read)


def _check_separator(lines: Lines, options: ReadOptions, separator: str) -> None:
    """Refuse a header with another separator: quotes in the rows after it would be misread."""
    header = lines.first
    if separator in header or header.strip('"') == options.text_column:
        return
    for other, name in _SEPARATORS.items():
        if other in header:
            raise InputError(
                f"{lines.name}, line 1 is a header separated by {name}: {header}",
                Remedy("save the table with commas (.csv) or tabs (.tsv), or set {input_format}"),
            )
