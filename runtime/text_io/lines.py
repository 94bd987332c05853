"""Lines of text, and the formats in which a line is a row: plain text and JSON lines."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import IO

import msgspec

from ..errors import InputError, RowError
from .rows import Columns, Row, parsed

MAX_LINE_BYTES = 16 * 2**20


class Lines:
    """Decoded lines of a stream, with their line ends.

    A line that cannot be read raises `RowError`, and the next call goes on after it.

    Args:
        stream: the bytes.
        name: what to call it in messages.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.name = name
        self.number = 0
        self._stream = stream
        self._held: str | RowError | None = None

    @property
    def where(self) -> str:
        """File and line of the latest line."""
        return f"{self.name}, line {self.number}"

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        held, self._held = self._held, None
        if held is None:
            return self._read()
        if isinstance(held, RowError):
            raise held
        return held

    def peek(self) -> str:
        """The next line, which stays the next one; empty at the end and for a bad line."""
        try:
            self._held = self._read()
        except StopIteration:
            return ""
        except RowError as error:
            self._held = error
            return ""
        return self._held

    def _read(self) -> str:
        self.number += 1
        raw = self._bytes()
        if not raw:
            raise StopIteration
        if len(raw) > MAX_LINE_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = self._bytes()
            raise RowError(
                f"{self.where} is longer than {MAX_LINE_BYTES // 2**20} MiB",
                "split it: a line is one text, and only its first tokens are used",
            )
        try:
            return raw.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise RowError(
                f"{self.where} is not UTF-8: byte 0x{raw[error.start]:02x} "
                f"at column {error.start + 1}",
                "convert the file: iconv -f ISO-8859-1 -t UTF-8 IN > OUT",
            ) from error

    def _bytes(self) -> bytes:
        try:
            return self._stream.readline(MAX_LINE_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{self.where}: cannot be read: {error}", "copy the file again"
            ) from error


def text_rows(lines: Lines) -> Iterator[Row | RowError]:
    """A row for each line."""
    return parsed(
        lines, lambda line: Row(line.rstrip("\r\n"), line=lines.number, where=lines.where)
    )


def json_rows(lines: Lines, columns: Columns) -> Iterator[Row | RowError]:
    """A row for each line, which is a JSON object."""

    def parse(line: str) -> Row:
        where = lines.where
        if not line.strip():
            raise RowError(f"{where} is empty", 'a line is a JSON object with a "text" field')
        try:
            content = msgspec.json.decode(line.encode())
        except (msgspec.DecodeError, RecursionError) as error:
            raise RowError(
                f"{where} is not JSON: {error or 'nested too deeply'}",
                'expected an object such as {"text": "..."}',
            ) from error
        return columns.row(content if isinstance(content, dict) else {}, where, lines.number)

    return parsed(lines, parse)
