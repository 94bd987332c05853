"""Parquet files of columns of any type, good and bad."""

from __future__ import annotations

import datetime
import io
import json
from collections.abc import Callable
from decimal import Decimal
from random import Random
from typing import Any

import pyarrow as pa
from fuzz_mutate import mutate_bytes
from pyarrow import parquet

_TEXTS = ("", "rain", "é", "a|b", "0", "x" * 100, None)
_NAMES = ("text_pair", *("label", "labels") * 3, *"abcdefghij", "")
_FEATURES: tuple[Any, ...] = (
    {"label": {"names": ["a", "b"]}},
    {"label": {"names": [None, 1, {}]}},
    {"label": 1},
    [],
)
_COMPRESSION = ("none", "snappy", "gzip", "zstd", "lz4", "brotli")

Column = Callable[[Random, int], Any]


def seeds() -> tuple[bytes, ...]:
    """Files to begin with, the first of them good."""
    texts = pa.array(["rain", "a film"])
    good = _written(["text", "label"], [texts, pa.array(["a", "b"])], None, Random(0))
    return (good, *(table(Random(number)) for number in range(8)))


def table(random: Random) -> bytes:
    """A small file with a text, and with other columns of any type."""
    rows = random.choice((0, 1, 3, 3, 20))
    names = ["text", *random.choices(_NAMES, k=3)]
    columns = [_text(random, rows), *(random.choice(_COLUMNS)(random, rows) for _ in names[1:])]
    if random.random() < 0.1:
        columns[0] = random.choice(_COLUMNS)(random, rows)
    metadata: Any = None
    if random.random() < 0.3:
        features = random.choice(_FEATURES)
        metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return _written(names, columns, metadata, random)


def repeated(random: Random) -> bytes:
    """One long text, or none, many times: little on disk, much in memory."""
    long = random.choice(("a" * 2**20, "\U0001f469" * 2**18))
    text, rows = random.choice(((long, 2000), ("", 10**6)))
    indices = pa.array([0] * rows, pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, pa.array([text], pa.string()))
    if random.random() < 0.3:
        column = pa.nulls(10**6, pa.string())
    out = io.BytesIO()
    content = (
        {"x": column, "text": ["a"] * len(column)} if random.random() < 0.3 else {"text": column}
    )
    parquet.write_table(pa.table(content), out, store_schema=random.random() < 0.5)
    return out.getvalue()


def mutate(data: bytes, random: Random) -> bytes:
    """Another file, or some bytes of this one changed, most often in the footer at its end."""
    kind = random.randrange(10)
    if kind < 4:
        return table(random)
    if kind == 4 and random.random() < 0.1:
        return repeated(random)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    if kind == 5 or footer >= len(data):
        return mutate_bytes(data, random)
    return data[:-footer] + mutate_bytes(data[-footer:-8], random) + data[-8:]


def _written(names: list[str], columns: list[Any], metadata: Any, random: Random) -> bytes:
    out = io.BytesIO()
    content = pa.Table.from_arrays(columns, names=names).replace_schema_metadata(metadata)
    try:
        parquet.write_table(
            content,
            out,
            compression=random.choice(_COMPRESSION),
            use_dictionary=random.random() < 0.7,
            row_group_size=random.choice((2, 10_000)),
            data_page_version=random.choice(("1.0", "2.0")),
        )
    except (pa.ArrowException, ValueError):  # a type that Parquet has not
        return _written(names[:1], columns[:1], None, random) if len(names) > 1 else b"PAR1"
    return out.getvalue()


def _text(random: Random, rows: int) -> Any:
    values = [random.choice(_TEXTS) for _ in range(rows)]
    return pa.array(values, random.choice((pa.string(), pa.large_string(), pa.string_view())))


def _of(kind: Any, *values: Any) -> Column:
    def make(random: Random, rows: int) -> Any:
        chosen = [random.choice((None, *values)) for _ in range(rows)]
        return pa.array(chosen, kind)

    return make


def _stored(kind: Any, storage: Any, *values: Any) -> Column:
    """Values that Python has no name for, by what is stored for them."""

    def make(random: Random, rows: int) -> Any:
        return _of(storage, *values)(random, rows).view(kind)

    return make


def _not_utf8(random: Random, rows: int) -> Any:
    return _of(pa.binary(), b"\xff\xfe", b"a")(random, rows).view(pa.string())


_FAR = (0, 1, -1, 2**62, -(2**62), 253402300800 * 10**6)
_COLUMNS: tuple[Column, ...] = (
    _text,
    _not_utf8,
    _of(pa.int64(), 0, 1, -1, 2**62),
    _of(pa.uint64(), 2**64 - 1),
    _of(pa.float64(), 0.5, float("nan"), float("inf"), 1e308),
    _of(pa.float16(), 0.5),
    _of(pa.bool_(), True, False),
    _of(pa.null()),
    _of(pa.binary(), b"", b"\xff\0"),
    _of(pa.binary(2), b"ab"),
    _of(pa.decimal128(38, 10), Decimal("1.5"), Decimal("1e20")),
    _of(pa.decimal256(76, 0), Decimal("1e70")),
    _of(pa.date32(), datetime.date(2020, 1, 1)),
    _stored(pa.date32(), pa.int32(), 2**31 - 1, -(2**31)),
    _stored(pa.timestamp("us"), pa.int64(), *_FAR),
    _stored(pa.timestamp("ns"), pa.int64(), *_FAR),
    _stored(pa.timestamp("s", "UTC"), pa.int64(), 0, 253402300799),
    _stored(pa.timestamp("ms", "Europe/Berlin"), pa.int64(), *_FAR),
    _stored(pa.timestamp("us", "No/Where"), pa.int64(), 0, 1),
    _stored(pa.timestamp("us", "+99:99"), pa.int64(), 0, 1),
    _stored(pa.time64("ns"), pa.int64(), 0, 1, 86399999999999, 2**60, -1),
    _stored(pa.time32("s"), pa.int32(), 0, 86399, 2**30, -1),
    _stored(pa.duration("us"), pa.int64(), *_FAR),
    _stored(pa.duration("ns"), pa.int64(), *_FAR),
    _of(pa.list_(pa.string()), [], ["a", None], ["a|b"]),
    _of(pa.list_(pa.list_(pa.int64())), [[1], []]),
    _of(pa.struct([("a", pa.string()), ("b", pa.float64())]), {"a": "x", "b": float("nan")}),
    _of(pa.map_(pa.string(), pa.int64()), [("a", 1), ("a", 2)]),
    _of(pa.dictionary(pa.int8(), pa.string()), "a", "b"),
)
