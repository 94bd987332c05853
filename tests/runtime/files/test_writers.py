"""Results as JSON lines, CSV and Parquet, and that they read back unchanged."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from fpabee.runtime.errors import InputError, RowError
from fpabee.runtime.files import Row, TextFormat, read_rows
from fpabee.runtime.files.formats import output_format
from fpabee.runtime.files.records import (
    AnyLabels,
    OneLabel,
    Record,
    RecordSchema,
    convert,
    records,
    to_json,
)
from fpabee.runtime.predictions import Prediction

SINGLE = OneLabel(("no", "yes"))
MULTI = AnyLabels(("a", "b"), with_text=True, probabilities=True, errors=True)


def record(index: int = 0, **fields: Any) -> Record:
    return SINGLE.record(
        index,
        Row("x", fields=fields),
        Prediction(("yes",), (0.1234567,), 2, 4, (0.9, 0.1), (2.1, -0.1), False),
    )


def converted(
    tmp_path: Path, name: str, records: list[Record], schema: RecordSchema = SINGLE
) -> Path:
    partial = tmp_path / "partial"
    target = tmp_path / name
    partial.write_text("".join(to_json(r) + "\n" for r in records), encoding="utf-8")
    convert(partial, target, output_format(target), schema)
    return target


def test_records() -> None:
    answer = {"label": "yes", "score": 0.123457, "exit": 2, "layer": 4}
    kept = {"id": "a", "text": "kept", "labels": ["kept"]}
    theirs = {"exit": 9, "truncated": True, "error": "x"}  # never replaces a result
    assert record(3, **kept, **theirs) == {"index": 3, **kept, **answer}
    prediction = Prediction((), (), 1, 1, (0.25, 0.5), (-1.1, 0.0), True)
    assert MULTI.record(1, Row("x", "y"), prediction) == {
        **{"index": 1, "text": "x", "text_pair": "y", "labels": [], "scores": []},
        **{"exit": 1, "layer": 1, "truncated": True, "probabilities": {"a": 0.25, "b": 0.5}},
    }


def error(index: int, *said: str) -> Record:
    (found,) = records([RowError(*said)], iter(()), MULTI.record, index)
    return found


def test_tables(tmp_path: Path) -> None:
    fields = {"n": 1, "f": 0.5, "t": True, "none": None, "list": ["a", 2], "deep": {"k": [None]}}
    content = converted(tmp_path, "x.csv", [record(0, **fields), record(1, later="ü\n,\t")])
    with content.open(encoding="utf-8", newline="") as stream:
        first, second = csv.DictReader(stream)
    assert list(first) == [
        *("index", "n", "f", "t", "none", "list", "deep", "later"),
        *("label", "score", "exit", "layer", "truncated"),
    ]
    assert list(first.values()) == [
        *("0", "1", "0.5", "true", "", "a|2", '{"k": [null]}', ""),
        *("yes", "0.123457", "2", "4", "false"),
    ]
    assert second["later"] == "ü\n,\t"
    assert second["n"] == ""


def test_multi_label_tables_read_back(tmp_path: Path) -> None:
    found = [((), ()), (("a",), (0.75,)), (("a", "b"), (0.75, 1.0))]
    records = [
        MULTI.record(n, Row("x"), Prediction(labels, scores, 1, 1, (0.25, 0.5), (-1.1, 0.0), False))
        for n, (labels, scores) in enumerate(found)
    ]
    records.append(error(3, "bad", "mend it"))
    path = converted(tmp_path, "x.csv", records, MULTI)
    with path.open(encoding="utf-8", newline="") as stream:
        *rows, bad = csv.DictReader(stream)
    assert [row["labels"] for row in rows] == ["", "a", "a|b"]
    assert [row["scores"] for row in rows] == ["", "0.75", "0.75|1.0"]
    assert (rows[0]["probabilities.a"], rows[0]["probabilities.b"]) == ("0.25", "0.5")
    filled = {name: value for name, value in bad.items() if value}
    assert filled == {"index": "3", "error": "bad -> mend it"}
    assert [row.labels for row in read_rows(path)] == [(), ("a",), ("a", "b"), ()]


def test_parquet(tmp_path: Path) -> None:
    big = 2**60 + 1  # which no float is
    records = [
        record(0, n=1, f=1, big=big, both=big, huge=2**70, mixed="a", t=True, none=None, deep=[1]),
        record(1, n=2, f=0.5, big=1, both=0.5, huge=1, mixed=5, t=None),
    ]
    table = parquet.read_table(converted(tmp_path, "x.parquet", records))
    types = {field.name: str(field.type) for field in table.schema}
    assert types == {
        **{"index": "int64", "n": "int64", "f": "double", "big": "int64"},
        **dict.fromkeys(("both", "huge", "mixed", "none", "deep"), "string"),
        **{"label": "string", "score": "double", "exit": "int32", "layer": "int32"},
        **{"t": "bool", "truncated": "bool"},
    }
    first, second = table.to_pylist()
    assert (first["f"], first["big"], first["huge"]) == (1.0, big, str(2**70))
    assert (first["both"], second["both"]) == (str(big), "0.5")
    assert (first["mixed"], second["mixed"], first["deep"]) == ("a", "5", "[1]")
    assert (first["t"], second["t"], second["deep"]) == (True, None, None)
    assert first["truncated"] is False
    prediction = Prediction(("a",), (0.75,), 1, 1, (0.75, 0.5), (1.1, 0.0), True)
    records = [MULTI.record(0, Row("x", "y"), prediction), error(1, "bad")]
    first, second = parquet.read_table(converted(tmp_path, "x.pq", records, MULTI)).to_pylist()
    assert (first["labels"], first["scores"], first["probabilities.b"]) == (["a"], [0.75], 0.5)
    assert (first["text"], first["text_pair"], first["truncated"]) == ("x", "y", True)
    assert {n: v for n, v in second.items() if v is not None} == {"index": 1, "error": "bad"}


def test_parquet_is_written_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpabee.runtime.files.records._GROUP_ROWS", 10)
    path = converted(tmp_path, "x.parquet", [record(n) for n in range(25)])
    with parquet.ParquetFile(path) as file:
        assert file.metadata.num_row_groups == 3
        assert file.read().column("index").to_pylist() == list(range(25))


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_formats(tmp_path: Path) -> None:
    assert output_format(Path("x")) is TextFormat.JSON_LINES
    for name in ("pipe.parquet", "pipe.csv"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="needs a plain file"):
            output_format(tmp_path / name)
