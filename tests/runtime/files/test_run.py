"""Blocks, skipped rows, several files, formats out: `fpabee-run` from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def test_columns_by_name_of_several_files(run: Run, bert: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.tsv"
    last = tmp_path / "last.csv"
    source.write_text('q1\tq2\tgold\nthe film\t"""bad"\talarm\n', encoding="utf-8")
    last.write_text("gold,q1,q2\nalarm,rain,sun\n")
    options = ["--column", "text=q1", "--column", "text_pair=q2", "--with-text"]
    result = run(bert, source, last, *options, "--column", "label=gold", "--metrics")
    found = [(record["text"], record["text_pair"]) for record in result.records]
    assert found == [("the film", '"bad'), ("rain", "sun")]
    assert "accuracy" in result.err


@pytest.mark.skipif(sys.platform == "win32", reason="no /dev/null")
def test_output_to_something_that_is_not_a_file(run: Run, bert: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"text": "rain"})
    null = run(bert, source, "--output", "/dev/null", "--quiet")
    assert (null.code, null.err) == (0, "")
    assert not Path("/dev/null").is_file()
    assert len(run(bert, source, "--output", "-", "--quiet").records) == 1
    link = tmp_path / "link.jsonl"
    real = tmp_path / "real.jsonl"
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
    monkeypatch.setattr("fpabee.runtime.files.run.BLOCK_ROWS", 2)
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
    assert f"{len(bad)} rows could not be used: their records are errors" in result.err
    assert "mean depth" in result.err


def test_skipping_every_row_is_an_error(run: Run, bert: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"sentence": "a"}, {"sentence": "b"})
    output = tmp_path / "out.jsonl"
    options = (source, "--on-error", "skip")
    told = run(bert, *options, "--json")
    summary = json.loads("{" + told.err.partition("{")[2].rpartition("}")[0] + "}")
    assert (summary["mean_depth"], summary["saving"]) == (None, None)
    assert "mean depth" not in run(bert, *options).err
    result = run(bert, *options, "--output", output, "--quiet")
    check_refused(result, "none of 2 rows could be used; the first:", "--column text=NAME")
    records = output.read_text().splitlines()
    assert [
        record.count(" -> give it one, or set --column text=NAME to") for record in records
    ] == [1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
