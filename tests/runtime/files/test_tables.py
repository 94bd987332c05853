"""CSV and TSV inputs: headers, quotes, columns, labels, and bad rows named by their line."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpabee.runtime.errors import InputError, RowError
from fpabee.runtime.files import Inputs, ReadOptions, Row
from fpabee.runtime.files import lines as lines_module
from fpabee.runtime.files.lines import Lines, table_rows

from .test_sources import read


def read_all(path: Path, content: bytes) -> list[Row | RowError]:
    path.write_bytes(content)
    return list(Inputs([path]))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbftext,id\r\none,1\r\ntwo,2\r\n", ["one", "two"]),
        (b'text\n"a ""b"", c"\n"two\nlines"\n', ['a "b", c', "two\nlines"]),
        (b'text,id\n"",1\n,2\n', ["", ""]),
        (b"text\none\n\n\ntwo\n", ["one", "two"]),
        ('text\n"a\r\ncell"\nx\u2028y\x85z\n'.encode(), ["a\r\ncell", "x\u2028y\x85z"]),
        (b"\n\ntext\nafter empty lines\n", ["after empty lines"]),
    ],
)
def test_texts(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    assert [row.text for row in read(tmp_path / "in.csv", content)] == expected
    tabs = content.replace(b",", b"\t") if b"id" in content else content
    assert [row.text for row in read(tmp_path / "in.tsv", tabs)] == expected
    assert [row.text for row in read(tmp_path / "in.csv.gz", gzip.compress(content))] == expected


def test_columns_and_lines(tmp_path: Path) -> None:
    content = b'id,text,label,text_pair\n7,"a\nb",yes,c\n\n8,d,,\n'
    rows = read(tmp_path / "in.csv", content)
    assert rows == [
        Row("a\nb", "c", ("yes",), {"id": "7"}),
        Row("d", None, None, {"id": "8"}),
    ]
    assert rows[1].where == f"{tmp_path / 'in.csv'}, line 5"


@pytest.mark.parametrize(
    ("options", "header", "cell", "expected"),
    [
        (ReadOptions(), "labels", "a | b|", ("a", "b")),
        (ReadOptions(), "labels", "", ()),
        (ReadOptions(), "label", "a|b", ("a|b",)),
        (ReadOptions(), "label", "", None),
        (ReadOptions(label_column="topics"), "topics", "a|b", ("a|b",)),
    ],
)
def test_labels(
    tmp_path: Path, options: ReadOptions, header: str, cell: str, expected: tuple[str, ...] | None
) -> None:
    (row,) = read(tmp_path / "in.csv", f"text,{header}\nx,{cell}\n".encode(), options)
    assert row.labels == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"a,b,c", "line 3 has 3 cells, but the header has 2"),
        (b'"a" b,c', "line 3 is not a row of a table"),
        (b"a\xff,b", "line 3 is not UTF-8: byte 0xff at column 2"),
        (b"a" * 101 + b",b", "line 3 is longer than"),
    ],
)
def test_rows_after_a_bad_one_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, says: str
) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 100)
    content = b"text,id\nfirst,1\n" + line + b"\nlast,2\n"
    first, bad, last = read_all(tmp_path / "in.csv", content)
    assert isinstance(bad, RowError)
    assert says in bad.message
    assert [row.text for row in (first, last) if isinstance(row, Row)] == ["first", "last"]
    with pytest.raises(RowError, match="line 3"):
        read(tmp_path / "in.csv", content)


def test_an_open_quote_does_not_swallow_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 100)
    before = csv.field_size_limit(100)
    try:
        found = read_all(tmp_path / "in.csv", b'text,id\n"open,1\n' + b"more,2\n" * 100)
    finally:
        csv.field_size_limit(before)
    assert isinstance(found[0], RowError)
    assert "line 2 (up to line 16) is not a row of a table" in found[0].message
    assert "limit (100)" in found[0].message
    assert len(found) == 1 + 86
    assert isinstance(found[-1], Row)


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@pytest.mark.parametrize("separator", [",", "\t"])
@given(rows=st.lists(st.tuples(cells, cells), min_size=1))
def test_what_the_csv_module_writes_comes_back(separator: str, rows: list[tuple[str, str]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator)
    writer.writerow(["text", "id"])
    writer.writerows(rows)
    lines = Lines(io.BytesIO(buffer.getvalue().encode()), "x")
    found = list(table_rows(lines, ReadOptions(), separator))
    assert [(r.text, r.fields["id"]) for r in found if isinstance(r, Row)] == rows


def test_semicolons_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it has: text;label -> separate .* with commas"):
        read_all(tmp_path / "in.csv", b"text;label\nrain;weather\n")


BAD_BYTE = b'id,text\n1,"first\nbad \xff byte\nthird, of the cell"\n2,fine\n'
UNQUOTED = b"id,text\n1,bad \xff byte\n2,fine\n"
TOO_LONG = b'id,text\n1,"first\n' + b"x" * 50 + b'\nthird"\n2,fine\n'
ENDS_LONG = b'id,text\n1,"first\n' + b"x" * 50 + b'"\n2,fine\n'
BEGINS_LONG = b'id,text\n1,"' + b"x" * 50 + b'\nsecond"\n2,fine\n'


@pytest.mark.parametrize(
    ("content", "line"),
    [(BAD_BYTE, 3), (UNQUOTED, 2), (TOO_LONG, 3), (ENDS_LONG, 3), (BEGINS_LONG, 2)],
)
def test_a_line_that_cannot_be_read_is_one_bad_row_with_its_whole_cell(
    content: bytes, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 40)
    error, row = read_all(tmp_path / "in.csv", content)
    assert isinstance(error, RowError)
    assert f"line {line} is" in error.message
    assert isinstance(row, Row)
    assert (row.text, row.fields) == ("fine", {"id": "2"})


def test_a_column_that_is_read_as_something_else_is_not_read_twice(tmp_path: Path) -> None:
    content = b"text_pair,label\nsecond,yes\n"
    (row,) = read(tmp_path / "in.csv", content, ReadOptions(text_column="text_pair"))
    assert row == Row("second", None, ("yes",))
    (row,) = read(tmp_path / "in.csv", content, ReadOptions(text_column="label"))
    assert row == Row("yes", "second", None)
    options = ReadOptions(text_column="label", text_pair_column="")
    (row,) = read(tmp_path / "in.csv", content, options)
    assert row == Row("yes", None, None, {"text_pair": "second"})
    with pytest.raises(InputError, match="have the columns a, a"):
        ReadOptions(text_column="a", label_column="a")
