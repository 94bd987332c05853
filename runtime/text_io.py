"""Read texts and labels: one line at a time, so that memory stays flat.

`.txt`: a line is a text, and an empty line an empty text, so that results line up with
the file. `.jsonl`: a line is an object with `text`, optionally `text_pair`, `label` or
`labels`, and any other field. Both also with `.gz`. UTF-8, with or without a byte order
mark. `-` is standard input, as text or JSON lines.
"""

from __future__ import annotations

import gzip
import itertools
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import IO, Any

import msgspec

from .errors import InputError

MAX_LINE_BYTES = 16 * 2**20

_RESERVED = ("text", "text_pair", "label", "labels")


class TextFormat(str, Enum):
    """How lines are read."""

    TEXT = "txt"
    JSON_LINES = "jsonl"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of an input file.

    Attributes:
        text: the text, or the first of a pair.
        text_pair: the second of a pair.
        labels: the true label names, if the file has them.
        fields: any other fields, to be passed through.
        line: line number, counted from 1.
    """

    text: str
    text_pair: str | None = None
    labels: tuple[str, ...] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    line: int = 0

    @property
    def content(self) -> str | tuple[str, str]:
        """What the engine takes: a text or a pair."""
        return self.text if self.text_pair is None else (self.text, self.text_pair)


def read_rows(source: str | Path, text_format: TextFormat | None = None) -> Iterator[Row]:
    """Rows of a file, or of standard input for `-`.

    Args:
        source: path or `-`.
        text_format: how to read lines; by default what the file's name says, and for
            standard input JSON lines if the first line starts with `{`.

    Raises:
        InputError: no such file, a line that cannot be read (named by its number), or no
            line at all.
    """
    name = "standard input" if str(source) == "-" else str(source)
    with _open(source) as stream:
        lines = _lines(stream, name)
        first = next(lines, None)
        if first is None:
            raise InputError(f"{name} has no rows", "give a file with at least one line")
        chosen = text_format or _format_of(source, first[1])
        for number, line in itertools.chain([first], lines):
            if chosen is TextFormat.TEXT:
                yield Row(line, line=number)
            else:
                yield _parse(line, number, name)


def _open(source: str | Path) -> IO[bytes]:
    if str(source) == "-":
        return sys.stdin.buffer
    path = Path(source)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"input file {path} {what}", "give a .txt or .jsonl file, or - for stdin")
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        return path.open("rb")
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", "check the file's permissions"
        ) from error


def _format_of(source: str | Path, first_line: str) -> TextFormat:
    if str(source) == "-":
        is_json = first_line.lstrip().startswith("{")
        return TextFormat.JSON_LINES if is_json else TextFormat.TEXT
    suffixes = [s for s in Path(source).suffixes if s != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in (".jsonl", ".ndjson", ".json"):
        return TextFormat.JSON_LINES
    if suffix in (".txt", ""):
        return TextFormat.TEXT
    raise InputError(
        f"{source}: cannot tell the format from {suffix!r}",
        "rename the file to .txt (a line a text) or .jsonl (a JSON object a line)",
    )


def _lines(stream: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    for number in itertools.count(1):
        try:
            raw = stream.readline(MAX_LINE_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(
                f"{name}, line {number}: cannot be read: {error}", "copy the file again"
            ) from error
        if not raw:
            return
        if len(raw) > MAX_LINE_BYTES:
            raise InputError(
                f"{name}, line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB",
                "split it: a line is one text, and only its first tokens are used",
            )
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}, line {number} is not UTF-8: byte 0x{raw[error.start]:02x} "
                f"at column {error.start + 1}",
                "convert the file: iconv -f ISO-8859-1 -t UTF-8 IN > OUT",
            ) from error
        yield number, text.rstrip("\r\n")


def _parse(line: str, number: int, name: str) -> Row:
    where = f"{name}, line {number}"
    if not line.strip():
        raise InputError(f"{where} is empty", 'a line is a JSON object with a "text" field')
    try:
        content = msgspec.json.decode(line.encode())
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(
            f"{where} is not JSON: {error or 'nested too deeply'}",
            'expected an object such as {"text": "..."}',
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("text"), str):
        raise InputError(
            f'{where} has no string field "text"', 'expected an object such as {"text": "..."}'
        )
    pair = content.get("text_pair")
    if pair is not None and not isinstance(pair, str):
        raise InputError(
            f'{where}: "text_pair" is a {type(pair).__name__}',
            "expected a string, or no such field",
        )
    fields = {key: value for key, value in content.items() if key not in _RESERVED}
    return Row(content["text"], pair, _labels(content, where), fields, number)


def _labels(content: dict[str, Any], where: str) -> tuple[str, ...] | None:
    if content.get("labels") is not None:
        labels = content["labels"]
        if not isinstance(labels, list) or any(isinstance(x, (dict, list)) for x in labels):
            raise InputError(f'{where}: "labels" is not a list of names', 'such as ["a", "b"]')
        return tuple(str(label) for label in labels)
    if content.get("label") is not None:
        if isinstance(content["label"], (dict, list)):
            raise InputError(f'{where}: "label" is not a name', 'such as "positive"')
        return (str(content["label"]),)
    return None
