"""Text files: plain text and JSON lines with a row per line, and tables with a header row."""

from __future__ import annotations

import csv
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO

import msgspec

from ..errors import InputError, RowError
from .rows import ReadOptions, Row

MAX_LINE_BYTES = 16 * 2**20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_QUOTE = b'"'
# A character beyond U+FFFF that lacks its first or second half; two backslashes begin no escape.
_HALF_PAIR = re.compile(
    r"(?<!\\)(?:\\\\)*(\\ud[89ab][0-9a-f]{2}(?!\\ud[c-f])"
    r"|(?<!\\ud[89ab][0-9a-f]{2})\\ud[c-f][0-9a-f]{2})",
    re.IGNORECASE,
)


class Lines:
    """The decoded lines of a stream, with their line endings.

    `RowError` is raised for a line that cannot be read, and the next call continues after it.

    Args:
        stream: the bytes.
        name: how messages refer to the stream.

    Attributes:
        name: as given.
        number: the number of the latest line, counted from 1.
        quotes: how many quotes the latest line has, if it could not be read.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.name = name
        self.number = 0
        self.quotes = 0
        self._stream = stream
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
        raw = self._bytes() if self.number else self._first
        if not raw:
            raise StopIteration
        self.number += 1
        self.quotes = raw.count(_QUOTE)
        if len(raw) > MAX_LINE_BYTES:
            while not _is_end(raw):
                raw = self._bytes()
                self.quotes += raw.count(_QUOTE)
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
            problem = str(error) or "it is nested too deeply"
            if half := _HALF_PAIR.search(line):  # the library may say that the line is too short
                raise RowError(
                    f"{lines.where} has {half[1]} at column {half.start(1) + 1}, which is one half "
                    "of a surrogate pair and no character",
                    r"write the whole character, or \ufffd in its place",
                ) from error
            raise RowError(
                f"{lines.where} is not a JSON object: {problem}",
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
    records = _Records(lines, separator)
    header: list[str] = []
    while not header:
        try:
            header, line = next(records)
        except StopIteration:
            return
    options.check(header, f"{lines.name}, line {line}")
    # A table has no other way to say that a row has no pair or no label.
    blank_is_none = {options.pair_column, *options.label_columns} - {"", "labels"}

    def read() -> Row | None:
        cells, line = next(records)
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


class _Records:
    """The records of a table, each with the number of its first line.

    `RowError` is raised for a record that is bad or has a line that cannot be read, and the next
    call continues after it.

    Args:
        lines: the lines of the table.
        separator: between cells.
    """

    def __init__(self, lines: Lines, separator: str) -> None:
        self._lines = lines
        self._reader = csv.reader(self._all_lines(), delimiter=separator, strict=True)
        self._unread: list[RowError] = []

    def __iter__(self) -> Iterator[tuple[list[str], int]]:
        return self

    def __next__(self) -> tuple[list[str], int]:
        lines = self._lines
        self._unread.clear()
        line = lines.number + 1
        cells: list[str] = []
        try:
            cells = next(self._reader)
        except csv.Error as error:
            if not self._unread:
                span = f" (up to line {lines.number})" if lines.number > line else ""
                raise RowError(
                    f"{lines.name}, line {line}{span} is not a row of a table: {error}",
                    'close the quote, and double each quote within a cell (""); end lines with a '
                    r"line feed: tr '\r' '\n' < IN > OUT",
                ) from error
        if self._unread:
            raise self._unread[0]
        return cells, line

    def _all_lines(self) -> Iterator[str]:
        """All lines; those that cannot be read have only the quotes that open or close a cell."""
        while True:
            try:
                yield next(self._lines)
            except StopIteration:
                return
            except RowError as error:
                self._unread.append(error)
                yield '"' * (self._lines.quotes % 2) + "\n"


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
