"""Inputs: files and standard input, one after another, in the format that their names say."""

from __future__ import annotations

import gzip
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, cast

from ..errors import InputError, RowError
from .lines import Lines, json_rows, text_rows
from .parquet import check_pyarrow
from .parquet_process import isolated_parquet_rows
from .rows import ReadOptions, Row, TextFormat
from .tables import COMMA, TAB, table_rows

STANDARD_INPUT = "-"
"""As a source: standard input."""

_SUFFIXES = {
    "": TextFormat.TEXT,
    ".txt": TextFormat.TEXT,
    ".jsonl": TextFormat.JSON_LINES,
    ".ndjson": TextFormat.JSON_LINES,
    ".json": TextFormat.JSON_LINES,
    ".csv": TextFormat.CSV,
    ".tsv": TextFormat.TSV,
    ".parquet": TextFormat.PARQUET,
    ".pq": TextFormat.PARQUET,
}


def read_rows(source: str | Path, options: ReadOptions | None = None) -> Iterator[Row]:
    """Rows of a file, or of standard input for `-`.

    Args:
        source: path or `-`.
        options: its format, and which columns are text and labels; None: `ReadOptions()`.

    Yields:
        One row at a time, so that memory stays flat.

    Raises:
        InputError: no such file, or no row at all.
        RowError: a row that cannot be read, named by its line.
        MissingExtraError: it is Parquet, and pyarrow is not installed.

    Example:
        ```python
        from fpabee.runtime import Engine, read_rows

        with Engine.load("engines/") as engine:
            rows = list(read_rows("dev.jsonl"))
            predictions = engine.predict([row.content for row in rows])
            right = sum(p.labels == row.labels for p, row in zip(predictions, rows))
        ```
    """
    for row in Inputs([source], options):
        if isinstance(row, RowError):
            raise row
        yield row


class Inputs:
    """Rows of several inputs, in order; in place of a row that cannot be read, its error.

    Args:
        sources: paths, or `-` for standard input.
        options: how all of them are read; None: `ReadOptions()`.

    Raises:
        InputError: no such file, or a format that cannot be told or read.
        MissingExtraError: one is Parquet, and pyarrow is not installed.
    """

    def __init__(
        self,
        sources: Sequence[str | Path],
        options: ReadOptions | None = None,
    ) -> None:
        self._sources = [str(source) for source in sources]
        self._options = options or ReadOptions()
        if self._sources.count(STANDARD_INPUT) > 1:
            raise InputError("standard input is given twice", "give - once")
        given = self._options.input_format
        self._formats = [_format_of(source, given) for source in self._sources]
        self._sizes = [_size(source) for source in self._sources]
        self._at = 0  # the source that is being read
        self._raw: IO[bytes] | None = None
        self._share = 0.0

    def __iter__(self) -> Iterator[Row | RowError]:
        any_row = False
        for number, source in enumerate(self._sources):
            self._at = number
            for row in self._rows(source, self._formats[number]):
                any_row = True
                yield row
        if not any_row:
            first = _name(self._sources[0])
            more = f" (nor have the {len(self._sources) - 1} others)" if self._at else ""
            raise InputError(f"{first} has no rows{more}", "give a file with at least one line")

    @property
    def share(self) -> float | None:
        """The share of the bytes that has been read; None where the total is not known."""
        total = sum(size for size in self._sizes if size is not None)
        if None in self._sizes or not total:
            return None
        before = sum(size or 0 for size in self._sizes[: self._at])
        here = self._sizes[self._at] or 0
        read = self._share * here if self._raw is None else min(self._raw.tell(), here)
        return (before + read) / total

    def identity(self) -> list[dict[str, Any]]:
        """What tells that an input is still the same: its name, size and hash.

        A pipe has neither size nor hash, for it can be read only once.
        """
        found = []
        for source, size in zip(self._sources, self._sizes, strict=True):
            digest = None if size is None else _digest(source)
            found.append({"name": source, "size": size, "sha256": digest})
        return found

    def _rows(self, source: str, text_format: TextFormat | None) -> Iterator[Row | RowError]:
        if text_format is TextFormat.PARQUET:
            self._share = 0.0
            yield from isolated_parquet_rows(Path(source), self._options, self._note)
            return
        with ExitStack() as stack:
            lines = Lines(self._open(source, stack), _name(source))
            if text_format is None:
                first = lines.peek().strip()
                # Rows in an array are not read, but are no texts either.
                is_json = first.startswith(("{", "[{")) or first == "["
                text_format = TextFormat.JSON_LINES if is_json else TextFormat.TEXT
                if not is_json and self._options != ReadOptions():
                    raise InputError(
                        f"{lines.name} looks like plain text, which has no columns",
                        "say what it is with --input-format, such as csv",
                    )
            if text_format is TextFormat.TEXT:
                yield from text_rows(lines)
            elif text_format is TextFormat.JSON_LINES:
                yield from json_rows(lines, self._options)
            else:
                separator = COMMA if text_format is TextFormat.CSV else TAB
                yield from table_rows(lines, self._options, separator)

    def _note(self, share: float) -> None:
        self._share = share

    def _open(self, source: str, stack: ExitStack) -> IO[bytes]:
        if source == STANDARD_INPUT:
            if sys.stdin is None:  # closed before Python began
                raise InputError("standard input is closed", "give it texts, or give a file")
            return sys.stdin.buffer
        path = Path(source)
        try:
            raw = stack.enter_context(path.open("rb"))
        except OSError as error:
            raise _cannot_read(path, error) from error
        if self._sizes[self._at] is not None:
            self._raw = raw
            stack.callback(self._close)
        if path.suffix == ".gz":
            unpacked: Any = gzip.GzipFile(fileobj=raw)
            return cast("IO[bytes]", stack.enter_context(unpacked))
        return raw

    def _close(self) -> None:
        self._raw, self._share = None, 1.0


def _name(source: str) -> str:
    return "standard input" if source == STANDARD_INPUT else source


def _cannot_read(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot read {path}: {error.strerror}", "check the file's permissions")


def _size(source: str) -> int | None:
    path = Path(source)
    if source == STANDARD_INPUT or not path.is_file():
        return None
    return path.stat().st_size


def _digest(source: str) -> str:
    digest = hashlib.sha256()
    try:
        with Path(source).open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    except OSError as error:
        raise _cannot_read(Path(source), error) from error
    return digest.hexdigest()


def _format_of(source: str, said: TextFormat | None) -> TextFormat | None:
    """The format of an input that is there; None: its first line will tell."""
    path = Path(source)
    is_stdin = source == STANDARD_INPUT
    if not is_stdin and (path.is_dir() or not path.exists()):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(
            f"input file {path} {what}",
            "give a .txt, .jsonl, .csv, .tsv or .parquet file, or - for stdin",
        )
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if said is None and not is_stdin and suffix not in _SUFFIXES:
        raise InputError(
            f"{source}: cannot tell the format from {suffix!r}",
            "rename the file to .txt (a line a text), .jsonl (a JSON object a line), .csv, .tsv "
            "or .parquet, or give --input-format",
        )
    chosen = said or (None if is_stdin else _SUFFIXES[suffix])
    if chosen is TextFormat.PARQUET:
        if is_stdin or path.suffix == ".gz" or not path.is_file():
            raise InputError(
                f"{_name(source)} cannot be read as Parquet, which needs a plain file",
                "save it as a .parquet file, which is compressed inside",
            )
        check_pyarrow()
    return chosen
