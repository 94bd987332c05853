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
INPUT_SUFFIXES = {"": TextFormat.TEXT, ".txt": TextFormat.TEXT, **_SUFFIXES}
"""The format of an input by the suffix of its name."""
OUTPUT_SUFFIXES = {"": TextFormat.JSON_LINES, **_SUFFIXES}
"""The format of an output by the suffix of its name."""


def format_by_name(path: Path, suffixes: Mapping[str, TextFormat], option: str) -> TextFormat:
    """The format that a file name stands for; `.gz` at its end is ignored.

    Args:
        path: the file.
        suffixes: the known ones.
        option: the parameter that sets the format, for the remedy.

    Raises:
        InputError: the suffix is unknown.
    """
    suffix = next((part for part in reversed(path.suffixes) if part != ".gz"), "")
    if suffix not in suffixes:
        raise InputError(
            f"{path}: cannot tell the format from {suffix!r}",
            Remedy(
                "rename the file to {known}, or set {" + option + "}",
                known=", ".join(filter(None, suffixes)),
            ),
        )
    return suffixes[suffix]


def check_parquet(place: Path | str, is_file: bool) -> None:
    """Check that Parquet can be read from a place, or written to it.

    Args:
        place: the file, or how messages refer to a stream.
        is_file: whether it is a plain file, or will be one.

    Raises:
        InputError: it is not a plain file, or its name says that it is compressed.
        MissingExtraError: pyarrow is not installed.
    """
    if not is_file or Path(place).suffix == ".gz":
        raise InputError(
            f"{place} cannot be Parquet, which needs a plain file",
            "use a file whose name ends in .parquet: Parquet is compressed already",
        )
    require("parquet")
