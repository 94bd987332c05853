"""A Parquet file with columns of any type, good and bad."""

from __future__ import annotations

import io
from decimal import Decimal
from typing import Any

import pyarrow as pa
from pyarrow import parquet

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


def seed() -> bytes:
    """A small file with a text, and with a column of every type, good and bad."""
    columns = {"text": pa.array(["rain", "a film", ""]), "label": pa.array(["a", None, "b"])}
    for number, (kind, values, *stored) in enumerate(_COLUMNS):
        some = [*values, None, None, None][:3]
        column = pa.array(some, *(stored or [kind]))
        columns[f"x{number}"] = column.view(kind) if stored else column
    out = io.BytesIO()
    parquet.write_table(pa.table(columns), out, compression="none")
    return out.getvalue()
