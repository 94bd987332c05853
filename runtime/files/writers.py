"""Write records as JSON lines, CSV, TSV or Parquet.

A table needs its columns before its first row, and Parquet cannot be appended to. So a file is
written as JSON lines first and converted at the end, in two passes: find the columns, then write
the rows. A table on standard output has the columns of its first row.
"""

from __future__ import annotations

import csv
import gzip
import io
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

import msgspec

from ..blocks import blocks
from ..errors import InputError, Remedy
from .formats import DELIMITERS, TextFormat
from .records import Record, RecordSchema, to_json

_GROUP_ROWS = 16_384
_GROUP_BYTES = 32 * 2**20
_MAX_HELD = 4096
# Beyond this, a float cannot represent all integers.
_MAX_EXACT = 2**53


class StreamWriter:
    """Writes records to a stream as they come.

    Args:
        stream: the stream.
        chosen: JSON lines, CSV or TSV.
        schema: what the records contain.
    """

    def __init__(self, stream: IO[str], chosen: TextFormat, schema: RecordSchema) -> None:
        self._stream = stream
        self._schema = schema
        self._delimiter = DELIMITERS.get(chosen)
        self._table: _Table | None = None
        # Errors at the beginning, which do not show what the columns are.
        self._held: list[Record] = []

    def write(self, record: Record) -> None:
        """Write a record.

        Raises:
            InputError: the output is a table, and the record has a field that is not among its
                columns.
        """
        if self._delimiter is None:
            self._stream.write(to_json(record) + "\n")
        elif self._table is not None:
            self._table.write(record)
        elif "error" in record and len(self._held) < _MAX_HELD:
            self._held.append(record)
        else:
            self._begin(self._delimiter, record)
            self.write(record)

    def finish(self) -> None:
        """Write the records that were held back."""
        if self._held and self._delimiter is not None:
            self._begin(self._delimiter, self._held[0])

    def _begin(self, delimiter: str, first: Record) -> None:
        self._table = _Table(self._stream, delimiter, self._schema, self._schema.fields(first))
        for held in self._held:
            self._table.write(held)
        self._held = []


class _Table:
    """A table of text with a header."""

    def __init__(
        self, stream: IO[str], delimiter: str, schema: RecordSchema, fields: Iterable[str]
    ) -> None:
        self._schema = schema
        self._fields = set(fields)
        self._columns = schema.columns(fields)
        # Older versions of Python quote a carriage return in a cell with this line ending only.
        self._write = csv.writer(
            _LineFeeds(stream), delimiter=delimiter, lineterminator="\r\n"
        ).writerow
        self._write(self._columns)

    def write(self, record: Record) -> None:
        new = [name for name in self._schema.fields(record) if name not in self._fields]
        if new:
            raise InputError(
                f'row {record["index"]} has a field "{new[0]}", which the first row does not have: '
                "a table on standard output has the columns of its first row",
                Remedy("set {output} to a file, or write JSON lines"),
            )
        flat = self._schema.flat(record)
        self._write([self._schema.cell(flat.get(name)) for name in self._columns])


class _LineFeeds:
    """A stream for `csv.writer`, with a line feed as the end of each row."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, line: str) -> None:
        self._stream.write(line[:-2] + "\n")


def convert(
    partial: Path, target: Path, chosen: TextFormat, schema: RecordSchema, name: Path
) -> None:
    """Convert a file of JSON lines to another format, in flat memory.

    Args:
        partial: the JSON lines.
        target: the file to write.
        chosen: its format.
        schema: what the records contain.
        name: the final name of the file: it is compressed if that ends in `.gz`.
    """
    if chosen is TextFormat.PARQUET:
        _write_parquet(partial, target, schema)
        return
    with target.open("wb") as raw:
        # The gzip header gets no time and no name, so that the same rows give the same bytes.
        packed: AbstractContextManager[Any] = nullcontext(raw)
        if name.suffix == ".gz":
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
        with packed as stream:
            if chosen is TextFormat.JSON_LINES:
                with partial.open("rb") as lines:
                    shutil.copyfileobj(lines, stream)
                return
            with io.TextIOWrapper(stream, "utf-8", newline="") as text:
                table = _Table(text, DELIMITERS[chosen], schema, _kinds(partial, schema))
                for record in records_of(partial):
                    table.write(record)


def records_of(partial: Path) -> Iterator[Record]:
    """The records of a file of JSON lines."""
    with partial.open("rb") as stream:
        for line in stream:
            yield msgspec.json.decode(line)


def arrow_type(name: str) -> Any:
    """The type of pyarrow of a column of results, such as `score`."""
    import pyarrow

    types = {
        "index": pyarrow.int64(),
        "exit": pyarrow.int32(),
        "layer": pyarrow.int32(),
        "truncated": pyarrow.bool_(),
        "score": pyarrow.float64(),
        "scores": pyarrow.list_(pyarrow.float64()),
        "labels": pyarrow.list_(pyarrow.string()),
        "top_scores": pyarrow.list_(pyarrow.float64()),
        "top_labels": pyarrow.list_(pyarrow.string()),
        "all_scores": pyarrow.float64(),
        "logits": pyarrow.float64(),
    }
    return types.get(name.partition(".")[0], pyarrow.string())


def _kinds(partial: Path, schema: RecordSchema) -> dict[str, set[str]]:
    """The fields of the input, and the kinds of values that each of them has."""
    kinds: dict[str, set[str]] = {}
    for record in records_of(partial):
        for field in schema.fields(record):
            held = kinds.setdefault(field, set())
            if record[field] is not None:
                held.add(_kind(record[field]))
    return kinds


def _kind(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) <= _MAX_EXACT:
            return "int"
        return "long" if -(2**63) <= value < 2**63 else "other"
    return type(value).__name__


def _write_parquet(partial: Path, target: Path, schema: RecordSchema) -> None:
    import pyarrow
    from pyarrow import parquet

    def narrowest(kinds: set[str]) -> Any:
        """The narrowest type that represents all values exactly; everything fits in a string."""
        if kinds == {"bool"}:
            return pyarrow.bool_()
        if kinds and kinds <= {"int", "long"}:
            return pyarrow.int64()
        return pyarrow.float64() if kinds and kinds <= {"int", "float"} else pyarrow.string()

    kinds = _kinds(partial, schema)
    types = {name: narrowest(held) for name, held in kinds.items()}
    columns = [(name, types.get(name, arrow_type(name))) for name in schema.columns(kinds)]
    texts = [name for name, kind in columns if kind == pyarrow.string()]
    table = pyarrow.schema(columns)
    with partial.open("rb") as stream, parquet.ParquetWriter(target, table) as writer:
        for group in blocks(stream, len, _GROUP_BYTES, _GROUP_ROWS):
            rows = [schema.flat(msgspec.json.decode(line)) for line in group]
            for row in rows:
                for name in texts:
                    value = row.get(name)
                    if value is not None and not isinstance(value, str):
                        row[name] = to_json(value)
            writer.write_table(pyarrow.Table.from_pylist(rows, table))
