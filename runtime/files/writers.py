"""Convert finished rows from JSON lines to CSV or Parquet.

A table needs its columns before its first row, and Parquet cannot be appended to. So there are two
passes: find the columns, then write the rows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from ..encoding import blocks
from .formats import TextFormat
from .records import Record, RecordSchema, cell, to_json

_GROUP_ROWS = 16_384
_GROUP_BYTES = 32 * 2**20
# Beyond this, a float cannot represent all integers.
_MAX_EXACT = 2**53


def convert(partial: Path, target: Path, chosen: TextFormat, schema: RecordSchema) -> None:
    """Convert a file of JSON lines to another format, in flat memory.

    Args:
        partial: the JSON lines.
        target: the file to write.
        chosen: CSV or Parquet.
        schema: what the records contain.
    """
    write = _write_parquet if chosen is TextFormat.PARQUET else _write_csv
    write(partial, target, schema)


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
        "all_scores": pyarrow.float64(),
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


def _write_csv(partial: Path, target: Path, schema: RecordSchema) -> None:
    columns = schema.columns(_kinds(partial, schema))
    with target.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        for record in records_of(partial):
            writer.writerow({name: cell(value) for name, value in schema.flat(record).items()})


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
