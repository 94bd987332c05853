"""CSV and TSV inputs: a header row, then one row per record; quoted cells may span lines."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from ..errors import Remedy, RowError
from . import lines as lines_module
from .lines import Lines
from .rows import ReadOptions, Row, all_rows


def table_rows(lines: Lines, options: ReadOptions, separator: str) -> Iterator[Row | RowError]:
    """One row for each record after the header; empty lines are ignored.

    Raises:
        InputError: the header cannot be read, or lacks a column.
    """
    # This also limits the memory that a quote which is never closed can take. The limit is
    # global: one that was set higher elsewhere remains.
    csv.field_size_limit(max(csv.field_size_limit(), lines_module.MAX_LINE_BYTES))
    reader = csv.reader(
        lines,
        delimiter=separator,
        quoting=csv.QUOTE_NONE if options.literal_quotes else csv.QUOTE_MINIMAL,
        strict=True,
    )
    header: list[str] = []
    while not header:
        try:
            header, line = _record(reader, lines)
        except StopIteration:
            return
    options.check(header, f"{lines.name}, line {line}")
    # A table has no other way to say that a row has no pair or no label.
    blank_is_none = {options.pair_column, *options.label_columns} - {"labels"}

    def read() -> Row | None:
        cells, line = _record(reader, lines)
        where = f"{lines.name}, line {line}"
        if not cells:
            return None
        if len(cells) != len(header):
            raise RowError(
                f"{where} has {len(cells)} cells, but the header has {len(header)}",
                "quote cells that contain the separator, and write all columns in every row",
            )
        content: dict[str, str | None] = dict(zip(header, cells, strict=True))
        for name in blank_is_none:
            content[name] = content.get(name) or None
        return options.row(content, where, line, table=True)

    yield from all_rows(read)


def _record(reader: Iterator[list[str]], lines: Lines) -> tuple[list[str], int]:
    """The next record, and its first line.

    Raises:
        RowError: the record is bad; the next call continues after it.
        StopIteration: there are no more records.
    """
    line = lines.number + 1
    where = f"{lines.name}, line {line}"
    try:
        return next(reader), line
    except csv.Error as error:
        if "new-line" in str(error):
            raise RowError(
                f"{where} is not a row of a table: a carriage return is not a line ending",
                r"convert the file: tr '\r' '\n' < IN > OUT",
            ) from error
        span = f" (up to line {lines.number})" if lines.number > line else ""
        raise RowError(
            f"{where}{span} is not a row of a table: {error}",
            Remedy(
                'close the quote, and double each quote within a cell (""); or set '
                '{literal_quotes} if " is an ordinary character in this file'
            ),
        ) from error
