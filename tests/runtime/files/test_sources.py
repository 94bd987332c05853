"""Inputs: their formats and encodings, their order, their identity, and how far they are read."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpabee.runtime.errors import InputError, RowError
from fpabee.runtime.files import Inputs, ReadOptions, Row, TextFormat, read_rows
from fpabee.runtime.files import lines as lines_module

AS_TEXT = ReadOptions(TextFormat.TEXT)


def read(path: Path, content: bytes, options: ReadOptions | None = None) -> list[Row]:
    path.write_bytes(content)
    return list(read_rows(path, options))


def read_stdin(content: bytes, options: ReadOptions | None = None) -> list[Row | RowError]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", type("Stdin", (), {"buffer": io.BytesIO(content)}))
        return list(Inputs(["-"], options))


def texts(rows: Iterable[Row | RowError]) -> list[str]:
    return [row.text for row in rows if isinstance(row, Row)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"one\n\nthree\n", ["one", "", "three"]),
        (b"\n", [""]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (b" one \t\n", [" one \t"]),
        ("東京\nnaïve\u2028x\x85y\n".encode(), ["東京", "naïve\u2028x\x85y"]),
    ],
)
def test_text_file(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    rows = read(tmp_path / "in.txt", content)
    assert texts(rows) == expected
    numbers = range(1, len(expected) + 1)
    assert [row.where for row in rows] == [f"{tmp_path / 'in.txt'}, line {n}" for n in numbers]
    assert texts(read(tmp_path / "in.txt.gz", gzip.compress(content))) == expected


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))))
def test_every_text_comes_back(lines: list[str]) -> None:
    content = "".join(line + "\n" for line in ["first", *lines]).encode()
    assert texts(read_stdin(content, AS_TEXT)) == ["first", *lines]


def test_json_lines(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"text": "a", "id": 10**30, "tags": [1, None, {"x": 0.5}]},
        {"text": "b", "text_pair": "c", "label": "yes"},
        {"text": "", "text_pair": None, "labels": ["x", "y"]},
        {"text": "d", "label": 3, "labels": None},
        {"text": "e", "labels": []},
    ]
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    rows = read(tmp_path / "in.jsonl", content)
    assert rows == [
        Row("a", fields={"id": 10**30, "tags": [1, None, {"x": 0.5}]}),
        Row("b", "c", ("yes",)),
        Row("", None, ("x", "y")),
        Row("d", None, ("3",)),
        Row("e", None, ()),
    ]
    assert [row.content for row in rows[:2]] == ["a", ("b", "c")]


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (b"one\n{two\n", None, ["one", "{two"]),
        (b'{"text": "one"}\n{"text": "two"}\n', None, ["one", "two"]),
        (b'\xef\xbb\xbf  {"text": "one"}\n', None, ["one"]),
        (b"\xff\nsecond\n", None, ["second"]),
        (b'{"text": "one"}\n', AS_TEXT, ['{"text": "one"}']),
    ],
)
def test_the_first_line_of_standard_input_tells_its_format_unless_it_is_given(
    content: bytes, options: ReadOptions | None, expected: list[str], tmp_path: Path
) -> None:
    assert texts(read_stdin(content, options)) == expected
    by_name: Any = "jsonl"
    if options is AS_TEXT:
        assert texts(read(tmp_path / "in.csv", content, options)) == expected
        assert texts(read(tmp_path / "in.csv", content, ReadOptions(by_name))) == ["one"]


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    unknown: Any = "json"
    with pytest.raises(InputError, match=r"`input_format` is 'json' -> choose from txt, jsonl"):
        read(tmp_path / "in.jsonl", b"{}", ReadOptions(unknown))


def test_lines_are_read_one_at_a_time_and_errors_take_the_place_of_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "a"}\n{\n\xff\n\n{"text": 5}\n{"text": "b"}\n')
    rows = read_rows(path)
    assert next(rows).text == "a"
    with pytest.raises(RowError, match="line 2"):
        next(rows)
    found = list(Inputs([path]))
    assert [type(row) for row in found] == [Row, RowError, RowError, RowError, RowError, Row]
    for number, row in enumerate(found, start=1):
        assert isinstance(row, Row) or f"line {number}" in row.message


def test_a_line_that_is_too_long_is_skipped_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 8)
    path = tmp_path / "in.txt"
    assert texts(read(path, b"1234567\n12345678")) == ["1234567", "12345678"]
    path.write_bytes(b"one\n" + b"x" * 100 + b"\nthree\n" + b"y" * 9)
    found = list(Inputs([path]))
    assert texts(found) == ["one", "three"]
    for number in (2, 4):
        row = found[number - 1]
        assert isinstance(row, RowError)
        assert f"line {number} is longer than" in row.message


def test_inputs_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {
        "a.txt": b"one\ntwo\n",
        "b.jsonl.gz": gzip.compress(b'{"text": "three"}\n'),
        "c.tsv": b"id\ttext\n1\tfour\n",
        "empty.txt": b"",
        "header.csv": b"text\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    a, b, c, empty, header = (tmp_path / name for name in contents)
    monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": io.BytesIO(b"five\n")}))
    rows = [row for row in Inputs([empty, a, b, c, "-", header, a]) if isinstance(row, Row)]
    assert texts(rows) == ["one", "two", "three", "four", "five", "one", "two"]
    assert [row.where.split()[-1] for row in rows] == list("1212112")
    assert rows[2].where == f"{b}, line 1"
    with pytest.raises(InputError, match=r"empty\.txt has no rows.* 1 other"):
        list(Inputs([empty, header]))


def test_plain_text_has_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b'{"body": "rain"}\n')
    named = ReadOptions(text_column="body")
    with pytest.raises(InputError, match=r"in\.txt is plain text, which has no columns"):
        Inputs([path], named)
    table = tmp_path / "in.CSV"
    table.write_bytes(b"body\nrain\n")
    both = list(Inputs([table, path], named))
    assert texts(both) == ["rain", '{"body": "rain"}']
    (row,) = Inputs([path], ReadOptions(TextFormat.JSON_LINES, "body"))
    assert isinstance(row, Row)
    assert row.text == "rain"


def test_half_of_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    lines = [
        r'{"text": "\ud83d"}',
        r'{"text": "a \uDE00"}',
        r'{"text": "\\\ude00"}',
        r'{"text": "\\ud83d", }',
        r'{"text": "\ud83d\ude00"}',
    ]
    path.write_text("\n".join(lines))
    *errors, row = Inputs([path])
    for number, half in enumerate((r"\ud83d", r"\uDE00", r"\ude00")):
        error = errors[number]
        assert isinstance(error, RowError)
        assert f"line {number + 1} has {half} at column" in error.message
        assert "half of a surrogate pair" in error.message
        assert error.hint == r"write the whole character, or \ufffd in its place"
    assert isinstance(errors[3], RowError)
    assert "surrogate pair" not in errors[3].message, "two backslashes are no escape"
    assert isinstance(row, Row)
    assert row.text == "\U0001f600"
