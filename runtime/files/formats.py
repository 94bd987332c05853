"""The formats of input and output files, and the file names that stand for them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from ..errors import InputError
from ..machine import require


class TextFormat(str, Enum):
    """A format of inputs; all but Parquet are UTF-8, and may be gzip-compressed."""

    TEXT = "txt"
    """One text per line; an empty line is an empty text."""
    JSON_LINES = "jsonl"
    """One JSON object per line."""
    CSV = "csv"
    """A header row, and cells separated by commas; empty lines are ignored."""
    TSV = "tsv"
    """Like CSV, with cells separated by tabs."""
    PARQUET = "parquet"
    """A file, not a pipe; needs pyarrow."""


_SUFFIXES = {f".{each.value}": each for each in TextFormat}
_SUFFIXES |= {".ndjson": TextFormat.JSON_LINES, ".json": TextFormat.JSON_LINES}
_SUFFIXES[".pq"] = TextFormat.PARQUET
_INPUT_SUFFIXES = {"": TextFormat.TEXT, **_SUFFIXES}
_WRITTEN = (TextFormat.JSON_LINES, TextFormat.CSV, TextFormat.PARQUET)
_OUTPUT_SUFFIXES = {"": TextFormat.JSON_LINES} | {
    suffix: each for suffix, each in _SUFFIXES.items() if each in _WRITTEN
}


def input_format(path: Path | None, wanted: TextFormat | None) -> TextFormat | None:
    """The format of an input.

    Args:
        path: the file; None for standard input.
        wanted: the format that was asked for, or its name; None: the suffix of the file name
            decides, where `.gz` at its end is ignored.

    Returns:
        The format; None if the first line of standard input decides.

    Raises:
        InputError: the file does not exist, its suffix is unknown, or it is Parquet and not a plain
            file.
        MissingExtraError: the format is Parquet, and pyarrow is not installed.
    """
    if path is not None and (path.is_dir() or not path.exists()):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(
            f"input file {path} {what}",
            "give a .txt, .jsonl, .csv, .tsv or .parquet file, or - for standard input",
        )
    names = [each.value for each in TextFormat]
    if wanted is not None and wanted not in names:
        raise InputError(f"`input_format` is {wanted!r}", f"choose from {', '.join(names)}")
    chosen = None if wanted is None else TextFormat(wanted)
    if wanted is None and path is not None:
        suffixes = [part.lower() for part in path.suffixes]
        suffix = next((part for part in reversed(suffixes) if part != ".gz"), "")
        chosen = _named(path, suffix, _INPUT_SUFFIXES, ", or set `input_format`")
    if chosen is TextFormat.PARQUET:
        if path is None or is_compressed(path) or not is_plain_file(path):
            raise InputError(
                f"{path or 'standard input'} cannot be Parquet, which needs a plain file",
                "use a file whose name ends in .parquet: Parquet is compressed already",
            )
        require("parquet")
    return chosen


def output_format(path: Path | None) -> TextFormat:
    """The format of an output: JSON lines, CSV or Parquet, by the suffix of the file name.

    Args:
        path: the file; None for standard output, which takes JSON lines.

    Raises:
        InputError: the suffix is unknown, or the output is a table and not a plain file.
        MissingExtraError: the format is Parquet, and pyarrow is not installed.
    """
    if path is None:
        return TextFormat.JSON_LINES
    chosen = _named(path, path.suffix.lower(), _OUTPUT_SUFFIXES, "")
    if chosen is not TextFormat.JSON_LINES and not is_plain_file(path):
        raise InputError(
            f"{path} cannot be {chosen.value}, which needs a plain file",
            "write JSON lines into pipes and devices",
        )
    if chosen is TextFormat.PARQUET:
        require("parquet")
    return chosen


def is_compressed(path: Path) -> bool:
    """Whether the name of an input says that it is compressed."""
    return path.suffix.lower() == ".gz"


def is_plain_file(path: Path | None) -> bool:
    """Whether an input or output is or will be a plain file; None is a standard stream."""
    return path is not None and (path.is_file() or not path.exists())


def _named(path: Path, suffix: str, known: Mapping[str, TextFormat], more: str) -> TextFormat:
    if suffix not in known:
        raise InputError(
            f"{path}: cannot tell the format from {suffix!r}",
            f"rename the file to {', '.join(filter(None, known))}{more}",
        )
    return known[suffix]
