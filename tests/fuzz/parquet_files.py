"""Parquet files with columns of any type, good and bad."""

from __future__ import annotations

import io
from decimal import Decimal
from random import Random
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from .mutations import mutate_bytes

_NAMES = ("text_pair", "label", "label", "labels", "labels", *"abcdef", "")
_TEXTS = ("", "rain", "é", "a|b", "0", "x" * 100)
_FAR = (0, 1, -1, 2**62, -(2**62), 253402300800 * 10**6)
# Type, values, and the type that the values are stored as where Python has no name for them.
_COLUMNS: tuple[tuple[Any, ...], ...] = (
    (pa.string(), _TEXTS),
    (pa.large_string(), _TEXTS),
    (pa.string(), (b"\xff\xfe", b"a"), pa.binary()),
    (pa.int64(), (0, 1, -1, 2**62)),
    (pa.float64(), (0.5, float("nan"), float("inf"), 1e308)),
    (pa.bool_(), (True, False)),
    (pa.null(), ()),
    (pa.binary(), (b"", b"\xff\0")),
    (pa.decimal128(38, 10), (Decimal("1.5"), Decimal("1e20"))),
    (pa.date32(), (2**31 - 1, -(2**31)), pa.int32()),
    (pa.timestamp("us"), _FAR, pa.int64()),
    (pa.timestamp("ns"), _FAR, pa.int64()),
    (pa.timestamp("us", "No/Where"), (0, 1), pa.int64()),
    (pa.timestamp("us", "+99:99"), (0, 1), pa.int64()),
    (pa.time64("ns"), (0, 1, 86399999999999, 2**60, -1), pa.int64()),
    (pa.duration("us"), _FAR, pa.int64()),
    (pa.list_(pa.string()), ([], ["a", None], ["a|b"])),
    (pa.list_(pa.list_(pa.int64())), ([[1], []],)),
    (pa.struct([("a", pa.string()), ("b", pa.float64())]), ({"a": "x", "b": float("nan")},)),
    (pa.map_(pa.string(), pa.int64()), ([("a", 1), ("a", 2)],)),
    (pa.dictionary(pa.int8(), pa.string()), ("a", "b")),
)


def seeds() -> tuple[bytes, ...]:
    """Files to begin with, the first of them good."""
    good = {"text": pa.array(["rain", "a film"]), "label": pa.array(["a", "b"])}
    return (_written(pa.table(good), Random(0)), *(_table(Random(number)) for number in range(8)))


def mutate(data: bytes, random: Random) -> bytes:
    """Another file, or this one with some bytes changed, most often in the footer at its end."""
    kind = random.randrange(50)
    if kind < 20:
        return _table(random)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    if kind < 25 or footer >= len(data):
        return mutate_bytes(data, random)
    return data[:-footer] + mutate_bytes(data[-footer:-8], random) + data[-8:]


def _table(random: Random) -> bytes:
    """A small file with a text, and with other columns of any type."""
    rows = random.choice((0, 1, 3, 3, 20))
    names = ["text", *random.choices(_NAMES, k=3)]
    kinds = [_COLUMNS[0], *random.choices(_COLUMNS, k=3)]
    if random.random() < 0.1:
        kinds[0] = random.choice(_COLUMNS)
    columns = [_column(random, rows, *kind) for kind in kinds]
    return _written(pa.Table.from_arrays(columns, names=names), random)


def _column(random: Random, rows: int, kind: Any, values: Any, stored: Any = None) -> Any:
    chosen = pa.array([random.choice((None, *values)) for _ in range(rows)], stored or kind)
    return chosen.view(kind) if stored else chosen


def _written(table: Any, random: Random) -> bytes:
    out = io.BytesIO()
    try:
        parquet.write_table(
            table,
            out,
            compression=random.choice(("none", "snappy", "zstd")),
            store_schema=random.random() < 0.7,
        )
    except (pa.ArrowException, ValueError):  # Parquet does not have every type
        return b"PAR1"
    return out.getvalue()
