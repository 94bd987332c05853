"""Several inputs: their order, what tells that they are the same, and how far they are read."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from fpabee.runtime.errors import InputError, RowError
from fpabee.runtime.files import Inputs, ReadOptions, Row, read_rows
from fpabee.runtime.files import lines as lines_module


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    texts, lines, table = (tmp_path / name for name in ("a.txt", "b.jsonl.gz", "c.tsv"))
    texts.write_text("one\ntwo\n")
    lines.write_bytes(gzip.compress(b'{"text": "three"}\n'))
    table.write_text("id\ttext\n1\tfour\n")
    return [texts, lines, table]


def found(inputs: Inputs) -> list[str]:
    return [row.text for row in inputs if isinstance(row, Row)]


def test_inputs_come_in_order(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = type("Stdin", (), {"buffer": io.BytesIO(b"five\n")})
    monkeypatch.setattr("sys.stdin", stdin)
    assert found(Inputs([*three, "-", three[0]])) == [
        *("one", "two", "three", "four", "five"),
        *("one", "two"),
    ]


def test_rows_name_their_own_file(three: list[Path]) -> None:
    rows = [row for row in Inputs(three) if isinstance(row, Row)]
    assert [row.line for row in rows] == [1, 2, 1, 2]
    assert rows[2].where == f"{three[1]}, line 1"


def test_an_empty_file_among_others_is_no_error(three: list[Path], tmp_path: Path) -> None:
    empty, header = tmp_path / "empty.txt", tmp_path / "header.csv"
    empty.touch()
    header.write_text("text\n")
    assert len(found(Inputs([empty, *three, header]))) == 4
    with pytest.raises(InputError, match=r"empty\.txt has no rows.* 1 other"):
        list(Inputs([empty, header]))


def test_all_inputs_are_looked_for_before_the_first_is_read(three: list[Path]) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt does not exist"):
        Inputs([*three, three[0].with_name("nowhere.txt")])
    with pytest.raises(InputError, match="standard input is given twice"):
        Inputs(["-", "-"])


def test_bad_rows_stand_between_the_others(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "a"}\n{\n\xff\n\n{"text": 5}\n{"text": "b"}\n')
    rows = list(Inputs([path]))
    assert [type(row) for row in rows] == [Row, RowError, RowError, RowError, RowError, Row]
    for number, row in enumerate(rows, start=1):
        assert isinstance(row, Row) or f"line {number}" in row.message


def test_a_line_that_is_too_long_is_left_out_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 8)
    path = tmp_path / "in.txt"
    path.write_bytes(b"one\n" + b"x" * 100 + b"\nthree\n" + b"y" * 100)
    first, long, third, last = Inputs([path])
    assert [row.text for row in (first, third) if isinstance(row, Row)] == ["one", "three"]
    for number, row in ((2, long), (4, last)):
        assert isinstance(row, RowError)
        assert f"line {number} is longer than" in row.message


def test_a_damaged_file_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "in.txt.gz"
    path.write_bytes(gzip.compress(b"one\n" * 100_000)[:-12])
    with pytest.raises(InputError, match="cannot be read") as caught:
        list(Inputs([path]))
    assert not isinstance(caught.value, RowError)


def test_the_first_line_of_standard_input_may_be_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = type("Stdin", (), {"buffer": io.BytesIO(b"\xff\nsecond\n")})
    monkeypatch.setattr("sys.stdin", stdin)
    bad, second = Inputs(["-"])
    assert isinstance(bad, RowError)
    assert isinstance(second, Row)


def test_identity(three: list[Path]) -> None:
    first, *_, pipe = Inputs([*three, "-"]).identity()
    content = three[0].read_bytes()
    assert first == {
        "name": str(three[0]),
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert (pipe["size"], pipe["sha256"]) == (None, None)


def test_share_grows_to_one(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.txt", "b.txt.gz", "c.jsonl")]
    paths[0].write_bytes(b"a text that is long\n" * 10_000)
    paths[1].write_bytes(gzip.compress(os.urandom(60_000).hex().encode() + b"\n"))
    paths[2].write_bytes(b'{"text": "x"}\n' * 10_000)
    inputs = Inputs(paths)
    shares = [inputs.share for _ in inputs]
    assert None not in shares
    assert shares == sorted(share or 0 for share in shares)
    assert (shares[0] or 0) < 0.05
    assert shares[-1] == 1.0


def test_a_pipe_is_read_but_its_end_is_not_known(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("text\none\n"))
    inputs = Inputs([pipe])
    writer.start()
    assert found(inputs) == ["one"]
    writer.join()
    assert inputs.share is None


def test_a_format_may_be_given_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("text,id\none,1\n")
    given: Any = "csv"
    assert [row.text for row in read_rows(path, ReadOptions(given))] == ["one"]
    given = "xlsx"
    with pytest.raises(InputError, match=r"'xlsx' -> .*input_format.* csv"):
        list(read_rows(path, ReadOptions(given)))


def test_read_rows_stops_at_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n{\n')
    rows = read_rows(path)
    assert next(rows).text == "a"
    with pytest.raises(RowError, match="line 2"):
        next(rows)
