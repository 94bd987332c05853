"""Reading texts: formats, encodings, and bad lines named by their number."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpabee.runtime.errors import InputError
from fpabee.runtime.files import ReadOptions, Row, TextFormat, read_rows
from fpabee.runtime.files import lines as lines_module


class _Stdin:
    """Standard input that holds given bytes."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


def read(path: Path, content: bytes) -> list[Row]:
    path.write_bytes(content)
    return list(read_rows(path))


def read_stdin(
    monkeypatch: pytest.MonkeyPatch, content: bytes, text_format: TextFormat | None = None
) -> list[Row]:
    monkeypatch.setattr("sys.stdin", _Stdin(content))
    return list(read_rows("-", ReadOptions(text_format)))


def texts(rows: list[Row]) -> list[str]:
    return [row.text for row in rows]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"one\n\nthree\n", ["one", "", "three"]),
        (b"\n", [""]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        (b" one \t\n", [" one \t"]),
        ("東京\nnaïve\u2028x\x85y\n".encode(), ["東京", "naïve\u2028x\x85y"]),
        (b'{"text": "not JSON here"}\n', ['{"text": "not JSON here"}']),
    ],
)
def test_text_file(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    rows = read(tmp_path / "in.txt", content)
    assert texts(rows) == expected
    assert [row.line for row in rows] == list(range(1, len(expected) + 1))


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))))
def test_every_text_comes_back(lines: list[str]) -> None:
    content = "".join(line + "\n" for line in ["first", *lines]).encode()
    with pytest.MonkeyPatch.context() as patch:
        assert texts(read_stdin(patch, content, TextFormat.TEXT)) == ["first", *lines]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_every_json_text_comes_back(lines: list[str]) -> None:
    content = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    with pytest.MonkeyPatch.context() as patch:
        assert texts(read_stdin(patch, content)) == lines


def test_json_lines(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"text": "a", "id": 10**30, "tags": [1, None, {"x": 0.5}]},
        {"text": "b", "text_pair": "c", "label": "yes"},
        {"text": "", "text_pair": None, "labels": ["x", "y"]},
        {"text": "d", "label": 3, "labels": None},
        {"text": "e", "labels": []},
    ]
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    assert read(tmp_path / "in.jsonl", content) == [
        Row("a", fields={"id": 10**30, "tags": [1, None, {"x": 0.5}]}, line=1),
        Row("b", "c", ("yes",), line=2),
        Row("", None, ("x", "y"), line=3),
        Row("d", None, ("3",), line=4),
        Row("e", None, (), line=5),
    ]


def test_content_is_a_text_or_a_pair() -> None:
    assert Row("a").content == "a"
    assert Row("a", "").content == ("a", "")


@pytest.mark.parametrize("name", ["in.txt.gz", "in.gz", "in.jsonl.gz", "in.ndjson.gz"])
def test_compressed_files(tmp_path: Path, name: str) -> None:
    is_json = "json" in name
    content = b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n' if is_json else b"one\ntwo\n"
    assert texts(read(tmp_path / name, gzip.compress(content))) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\n{two\n", ["one", "{two"]),
        (b'{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        (b'\xef\xbb\xbf  {"text": "one"}\n', ["one"]),
    ],
)
def test_standard_input_is_json_if_it_begins_so(
    monkeypatch: pytest.MonkeyPatch, content: bytes, expected: list[str]
) -> None:
    assert texts(read_stdin(monkeypatch, content)) == expected


def test_the_format_can_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b'{"text": "one"}\n')
    assert texts(list(read_rows(path, ReadOptions(TextFormat.JSON_LINES)))) == ["one"]
    assert texts(list(read_rows(path, ReadOptions(TextFormat.TEXT)))) == ['{"text": "one"}']
    assert texts(read_stdin(monkeypatch, b'{"text": 1}\n', TextFormat.TEXT)) == ['{"text": 1}']


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}\nbroken\n')
    rows = read_rows(path)
    assert [next(rows).text, next(rows).text] == ["one", "two"]
    with pytest.raises(InputError, match="line 3"):
        next(rows)


def test_a_line_may_be_as_long_as_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 8)
    assert texts(read(tmp_path / "in.txt", b"1234567\n12345678")) == ["1234567", "12345678"]
    with pytest.raises(InputError, match=r"line 2 is longer than .*split it"):
        read(tmp_path / "in.txt", b"1234567\n12345678\n")
