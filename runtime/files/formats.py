"""The formats of input and output files, and the file names that stand for them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path


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
    ".txt": TextFormat.TEXT,
    ".jsonl": TextFormat.JSON_LINES,
    ".ndjson": TextFormat.JSON_LINES,
    ".json": TextFormat.JSON_LINES,
    ".csv": TextFormat.CSV,
    ".tsv": TextFormat.TSV,
    ".parquet": TextFormat.PARQUET,
    ".pq": TextFormat.PARQUET,
}


def format_by_suffix(suffix: str) -> TextFormat | None:
    """The format that a suffix such as `.csv` stands for; None if it stands for none."""
    return _SUFFIXES.get(suffix)


def suffix_of(path: Path) -> str:
    """The last suffix of a file name, `.gz` left aside; empty if there is none."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    return suffixes[-1] if suffixes else ""
