"""Formats of the output: JSON lines, CSV, TSV and Parquet, the first of them row by row.

A table needs its columns before its first row, and Parquet cannot be appended to, so a file
is written as JSON lines first and made into a table at the end, in two passes: which columns
there are, then the rows. A table on standard output has the columns of its first row.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import IO, Any

import msgspec

from ..errors import InputError
from .parquet import load_pyarrow
from .records import Record, RecordSchema, to_json

_GROUP_ROWS = 16_384
_GROUP_BYTES = 32 * 2**20
_MAX_HELD = 4096


class OutputFormat(str, Enum):
    """How results are written."""

    JSON_LINES = "jsonl"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"


_SUFFIXES = {
    "": OutputFormat.JSON_LINES,
    ".jsonl": OutputFormat.JSON_LINES,
    ".ndjson": OutputFormat.JSON_LINES,
    ".json": OutputFormat.JSON_LINES,
    ".csv": OutputFormat.CSV,
    ".tsv": OutputFormat.TSV,
    ".parquet": OutputFormat.PARQUET,
    ".pq": OutputFormat.PARQUET,
}
_DELIMITERS = {OutputFormat.CSV: ",", OutputFormat.TSV: "\t"}


def output_format(output: Path | None, said: OutputFormat | None) -> OutputFormat:
    """The format of an output; None is standard output.

    Raises:
        InputError: the file's name does not tell, or the format does not go there.
        MissingExtraError: it is Parquet, and pyarrow is not installed.
    """
    compressed = output is not None and output.suffix == ".gz"
    suffixes = [] if output is None else [s for s in output.suffixes if s != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if said is None and suffix not in _SUFFIXES:
        raise InputError(
            f"{output}: cannot tell the format from {suffix!r}",
            "name the file .jsonl, .csv, .tsv or .parquet, or give --output-format",
        )
    chosen = said or _SUFFIXES[suffix]
    if chosen is OutputFormat.PARQUET:
        if compressed or output is None:
            what = "standard output" if output is None else f"{output}"
            raise InputError(
                f"{what} cannot be Parquet, which is compressed inside and needs a file",
                "give --output with a name that ends in .parquet",
            )
        load_pyarrow()
    return chosen


class StreamWriter:
    """Writes records to a stream as they come.

    Args:
        stream: where to.
        chosen: JSON lines, CSV or TSV.
        schema: what records hold.
    """

    def __init__(self, stream: IO[str], chosen: OutputFormat, schema: RecordSchema) -> None:
        self._stream = stream
        self._schema = schema
        self._delimiter = _DELIMITERS.get(chosen)
        self._line: Callable[[Record], str] | None = None
        self._fields: set[str] = set()
        self._held: list[Record] = []

    def write(self, record: Record) -> None:
        """Write a record.

        Raises:
            InputError: the record has a field that the first one had not, in a table.
        """
        if self._delimiter is None:
            self._stream.write(to_json(record) + "\n")
            return
        if self._line is None:
            # An error says nothing of the columns: the first row does.
            if "error" in record and len(self._held) < _MAX_HELD:
                self._held.append(record)
                return
            self._begin(record)
        new = [name for name in self._schema.fields(record) if name not in self._fields]
        if new:
            raise InputError(
                f'row {record["index"]} has a field "{new[0]}", which the first row has not: the '
                "columns of a table on standard output are those of its first row",
                "give --output FILE, or write JSON lines",
            )
        self._put(record)

    def finish(self) -> None:
        """Write what was held back."""
        if self._line is None and self._held:
            self._begin(self._held[0])

    def _begin(self, record: Record) -> None:
        assert self._delimiter is not None
        fields = self._schema.fields(record)
        self._fields = set(fields)
        columns = self._schema.columns(fields)
        self._line = _table_line(columns, self._delimiter, self._schema)
        self._stream.write(_csv_line(columns, self._delimiter))
        for held in self._held:
            self._put(held)
        self._held = []

    def _put(self, record: Record) -> None:
        assert self._line is not None
        self._stream.write(self._line(record))


def convert(
    partial: Path, target: Path, chosen: OutputFormat, schema: RecordSchema, name: Path
) -> None:
    """Write the records of a file of JSON lines in another format, in flat memory.

    Args:
        partial: the JSON lines.
        target: the file to write.
        chosen: its format.
        schema: what the records hold.
        name: what the file will be called: `.gz` compresses it.
    """
    fields: dict[str, _Kind] = {}
    for record in records_of(partial):
        for field in schema.fields(record):
            kind = fields.setdefault(field, _Kind())
            kind.see(record[field])
    if chosen is OutputFormat.PARQUET:
        _write_parquet(partial, target, schema, fields)
        return
    with _text_file(target, compressed=name.suffix == ".gz") as stream:
        if chosen is OutputFormat.JSON_LINES:
            for record in records_of(partial):
                stream.write(to_json(record) + "\n")
            return
        columns = schema.columns(fields)
        line = _table_line(columns, _DELIMITERS[chosen], schema)
        stream.write(_csv_line(columns, _DELIMITERS[chosen]))
        for record in records_of(partial):
            stream.write(line(record))


def records_of(partial: Path) -> Iterator[Record]:
    """Records of a file of JSON lines that this module's callers wrote."""
    with partial.open("rb") as stream:
        for line in stream:
            yield msgspec.json.decode(line)


@contextmanager
def _text_file(target: Path, compressed: bool) -> Iterator[IO[str]]:
    with target.open("wb") as raw:
        if not compressed:
            with io.TextIOWrapper(raw, "utf-8", newline="", write_through=False) as stream:
                yield stream
            return
        # No time and no name inside: the same rows are the same bytes.
        with (
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
            io.TextIOWrapper(packed, "utf-8", newline="") as stream,
        ):
            yield stream


def _table_line(
    columns: tuple[str, ...], delimiter: str, schema: RecordSchema
) -> Callable[[Record], str]:
    def line(record: Record) -> str:
        flat = schema.flat(record)
        return _csv_line([schema.cell(flat.get(name)) for name in columns], delimiter)

    return line


def _csv_line(cells: Any, delimiter: str) -> str:
    buffer = io.StringIO()
    # Only with this line end does every Python quote a cell with a carriage return in it.
    csv.writer(buffer, delimiter=delimiter, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue()[:-2] + "\n"


class _Kind:
    """The narrowest type that holds every value of a field."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def see(self, value: Any) -> None:
        """Take a value into account."""
        if isinstance(value, bool):
            self._seen.add("bool")
        elif isinstance(value, int):
            is_exact = abs(value) <= 2**53
            fits = -(2**63) <= value < 2**63
            self._seen.add("int" if is_exact else "long" if fits else "other")
        elif value is not None:
            self._seen.add({float: "float", str: "str"}.get(type(value), "other"))

    def type(self, pyarrow: Any) -> Any:
        """The type of the column: text where nothing narrower holds all values."""
        if self._seen and self._seen <= {"bool"}:
            return pyarrow.bool_()
        if self._seen and self._seen <= {"int", "long"}:
            return pyarrow.int64()
        if self._seen and self._seen <= {"int", "float"}:
            return pyarrow.float64()
        return pyarrow.string()


def _write_parquet(
    partial: Path, target: Path, schema: RecordSchema, fields: dict[str, _Kind]
) -> None:
    pyarrow, parquet = load_pyarrow()
    types = {
        "index": pyarrow.int64(),
        "exit": pyarrow.int32(),
        "layer": pyarrow.int32(),
        "truncated": pyarrow.bool_(),
        "score": pyarrow.float64(),
        "scores": pyarrow.list_(pyarrow.float64()),
        "labels": pyarrow.list_(pyarrow.string()),
    }
    types |= {f"all_scores.{label}": pyarrow.float64() for label in schema.labels}
    types |= {name: kind.type(pyarrow) for name, kind in fields.items()}
    table = pyarrow.schema(
        [(name, types.get(name, pyarrow.string())) for name in schema.columns(fields)]
    )
    with parquet.ParquetWriter(target, table) as writer:
        for group in _groups(partial):
            flat = [schema.flat(record) for record in group]
            arrays = [
                pyarrow.array(
                    [_typed(record.get(f.name), f.type, pyarrow) for record in flat], f.type
                )
                for f in table
            ]
            writer.write_batch(pyarrow.record_batch(arrays, schema=table))


def _typed(value: Any, kind: Any, pyarrow: Any) -> Any:
    if kind == pyarrow.string() and value is not None and not isinstance(value, str):
        return to_json(value)
    return value


def _groups(partial: Path) -> Iterator[list[Record]]:
    group: list[Record] = []
    size = 0
    with partial.open("rb") as stream:
        for line in stream:
            group.append(msgspec.json.decode(line))
            size += len(line)
            if len(group) == _GROUP_ROWS or size >= _GROUP_BYTES:
                yield group
                group, size = [], 0
    if group:
        yield group
