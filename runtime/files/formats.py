"""The formats of input and output files, and the file names that stand for them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from ..errors import InputError, Remedy
from ..optional_packages import require


class TextFormat(str, Enum):
    """A format of inputs and outputs; all but Parquet are UTF-8, and may be gzip-compressed."""

    TEXT = "txt"
    """One text per line, for inputs only; an empty line is an empty text."""
    JSON_LINES = "jsonl"
    """One JSON object per line."""
    CSV = "csv"
    """A header row, and cells separated by commas; empty lines are ignored."""
    TSV = "tsv"
    """Like CSV, with cells separated by tabs."""
    PARQUET = "parquet"
    """A file, not a pipe; needs pyarrow."""


OUTPUT_FORMATS = tuple(known for known in TextFormat if known is not TextFormat.TEXT)
"""The formats that results can be written in."""

DELIMITERS = {TextFormat.CSV: ",", TextFormat.TSV: "\t"}
"""What separates the cells of a table."""

_SUFFIXES = {
    ".jsonl": TextFormat.JSON_LINES,
    ".ndjson": TextFormat.JSON_LINES,
    ".json": TextFormat.JSON_LINES,
    ".csv": TextFormat.CSV,
    ".tsv": TextFormat.TSV,
    ".parquet": TextFormat.PARQUET,
    ".pq": TextFormat.PARQUET,
}
_INPUT_SUFFIXES = {"": TextFormat.TEXT, ".txt": TextFormat.TEXT, **_SUFFIXES}
_OUTPUT_SUFFIXES = {"": TextFormat.JSON_LINES, **_SUFFIXES}


def input_format(path: Path | None, given: TextFormat | None) -> TextFormat | None:
    """The format of an input.

    Args:
        path: the file, which exists; None for standard input.
        given: the format that was asked for; None: the suffix of the file name decides, where
            `.gz` at its end is ignored.

    Returns:
        The format; None if the first line of standard input decides.

    Raises:
        InputError: the suffix is unknown, or the input is Parquet and not a plain file.
        MissingExtraError: the format is Parquet, and pyarrow is not installed.
    """
    return _chosen(path, given, _INPUT_SUFFIXES, "input")


def output_format(path: Path | None, given: TextFormat | None) -> TextFormat:
    """The format of an output, as `input_format`; that of standard output is JSON lines."""
    return _chosen(path, given, _OUTPUT_SUFFIXES, "output") or TextFormat.JSON_LINES


def is_plain_file(path: Path | None) -> bool:
    """Whether an input or output is or will be a plain file; None is a standard stream."""
    return path is not None and (path.is_file() or not path.exists())


def _chosen(
    path: Path | None, given: TextFormat | None, suffixes: Mapping[str, TextFormat], what: str
) -> TextFormat | None:
    chosen = given
    if given is None and path is not None:
        suffix = next((part for part in reversed(path.suffixes) if part != ".gz"), "")
        chosen = suffixes.get(suffix)
        if chosen is None:
            raise InputError(
                f"{path}: cannot tell the format from {suffix!r}",
                Remedy(
                    "rename the file to {known}, or set {" + what + "_format}",
                    known=", ".join(filter(None, suffixes)),
                ),
            )
    if chosen is TextFormat.PARQUET:
        if path is None or path.suffix == ".gz" or not is_plain_file(path):
            raise InputError(
                f"{path or f'standard {what}'} cannot be Parquet, which needs a plain file",
                "use a file whose name ends in .parquet: Parquet is compressed already",
            )
        require("parquet")
    return chosen
