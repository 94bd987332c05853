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
from fpabee.runtime.text_io import Row, TextFormat, read_rows
from fpabee.runtime.text_io import lines as lines_module


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
    return list(read_rows("-", text_format))


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
    assert texts(list(read_rows(path, TextFormat.JSON_LINES))) == ["one"]
    assert texts(list(read_rows(path, TextFormat.TEXT))) == ['{"text": "one"}']
    assert texts(read_stdin(monkeypatch, b'{"text": 1}\n', TextFormat.TEXT)) == ['{"text": 1}']


def test_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}\nbroken\n')
    rows = read_rows(path)
    assert [next(rows).text, next(rows).text] == ["one", "two"]
    with pytest.raises(InputError, match="line 3"):
        next(rows)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"", "line 2 is empty"),
        (b"   ", "line 2 is empty"),
        (b"plain", "line 2 is not JSON"),
        (b'{"text": "cut', "line 2 is not JSON"),
        (b'{"text": "a"} {"text": "b"}', "line 2 is not JSON"),
        (b'{"text": "a", "x": NaN}', "line 2 is not JSON"),
        (b'{"text": "\\ud800 lone surrogate"}', "line 2 is not JSON"),
        (b'{"text": "a", "x": ' + b"[" * 100_000, "line 2 is not JSON"),
        (b'"a"', 'line 2 has no string field "text"'),
        (b'["a"]', 'line 2 has no string field "text"'),
        (b'{"sentence": "a"}', 'line 2 has no string field "text"'),
        (b'{"text": 5}', 'line 2 has no string field "text"'),
        (b'{"text": null}', 'line 2 has no string field "text"'),
        (b'{"text": "a", "text_pair": 5}', 'line 2: "text_pair" is a int'),
        (b'{"text": "a", "label": ["b"]}', 'line 2: "label" is not a name'),
        (b'{"text": "a", "labels": "b"}', 'line 2: "labels" is not a list of names'),
        (b'{"text": "a", "labels": [["b"]]}', 'line 2: "labels" is not a list of names'),
        ('{"text": "é"}'.encode("latin-1"), "line 2 is not UTF-8: byte 0xe9 at column 11"),
    ],
    ids=lambda value: str(value[:40]),
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, says: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path / "in.jsonl", b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    assert f"in.jsonl, {says}" in str(caught.value)
    assert caught.value.hint


def test_text_that_is_not_utf8_says_how_to_convert(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1 is not UTF-8: byte 0xff at column 1.*iconv"):
        read(tmp_path / "in.txt", "a".encode("utf-16"))


def test_a_line_may_be_as_long_as_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 8)
    assert texts(read(tmp_path / "in.txt", b"1234567\n12345678")) == ["1234567", "12345678"]
    with pytest.raises(InputError, match=r"line 2 is longer than .*split it"):
        read(tmp_path / "in.txt", b"1234567\n12345678\n")


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl", "in.txt.gz"])
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str) -> None:
    content = gzip.compress(b"") if name.endswith(".gz") else b""
    with pytest.raises(InputError, match=r"has no rows.*at least one line"):
        read(tmp_path / name, content)


def test_empty_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="standard input has no rows"):
        read_stdin(monkeypatch, b"")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt does not exist"):
        next(read_rows(tmp_path / "nowhere.txt"))
    with pytest.raises(InputError, match="is a folder"):
        next(read_rows(tmp_path))


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot tell the format from '\.xls'.*rename"):
        read(tmp_path / "in.xls", b"a\n")


@pytest.mark.parametrize("damage", ["not gzip", "cut short", "wrong checksum", "wrong block"])
def test_a_damaged_compressed_file_is_refused(tmp_path: Path, damage: str) -> None:
    packed = bytearray(gzip.compress(b"one text\n"))
    if damage == "not gzip":
        packed = bytearray(b"plain text\n")
    elif damage == "cut short":
        del packed[-12:]
    else:
        # The 10 bytes of the header, the compressed blocks, 8 bytes of checksum and length.
        packed[10 if damage == "wrong block" else -8] ^= 0xFF
    with pytest.raises(InputError, match=r"cannot be read.*copy the file again"):
        read(tmp_path / "in.txt.gz", bytes(packed))
