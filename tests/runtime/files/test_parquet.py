"""Parquet inputs: columns, types, class names, damage, and a missing pyarrow."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import subprocess
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from fpabee.runtime.errors import RowError
from fpabee.runtime.files import Inputs, ReadOptions, Row, read_rows

from ...commands.test_run import COMMAND

# Two rows of two columns, with one byte changed: pyarrow 26.0.1 ends the process when it is asked
# for the metadata of a column chunk.
ABORTS = base64.b85decode(
    b"P(e~L6#x|=6(B4X1Qh@k1{DSz00002000040RaF20AT?D003eY02Lq=AS@LG6#x|m6$Tst00062000C50RR91cmV"
    b"(a0C^Pz89X%r7zT4=Xk~3-"
    b"6$Ahk3?%{>1axJ1bR_^x8~^|S6$~W;7zJ!$Vr6V408AVJ000&Q85|ibCIB223>hT`02vqrbY*yS6#y0l7Dg6ECJ0"
    b"F!6#x|g6#@V}76cgv872S(0000c02~zz86^e)85jj@VPa)$6#y0l7Dg6ECQeBl6#x|g6#@V}76cha872S(0000Mi"
    b"~$w|CI}Xc0RSi<aA9(Bb!BudV{mXSVRCYBcOZ6Ua&u{KZXhx?E-)@J87v$C02}}S0M7sb08l|vF#"
)


def write(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    table = pyarrow.table(columns)
    parquet.write_table(table.replace_schema_metadata(metadata) if metadata else table, path)
    return path


def read(path: Path, columns: dict[str, Any], options: ReadOptions | None = None) -> list[Row]:
    return list(read_rows(write(path, columns), options))


def test_columns(tmp_path: Path) -> None:
    named = ReadOptions(text_column="q1", text_pair_column="q2", label_column="gold")
    (row,) = read(tmp_path / "in.pq", {"q1": ["a"], "q2": ["b"], "gold": [3], "text": [1]}, named)
    assert row == Row("a", "b", ("3",), {"text": 1})
    rows = read(
        tmp_path / "in.parquet",
        {"text": ["a", ""], "text_pair": ["b", None], "label": ["x", None], "id": [1, 2]},
    )
    assert rows == [Row("a", "b", ("x",), {"id": 1}), Row("", None, None, {"id": 2})]
    assert rows[1].where == f"{tmp_path / 'in.parquet'}, row 2"


def test_labels(tmp_path: Path) -> None:
    for values, expected in (
        ([["x", "y"], [], None], [("x", "y"), (), None]),
        (["x|y", "", None], [("x", "y"), (), None]),
        ([[1, 2], [3], []], [("1", "2"), ("3",), ()]),
    ):
        rows = read(tmp_path / "in.parquet", {"text": ["a", "b", "c"], "labels": values})
        assert [row.labels for row in rows] == expected


def test_other_fields_become_what_json_has(tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 29)
    fields = {
        "day": [day],
        "price": [decimal.Decimal("1.50")],
        "raw": [b"\xff\0"],
        "nan": [float("nan")],
        "infinite": [float("-inf")],
        "nested": [{"a": [1, None], "when": day}],
    }
    (row,) = read(tmp_path / "in.parquet", {"text": ["a"], **fields})
    assert row.fields == {
        "day": "2024-02-29",
        "price": "1.50",
        "raw": "/wA=",
        "nan": None,
        "infinite": "-inf",
        "nested": {"a": [1, None], "when": "2024-02-29"},
    }
    json.dumps(row.fields, allow_nan=False)


def test_rows_after_a_bad_one_can_be_read(tmp_path: Path) -> None:
    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 2, 2, 3)))
    valid = pyarrow.py_buffer(b"\x0b")
    content = pyarrow.py_buffer(b"a\xffd")
    texts = pyarrow.StringArray.from_buffers(4, offsets, content, valid)
    found = list(Inputs([write(tmp_path / "in.parquet", {"text": texts})]))
    assert [row.text for row in found if isinstance(row, Row)] == ["a", "d"]
    _, not_utf8, null, _ = found
    assert isinstance(not_utf8, RowError)
    assert 'row 2: the column "text"' in not_utf8.message
    assert isinstance(null, RowError)
    assert "row 3 has no string field" in null.message
    assert "text_column" in null.hint


def test_a_file_on_which_pyarrow_aborts_ends_no_process(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(ABORTS)
    command = [*COMMAND, str(bert), str(path), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        pytest.skip("this version of pyarrow reads its rows")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {path} cannot be read as Parquet: ")
    assert done.stderr.endswith(" -> copy the file again\n")
    assert done.stderr.count("\n") == 1
