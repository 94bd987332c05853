"""Blocks, skipped rows, several files, formats out: `fpabee-run` from end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from fpabee.runtime.encoding import blocks

from ..running import Run, check_refused, write_lines

TEXTS = ["the film is not bad", "rain", "turn the lights off", "book a table"]


@given(st.lists(st.integers(0, 20), max_size=20))
def test_blocks_hold_all_items_and_are_bounded(sizes: list[int]) -> None:
    texts = ["x" * size for size in sizes]
    found = list(blocks(texts, len, 10, 4))
    assert [text for block in found for text in block] == texts
    for block in found:
        assert 0 < len(block) <= 4
        assert sum(map(len, block[:-1])) < 10


def test_columns_by_name(run: Run, bert: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.tsv"
    source.write_text('q1\tq2\tgold\nthe film\t"bad\talarm\n', encoding="utf-8")
    options = ["--text-column", "q1", "--text-pair-column", "q2", "--no-quotes", "--with-text"]
    result = run(bert, source, *options, "--label-column", "gold", "--metrics")
    (record,) = result.records
    assert (record["text"], record["text_pair"]) == ("the film", '"bad')
    assert "accuracy" in result.err


def test_the_same_rows_in_every_format(run: Run, bert: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", *({"text": t, "id": t[:3]} for t in TEXTS))
    shown = run(bert, source, "--quiet")
    names = ("index", "id", "label", "score", "exit")
    expected = [[str(r[name]) for name in names] for r in shown.records]
    for name in ("out.jsonl", "out.csv", "out.parquet"):
        output = tmp_path / name
        output.write_text("old")
        assert run(bert, source, "--output", output, "--quiet").code == 0
        found: list[Any]
        if output.suffix == ".parquet":
            found = parquet.read_table(output).to_pylist()
        elif output.suffix == ".jsonl":
            assert output.read_text() == shown.out
            continue
        else:
            with output.open(newline="") as stream:
                found = list(csv.DictReader(stream))
        assert [[str(r[name]) for name in names] for r in found] == expected
    assert len(list(tmp_path.iterdir())) == 4, "no other file is left"


def test_output_to_something_that_is_not_a_file(run: Run, bert: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"text": "rain"})
    null = run(bert, source, "--output", "/dev/null", "--quiet")
    assert (null.code, null.err) == (0, "")
    assert not Path("/dev/null").is_file()
    assert len(run(bert, source, "--output", "-", "--quiet").records) == 1
    link, real = tmp_path / "link.jsonl", tmp_path / "real.jsonl"
    real.touch()
    link.symlink_to(real)
    run(bert, source, "--output", link, "--quiet")
    assert link.is_symlink()
    assert len(real.read_text().splitlines()) == 1


BAD = [
    '{"text": "rain", "label": "weather"}',
    "{",
    '{"text": 5}',
    '{"text": "sun", "label": "weather"}',
    '{"text": "alarm", "label": "sport"}',
    '{"text": "off"}',
    "",
]


@pytest.mark.parametrize("metrics", [False, True])
def test_skipped_rows_are_records_of_their_errors(
    run: Run, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics: bool
) -> None:
    monkeypatch.setattr("fpabee.runtime.files.job.BLOCK_ROWS", 2)
    source = tmp_path / "in.jsonl"
    source.write_text("".join(line + "\n" for line in BAD))
    options = ["--metrics"] if metrics else []
    result = run(bert, source, "--on-error", "skip", *options)
    assert result.code == 0
    assert [record["index"] for record in result.records] == list(range(len(BAD)))
    bad = {1, 2, 6} | ({4, 5} if metrics else set())
    for index, record in enumerate(result.records):
        assert ("error" in record) == (index in bad)
        if index in bad:
            assert f"line {index + 1}" in record["error"]
            assert record.keys() == {"index", "error"}
    assert "7 rows in" in result.err
    unusable = " or have no usable label" if metrics else ""
    message = f"{len(bad)} rows could not be read{unusable}: their records are errors"
    assert message in result.err
    assert "mean depth" in result.err


def test_bad_rows_stop_a_run_unless_they_are_skipped(run: Run, bert: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text,id\nrain,1\nsun\n")
    check_refused(run(bert, source), "line 3 has 1 cells")
    output = tmp_path / "out.csv"
    assert run(bert, source, "--on-error", "skip", "--output", output, "--quiet").code == 0
    assert output.read_text().splitlines()[2].startswith("1,,,,,,,")


def test_skipping_every_row_is_an_error(run: Run, bert: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"sentence": "a"}, {"sentence": "b"})
    output = tmp_path / "out.jsonl"
    options = (source, "--on-error", "skip")
    told = run(bert, *options, "--json")
    summary = json.loads("{" + told.err.partition("{")[2].rpartition("}")[0] + "}")
    assert (summary["mean_depth"], summary["saving"]) == (None, None)
    assert "mean depth" not in run(bert, *options).err
    result = run(bert, *options, "--output", output, "--quiet")
    check_refused(result, "none of 2 rows could be used; the first:", "--text-column")
    assert len(output.read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_files_are_read_in_their_order(run: Run, bert: Path, tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    a, b, c, d = (tmp_path / f"{name}.txt" for name in "abcd")
    result = run(bert, c, b, "-", d, a, "--with-text", stdin=b"stdin\n")
    assert result.code == 0
    assert [record["text"] for record in result.records] == ["c", "b", "stdin", "d", "a"]
