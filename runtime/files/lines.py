"""Lines of text, and the formats in which a line is a row: plain text and JSON lines."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import IO

import msgspec

from ..errors import InputError, RowError
from .rows import ReadOptions, Row, parsed

MAX_LINE_BYTES = 16 * 2**20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How to write rows that stand in one array, or over several lines, as lines.
_ONE_A_LINE = {
    "[": "write an object a line: jq -c '.[]' IN > OUT",
    "{": "write an object a line: jq -c . IN > OUT",
}
_NOT_FINITE = re.compile(r"[:,\[]\s*-?(NaN|Infinity)\b")
_SURROGATE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    r"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
# A line of Latin letters in UTF-16 without a byte order mark, which would pass for UTF-8.
_UTF_16 = re.compile(rb"(?P<BE>(\0[^\0]){2,})|(?P<LE>([^\0]\0){2,}\n?)")
# What files begin with that are no UTF-8: what it says, and what to do.
_SIGNATURES = {
    b"\xff\xfe": ("UTF-16", "convert the file: iconv -f UTF-16 -t UTF-8 IN > OUT"),
    b"\xfe\xff": ("UTF-16", "convert the file: iconv -f UTF-16 -t UTF-8 IN > OUT"),
    b"\x1f\x8b": ("gzip", "unpack it, or give it a name that ends in .gz"),
    b"PK\x03\x04": ("a zip archive, such as .xlsx", "save the table in it as .csv"),
    b"PAR1": ("Parquet", "give it a name that ends in .parquet"),
    b"(\xb5\x2f\xfd": ("zstd", "unpack it: zstd -d FILE"),
    b"BZh": ("bzip2", "unpack it: bunzip2 FILE"),
    b"\xfd7zXZ": ("xz", "unpack it: unxz FILE"),
}


class Lines:
    """Decoded lines of a stream, with their line ends.

    A line that cannot be read raises `RowError`, and the next call goes on after it; where the
    whole file is of another kind, it is an `InputError`.

    Args:
        stream: the bytes.
        name: what to call it in messages.
    """

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.name = name
        self.number = 0
        self._stream = stream
        self._held: str | RowError | None = None
        self._is_within = False
        self._beginning = b""

    @property
    def where(self) -> str:
        """File and line of the latest line."""
        return f"{self.name}, line {self.number}"

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number += 1
        held, self._held = self._held, None
        if held is None:
            return self._read()
        if isinstance(held, RowError):
            raise held
        return held

    def peek(self) -> str:
        """The next line, which stays the next one; empty at the end and for a bad line."""
        self.number += 1
        try:
            self._held = self._read()
        except StopIteration:
            return ""
        except RowError as error:
            self._held = error
            return ""
        finally:
            self.number -= 1
        return self._held

    def _read(self) -> str:
        while self._is_within:  # a line that was too long
            self._is_within = not self._ends(self._bytes())
        raw = self._bytes()
        if self.number == 1:
            raw = raw.removeprefix(_BYTE_ORDER_MARK)
            self._beginning = raw[:6]
            if order := _UTF_16.fullmatch(raw):
                raise InputError(
                    f"{self.where} is UTF-16 without a byte order mark",
                    f"convert the file: iconv -f UTF-16{order.lastgroup} -t UTF-8 IN > OUT",
                )
        if not raw:
            raise StopIteration
        if len(raw) > MAX_LINE_BYTES:
            self._is_within = not self._ends(raw)
            raise RowError(
                f"{self.where} is longer than {MAX_LINE_BYTES // 2**20} MiB",
                "split it: a line is one text, and only its first tokens are used",
            )
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            said = (
                f"{self.where} is not UTF-8: byte 0x{raw[error.start]:02x} "
                f"at column {error.start + 1}"
            )
            for begin, (what, hint) in _SIGNATURES.items():
                if self._beginning.startswith(begin):  # other lines are no texts either
                    raise InputError(f"{said}; the file is {what}", hint) from error
            raise RowError(
                said, "convert the file: iconv -f ISO-8859-1 -t UTF-8 IN > OUT"
            ) from error

    @staticmethod
    def _ends(raw: bytes) -> bool:
        return not raw or raw.endswith(b"\n")

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


def json_rows(lines: Lines, options: ReadOptions) -> Iterator[Row | RowError]:
    """A row for each line, which is a JSON object."""

    def parse(line: str) -> Row:
        where = lines.where
        if not line.strip():
            raise RowError(f"{where} is empty", 'a line is a JSON object with a "text" field')
        try:
            content = msgspec.json.decode(line.encode())
        except (msgspec.DecodeError, RecursionError) as error:
            what, hint = _why_not_json(line)
            raise RowError(
                f"{where} is not JSON: {what or error or 'nested too deeply'}", hint
            ) from error
        if isinstance(content, list):
            raise RowError(f"{where} is an array, not an object", _ONE_A_LINE["["])
        return options.row(content if isinstance(content, dict) else {}, where, lines.number)

    return parsed(lines, parse)


def _why_not_json(line: str) -> tuple[str, str]:
    """What is wrong with a line in ways that other programs write it, and how to mend it."""
    opened = _ONE_A_LINE.get(line.strip())
    if opened:
        return "an object or array over several lines", opened
    if _SURROGATE.search(line):
        return (
            "it holds half of a surrogate pair, which is no character",
            r"cut texts between characters, or replace such a half by \ufffd",
        )
    if _NOT_FINITE.search(line):
        return "NaN and Infinity are no numbers there", "write null in their place"
    return "", 'expected an object such as {"text": "..."}'
