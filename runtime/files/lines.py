"""Lines of a text file, and the formats with one row per line: plain text and JSON lines."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import IO

import msgspec

from ..errors import InputError, RowError
from .rows import ReadOptions, Row, all_rows

MAX_LINE_BYTES = 16 * 2**20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How to rewrite rows that are one array, or spread over several lines.
_ONE_PER_LINE = {
    "[": "write one object per line: jq -c '.[]' IN > OUT",
    "{": "write one object per line: jq -c . IN > OUT",
}
_NOT_FINITE = re.compile(r"[:,\[]\s*-?(NaN|Infinity)\b")


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
        """The first line, stripped; empty if it is not UTF-8."""
        try:
            return self._first.decode().strip()
        except UnicodeDecodeError:
            return ""

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
    return all_rows(lambda: Row(next(lines).rstrip("\r\n"), line=lines.number, where=lines.where))


def json_rows(lines: Lines, options: ReadOptions) -> Iterator[Row | RowError]:
    """One row for each line, which is a JSON object."""

    def read() -> Row:
        line = next(lines)
        where = lines.where
        if not line.strip():
            raise RowError(f"{where} is empty", "remove the line, or write a JSON object in it")
        try:
            content = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            what, remedy = _why_not_json(line)
            raise RowError(
                f"{where} is not JSON: {what or error or 'it is nested too deeply'}", remedy
            ) from error
        if isinstance(content, list):
            raise RowError(f"{where} is an array, not an object", _ONE_PER_LINE["["])
        return options.row(content if isinstance(content, dict) else {}, where, lines.number)

    return all_rows(read)


def _why_not_json(line: str) -> tuple[str, str]:
    """A common mistake in a line, or nothing if it is not one of these; and a remedy."""
    opened = _ONE_PER_LINE.get(line.strip())
    if opened:
        return "an object or array over several lines", opened
    if _NOT_FINITE.search(line):
        return "JSON does not allow NaN or Infinity", "write null instead"
    return "", 'write an object such as {"text": "..."}'
