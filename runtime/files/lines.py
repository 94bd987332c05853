"""Text files: plain text and JSON lines with a row per line, and tables with a header row."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Callable, Iterator
from typing import IO

import msgspec

from ..errors import InputError, RowError
from .rows import ReadOptions, Row

MAX_LINE_BYTES = 16 * 2**20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Lines:
    """The decoded lines of a stream, with their line endings.

    `RowError` is raised for a line that cannot be read, and the next call continues after it.

    Args:
        stream: the bytes.
        name: how messages refer to the stream.

    Attributes:
        name: as given.
        number: the number of the latest line, counted from 1.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.name = name
        self.number = 0
        self._stream = stream
        self._is_within = False
        self._first = self._bytes().removeprefix(_BYTE_ORDER_MARK)

    @property
    def where(self) -> str:
        """File and line of the latest line."""
        return f"{self.name}, line {self.number}"

    @property
    def first(self) -> str:
        """The first line, stripped; characters that are not UTF-8 are replaced."""
        return self._first.decode(errors="replace").strip()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while self._is_within:  # the rest of a line that was too long
            self._is_within = not _is_end(self._bytes())
        raw = self._bytes() if self.number else self._first
        if not raw:
            raise StopIteration
        self.number += 1
        if len(raw) > MAX_LINE_BYTES:
            self._is_within = not _is_end(raw)
            raise RowError(
                f"{self.where} is longer than {MAX_LINE_BYTES // 2**20} MiB",
                "split it: each line is one text, of which only the first tokens are used",
            )
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise RowError(
                f"{self.where} is not UTF-8: byte 0x{raw[error.start]:02x} "
                f"at column {error.start + 1}",
                "convert the text to UTF-8; names of compressed files must end in .gz",
            ) from error

    def _bytes(self) -> bytes:
        try:
            return self._stream.readline(MAX_LINE_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{self.name} cannot be read after line {self.number}: {error}",
                "copy the file again",
            ) from error


def _is_end(raw: bytes) -> bool:
    return not raw or raw.endswith(b"\n")


def text_rows(lines: Lines) -> Iterator[Row | RowError]:
    """One row for each line."""
    return _all_rows(lambda: Row(next(lines).rstrip("\r\n"), where=lines.where))


def json_rows(lines: Lines, options: ReadOptions) -> Iterator[Row | RowError]:
    """One row for each line, which is a JSON object."""

    def read() -> Row:
        line = next(lines)
        try:
            content = msgspec.json.decode(line, type=dict)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise RowError(
                f"{lines.where} is not a JSON object: {str(error) or 'it is nested too deeply'}",
                'write one object such as {"text": "..."} per line; jq -c . IN > OUT does this for '
                "objects over several lines, and jq -c '.[]' IN > OUT for an array",
            ) from error
        return options.row(content, lines.where)

    return _all_rows(read)


def table_rows(lines: Lines, options: ReadOptions, separator: str) -> Iterator[Row | RowError]:
    """One row for each record after the header; empty lines are ignored.

    Raises:
        InputError: the header cannot be read, or lacks a column.
    """
    # This also limits the memory that a quote which is never closed can take. The limit is
    # global: one that was set higher elsewhere remains.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    reader = csv.reader(lines, delimiter=separator, strict=True)
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
        return options.row(content, where, table=True)

    yield from _all_rows(read)


def _record(reader: Iterator[list[str]], lines: Lines) -> tuple[list[str], int]:
    """The next record, and its first line.

    Raises:
        RowError: the record is bad; the next call continues after it.
        StopIteration: there are no more records.
    """
    line = lines.number + 1
    try:
        return next(reader), line
    except csv.Error as error:
        span = f" (up to line {lines.number})" if lines.number > line else ""
        raise RowError(
            f"{lines.name}, line {line}{span} is not a row of a table: {error}",
            'close the quote, and double each quote within a cell (""); end lines with a line '
            r"feed: tr '\r' '\n' < IN > OUT",
        ) from error


def _all_rows(read: Callable[[], Row | None]) -> Iterator[Row | RowError]:
    """All rows that a function reads, and an error in place of each row that it cannot read.

    Args:
        read: reads the next row, or returns None for a line that is not a row; raises `RowError`
            if it cannot, and `StopIteration` at the end.
    """
    while True:
        try:
            row = read()
        except StopIteration:
            return
        except RowError as error:
            yield error
        else:
            if row is not None:
                yield row
