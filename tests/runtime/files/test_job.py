"""Blocks, skipped rows, several files, formats out: `fpabee-run` from end to end."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from fpabee.runtime.errors import RowError
from fpabee.runtime.files import Row
from fpabee.runtime.files.job import BLOCK_CHARACTERS, BLOCK_ROWS, blocks

from ..running import Run, check_refused, write_lines

TEXTS = ["the film is not bad", "rain", "turn the lights off", "book a table"]


@given(st.lists(st.integers(0, 2 * BLOCK_CHARACTERS), max_size=20))
def test_blocks_hold_all_rows_and_are_bounded(sizes: list[int]) -> None:
    long = "x" * (2 * BLOCK_CHARACTERS)
    rows: list[Row | RowError] = [Row(long[:size]) for size in sizes]
    found = list(blocks(rows, BLOCK_ROWS))
    assert [row for block in found for row in block] == rows
    for block in found:
        before = sum(len(row.text) for row in block[:-1] if isinstance(row, Row))
        assert 0 < len(block) <= BLOCK_ROWS
        assert before < BLOCK_CHARACTERS


def test_blocks_are_bounded_in_rows_where_all_are_bad() -> None:
    found = list(blocks([RowError("bad")] * (BLOCK_ROWS + 1), BLOCK_ROWS))
    assert [len(block) for block in found] == [BLOCK_ROWS, 1]


def test_several_files_of_several_formats(run: Run, bert: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("rain\n")
    (tmp_path / "b.csv").write_text("text,id\nrain,7\n")
    result = run(bert, "--input", tmp_path / "a.txt", "--input", tmp_path / "b.csv", "--quiet")
    first, second = result.records
    assert (first["index"], second["index"], second["id"]) == (0, 1, "7")
    assert first["label"] == second["label"]


def test_columns_by_name(run: Run, bert: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.tsv"
    source.write_text('q1\tq2\tgold\nthe film\t"bad\talarm\n', encoding="utf-8")
    options = ["--text-column", "q1", "--text-pair-column", "q2", "--no-quotes", "--with-text"]
    result = run(bert, "--input", source, *options, "--label-column", "gold", "--metrics")
    (record,) = result.records
    assert (record["text"], record["text_pair"]) == ("the film", '"bad')
    assert "accuracy" in result.err
    check_refused(run(bert, "--input", source), 'no column "text"', "--text-column")


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.tsv", "out.parquet"])
def test_the_same_rows_in_every_format(run: Run, bert: Path, tmp_path: Path, name: str) -> None:
    source = write_lines(tmp_path / "in.jsonl", *({"text": t, "id": t[:3]} for t in TEXTS))
    expected = [
        (r["index"], r["id"], r["label"], r["score"], r["exit"])
        for r in run(bert, "--input", source, "--quiet").records
    ]
    output = tmp_path / name
    assert run(bert, "--input", source, "--output", output, "--quiet").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.jsonl", name])
    found: list[Any]
    if output.suffix == ".parquet":
        found = parquet.read_table(output).to_pylist()
    elif output.suffix == ".jsonl":
        found = [json.loads(line) for line in output.read_text().splitlines()]
    else:
        with output.open(newline="") as stream:
            found = list(csv.DictReader(stream, delimiter="," if name == "out.csv" else "\t"))
    assert [
        (int(r["index"]), r["id"], r["label"], float(r["score"]), int(r["exit"])) for r in found
    ] == expected


def test_a_table_on_standard_output_is_the_table_in_a_file(
    run: Run, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", *({"text": t, "id": 1} for t in TEXTS))
    options = ["--input", source, "--with-text", "--all-scores", "--full-depth", "--quiet"]
    shown = run(engines["mpnet"], *options, "--output-format", "csv")
    run(engines["mpnet"], *options, "--output", tmp_path / "out.csv")
    assert shown.out == (tmp_path / "out.csv").read_text()
    assert shown.out.startswith("index,id,text,text_pair,labels,scores,exit,layer,truncated,all_s")


def test_output_to_something_that_is_not_a_file(run: Run, bert: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"text": "rain"})
    null = run(bert, "--input", source, "--output", "/dev/null", "--quiet")
    assert (null.code, null.err) == (0, "")
    assert not Path("/dev/null").is_file()
    assert len(run(bert, "--input", source, "--output", "-", "--quiet").records) == 1
    link, real = tmp_path / "link.jsonl", tmp_path / "real.jsonl"
    real.touch()
    link.symlink_to(real)
    run(bert, "--input", source, "--output", link, "--quiet")
    assert link.is_symlink()
    assert len(real.read_text().splitlines()) == 1


@pytest.mark.parametrize("output", [["--output", "/dev/full"], []])
def test_a_full_device(run: Run, bert: Path, tmp_path: Path, output: list[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"text": "rain"})
    if output:
        refused = run(bert, "--input", source, *output)
        check_refused(refused, "cannot write /dev/full: No space left on device")
        return
    code = "from fpabee.runtime.cli.run import main; main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, bert, "--input", source],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write standard output: No space left on device ->")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_is_one_line(
    run: Run, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"text": "rain"})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fpabee.runtime.files.writers.StreamWriter.write", interrupt)
    result = run(bert, "--input", source)
    assert (result.code, result.out, result.err) == (130, "", "interrupted\n")


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
    result = run(bert, "--input", source, "--on-error", "skip", *options)
    assert result.code == 0
    assert [record["index"] for record in result.records] == list(range(len(BAD)))
    bad = {1, 2, 6} | ({4, 5} if metrics else set())
    for index, record in enumerate(result.records):
        assert ("error" in record) == (index in bad)
        if index in bad:
            assert f"line {index + 1}" in record["error"]
            assert record.keys() == {"index", "error"}
    assert "7 rows in" in result.err
    assert f"{len(bad)} rows could not be read: their records are errors" in result.err
    assert "mean depth" in result.err


def test_bad_rows_stop_a_run_unless_they_are_skipped(run: Run, bert: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text,id\nrain,1\nsun\n")
    check_refused(run(bert, "--input", source), "line 3 has 1 columns")
    check_refused(run(bert, "--input", source, "--on-error", "stop"), "line 3 has 1 columns")
    result = run(bert, "--input", source, "--on-error", "skip", "--output-format", "csv")
    assert result.out.splitlines()[2].startswith("1,,,,,,,")


def test_skipping_every_row_is_an_error(run: Run, bert: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"sentence": "a"}, {"sentence": "b"})
    output = tmp_path / "out.jsonl"
    result = run(bert, "--input", source, "--on-error", "skip", "--output", output, "--quiet")
    check_refused(result, "none of 2 rows could be read; the first:", "--text-column")
    assert len(output.read_text().splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_errors_of_the_whole_input_are_not_skipped(run: Run, bert: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("sentence\nrain\n")
    refused = run(bert, "--input", source, "--on-error", "skip")
    check_refused(refused, 'has no column "text"')


def test_multi_label_tables_need_a_separator_of_their_own(
    run: Run, engines: Mapping[str, Path], tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"text": "rain"})
    options = ["--input", source, "--output-format", "csv", "--quiet", "--full-depth"]
    refused = run(engines["mpnet"], *options, "--label-separator", "o")
    check_refused(refused, "the label 'food' contains 'o'", "--label-separator")
    assert run(engines["mpnet"], *options, "--label-separator", ";").code == 0


def test_two_runs_give_the_same_bytes(run: Run, bert: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(TEXTS[n % 4 :] * (n % 7 + 1))[n % 5 :]} for n in range(600)]
    source = write_lines(tmp_path / "in.jsonl", *rows)
    options = ["--rule", "entropy", "--threshold", "0.9", "--all-scores", "--quiet"]
    first, second = (run(bert, "--input", source, *options).out for _ in range(2))
    assert first == second
    assert len({json.loads(line)["exit"] for line in first.splitlines()}) > 1


def test_files_come_before_inputs(run: Run, bert: Path, tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    a, b, c, d = (tmp_path / f"{name}.txt" for name in "abcd")
    result = run(bert, "--input", c, b, "-", "--input", d, a, "--with-text", stdin=b"stdin\n")
    assert result.code == 0
    assert [record["text"] for record in result.records] == ["b", "stdin", "a", "c", "d"]
    assert "ENGINES [FILES]..." in run("--help").out


def test_nothing_to_classify_is_wrong_usage(run: Run, bert: Path) -> None:
    result = run(bert, "--quiet")
    assert (result.code, result.out) == (2, "")
    assert "or - for standard input" in result.err
