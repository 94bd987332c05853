"""Inputs: files and standard input, read one after another."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, cast

from ..artifact.folder import sha256_of
from ..errors import InputError, RowError
from .formats import TextFormat, input_format, is_compressed
from .lines import Lines, json_rows, table_rows, text_rows
from .parquet import parquet_rows
from .rows import ReadOptions, Row

STANDARD_INPUT = "-"
"""Stands for standard input among the sources."""


def read_rows(source: str | Path, options: ReadOptions | None = None) -> Iterator[Row]:
    """The rows of a file, or of standard input.

    Args:
        source: a path, or `-` for standard input.
        options: its format, and which columns are text and labels; None: `ReadOptions()`.

    Yields:
        One row at a time, so that memory stays flat.

    Raises:
        InputError: the file does not exist, cannot be read, or has no rows.
        RowError: a row cannot be read; the message names its line.
        MissingExtraError: the file is Parquet, and pyarrow is not installed.

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
    """The rows of several inputs, in order; a row that cannot be read is replaced by its error.

    Args:
        sources: paths, or `-` for standard input.
        options: how all of them are read; None: `ReadOptions()`.

    Raises:
        InputError: a file does not exist, or its format is unknown or cannot be read there, or
            columns are named and all inputs are plain text.
        MissingExtraError: a file is Parquet, and pyarrow is not installed.
    """

    def __init__(self, sources: Sequence[str | Path], options: ReadOptions | None = None) -> None:
        self._sources = [str(source) for source in sources]
        self._options = options or ReadOptions()
        if self._sources.count(STANDARD_INPUT) > 1:
            raise InputError("standard input is given twice", "give - once")
        paths = [None if source == STANDARD_INPUT else Path(source) for source in self._sources]
        self._formats = [input_format(path, self._options.input_format) for path in paths]
        if self._options.names_columns and set(self._formats) == {TextFormat.TEXT}:
            raise _no_columns(f"{_name(self._sources[0])} is plain text")

    def __iter__(self) -> Generator[Row | RowError]:
        any_row = False
        for source, chosen in zip(self._sources, self._formats, strict=True):
            for row in self._rows(source, chosen):
                any_row = True
                yield row
        if not any_row:
            others = len(self._sources) - 1
            more = f", nor do the {others} others" if others else ""
            raise InputError(
                f"{_name(self._sources[0])} has no rows{more}", "give a file with at least one row"
            )

    def identity(self, resume: bool) -> dict[str, Any]:
        """The identity of the inputs: their names and hashes; a pipe has no hash.

        Args:
            resume: whether an earlier run has read them, so that none may be a pipe.

        Raises:
            InputError: one of them can be read only once.
            OSError: one of them cannot be read.
        """
        inputs: dict[str, Any] = {"inputs": self._sources}
        for source in self._sources:
            is_file = source != STANDARD_INPUT and Path(source).is_file()
            if resume and not is_file:
                raise InputError(
                    f"{source} can be read only once, so a run on it cannot be resumed",
                    "save it to a file, and classify that file",
                )
            inputs[f"the SHA-256 of {source}"] = sha256_of(Path(source)) if is_file else None
        return inputs

    def _rows(self, source: str, chosen: TextFormat | None) -> Iterator[Row | RowError]:
        if chosen is TextFormat.PARQUET:
            yield from parquet_rows(Path(source), self._options)
            return
        with ExitStack() as stack:
            lines = Lines(self._open(source, stack), _name(source))
            if chosen is None:
                chosen = self._guess(lines)
            if chosen is TextFormat.TEXT:
                yield from text_rows(lines)
            elif chosen is TextFormat.JSON_LINES:
                yield from json_rows(lines, self._options)
            else:
                separator = "\t" if chosen is TextFormat.TSV else ","
                yield from table_rows(lines, self._options, separator)

    def _guess(self, lines: Lines) -> TextFormat:
        # An array is not JSON lines, but it is not a text either.
        if lines.first.startswith(("{", "[{")) or lines.first == "[":
            return TextFormat.JSON_LINES
        if self._options.names_columns:
            raise _no_columns(f"{lines.name} looks like plain text")
        return TextFormat.TEXT

    def _open(self, source: str, stack: ExitStack) -> IO[bytes]:
        if source == STANDARD_INPUT:
            if sys.stdin is None:  # closed before Python began
                raise InputError("standard input is closed", "open it, or give a file")
            return sys.stdin.buffer
        path = Path(source)
        try:
            raw = stack.enter_context(path.open("rb"))
        except OSError as error:
            raise InputError(
                f"cannot read {path}: {error.strerror}", "check the file's permissions"
            ) from error
        if is_compressed(path):
            return cast("IO[bytes]", stack.enter_context(gzip.GzipFile(fileobj=raw)))
        return raw


def _no_columns(problem: str) -> InputError:
    return InputError(
        f"{problem}, which has no columns",
        "save it under a name that ends in .jsonl, .csv or .tsv, or set `input_format`",
    )


def _name(source: str) -> str:
    return "standard input" if source == STANDARD_INPUT else source
