"""Files of texts and labels that cannot be read, or that hold what a command cannot use."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from fpabee.runtime.files import ReadOptions, Row
from fpabee.runtime.files.lines import MAX_LINE_BYTES
from fpabee.runtime.files.parquet import parquet_rows

from .cases import Arguments, Case, Make, Place, check, each


def given(name: str, content: bytes | str, *options: object) -> Make:
    """A file of texts."""
    return lambda place: place.run(place.file(name, content), *options)


def line(content: bytes | str, *options: object) -> Make:
    """A second line of JSON lines; the first is good."""
    raw = content.encode() if isinstance(content, str) else content
    return given("in.jsonl", b'{"text": "rain", "label": "music"}\n' + raw + b"\n", *options)


def labelled(label: object, name: str = "label") -> Make:
    return line(json.dumps({"text": "sun", name: label}), "--metrics")


def piped(content: bytes, *options: object) -> Make:
    def make(place: Place) -> Arguments:
        place.stdin = content
        return place.run("-", *options)

    return make


def table(*columns: Any, names: tuple[str, ...] = ("text", "x", "y")) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=names[: len(columns)]), out)
    return out.getvalue()


ENCODINGS = [
    Case("Latin-1", given("in.txt", b"a\nb\xe9\n"), "in.txt, line 2", "0xe9", "column 2"),
    Case("UTF-16", given("in.csv", "text\na\n".encode("utf-16")), "in.csv", "UTF-8"),
    Case("gzip without its name", given("in.txt", gzip.compress(b"a\n")), "in.txt", ".gz"),
]  # fmt: skip

JSON = [
    Case("an empty line", line(""), "in.jsonl, line 2", "JSON"),
    Case("an array", line('[{"text": "a"}]'), "line 2", "jq -c '.[]'"),
    Case("an object over several lines", given("in.json", '{\n"text": "a"\n}\n'), "jq -c . IN"),
    Case("half of a surrogate pair", line(r'{"text": "\ud800"}'), "line 2", "surrogate"),
    Case("NaN", line('{"text": "a", "x": NaN}'), "line 2"),
    Case("deep JSON", line('{"text": "a", "x": ' + "[" * 9999 + "]" * 9999 + "}"),
         "line 2", "recursion"),
    Case("no text", line('{"body": "a"}'), "line 2", '"text"', "--column text=NAME"),
    Case("a text that is a number", line('{"text": 5}'), "line 2", '"text"'),
]  # fmt: skip

TABLES = [
    Case("no text column", given("in.csv", "sentence,label\na,b\n"),
         "in.csv, line 1", '"text"', "sentence, label", "--column text=NAME"),
    Case("20,000 columns", given("in.csv", ",".join(map(str, range(20_000))) + "\na\n"), "19999"),
    Case("escape codes in a column name", given("in.csv", "te\x1b[31mxt\na\n"), r"te\x1b[31mxt"),
    Case("semicolons", given("in.csv", "text;label\na;b\n"), "text;label"),
    Case("an open quote", given("in.csv", 'text,id\n"a,1\nb\n'), "line 2", "line 3", '""'),
    Case("a quote in a quoted cell", given("in.csv", 'text\n"a "b" c"\n'), "line 2", '""'),
    Case("lines of an old Mac", given("in.csv", "text,id\ra,1\rb,2\r"), r"tr '\r' '\n'"),
    Case("no label column", given("in.csv", "text\na\n", "--column", "label=gold"), '"gold"'),
]  # fmt: skip

LABELLED = [
    Case("an unknown label", labelled("jazz"), "line 2", "'jazz'", "music, weather, alarm, travel"),
    Case("two labels", labelled(["music", "alarm"], "labels"), "line 2", "2 labels"),
    Case("a label that is an object", labelled({"a": 1}), "line 2", '"label"'),
]

EMPTY = [
    Case("an empty file", given("in.txt", b"\xef\xbb\xbf"), "in.txt"),
    Case("an empty pipe", piped(b""), "standard input"),
    Case("columns of a piped text", piped(b"a\n", "--column", "text=body"), "--input-format"),
]  # fmt: skip

ONE = pyarrow.array(["rain"])
FAR = pyarrow.array([2**31 - 1], pyarrow.int32()).view(pyarrow.date32())
FILES = [
    Case("a line over 16 MiB", given("in.txt", b"a" * (MAX_LINE_BYTES + 1)), "line 1", "16 MiB"),
    Case("a quote that is open for 16 MiB",
         given("in.csv", b'text\n"' + (b"b" * 1023 + b"\n") * 2**14), "line 2"),
    Case("gzip cut short", given("in.txt.gz", gzip.compress(b"a\n" * 99)[:-12]), "in.txt.gz"),
    Case("not Parquet", given("in.parquet", b"PAR1" + bytes(99) + b"PAR1"), "in.parquet"),
    Case("Parquet in a pipe", piped(b"PAR1", "--input-format", "parquet"), "standard input"),
    Case("Parquet without the column", given("in.parquet", table(ONE, names=("body",))),
         '"text"', "body"),
    Case("Parquet of numbers", given("in.parquet", table(pyarrow.array([1]))), "row 1", '"text"'),
    Case("Parquet with a column twice", given("in.parquet", table(ONE, ONE, names=("text",) * 2)),
         '"text"'),
    Case("a Parquet column whose name is no text",
         given("in.parquet", table(ONE, ONE).replace(b"x", b"\xfc")), "in.parquet"),
    Case("a date that Python has not", given("in.parquet", table(ONE, FAR)), "row 1", '"x"',
         "date32[day]"),
    Case("no file", lambda p: p.run(p.root / "a\nb.txt"), r"a\nb.txt"),
    Case("a folder", lambda p: p.run(p.root), ".txt"),
    Case("an unknown suffix", given("in.xls", "a\n"), ".xls"),
    Case("a name that is too long", lambda p: p.run("a" * 300), "File name too long"),
    Case("a device that cannot be read", lambda p: p.run("/proc/self/mem"), "/proc/self/mem"),
    Case("standard input twice", lambda p: p.run("-", "-"), "standard input"),
]  # fmt: skip


def query(content: object, *options: object) -> Make:
    """A second line of queries; the first is good."""

    def make(place: Place) -> Arguments:
        text = content if isinstance(content, str) else json.dumps(content)
        source = place.file("in.jsonl", '{"query": "rain", "documents": ["sun"]}\n' + text + "\n")
        return place.run(source, *options, folder=place.rankers["bert"])

    return make


def too_many_tokens(place: Place) -> Arguments:
    place.patch.setattr("fpabee.runtime.core._QUERY_BYTES", 2**16)
    return query({"query": "rain", "documents": ["sun"] * 500})(place)


GOOD = {"query": "rain", "documents": ["sun", "film"]}
QUERIES = [
    Case("no query", query({"documents": ["sun"]}), "line 2", '"query"', "--column text=NAME"),
    Case("no documents", query({"query": "rain"}), "line 2", "'documents'"),
    Case("documents that are one text", query({"query": "rain", "documents": "sun"}), "line 2",
         "'documents'"),
    Case("a document that is a number", query({"query": "rain", "documents": ["sun", 5]}),
         "line 2", "'documents'"),
    Case("scores of another length", query(GOOD | {"scores": [1.0]}), "line 2", "1 values",
         "'scores'", "2 documents"),
    Case("a score that is no number", query(GOOD | {"scores": [1.0, "2"]}), "line 2", "'2'"),
    Case("an infinite score", query('{"query": "a", "documents": ["b"], "scores": [1e999]}'),
         "line 2", "out of range"),
    Case("too many tokens in a query", too_many_tokens, "line 2", "500 documents", "tokens",
         "--max-length"),
    Case("plain texts for a ranker",
         lambda p: p.run_texts(folder=p.rankers["bert"]), "texts.txt", "no columns", ".jsonl"),
    Case("queries for a classifier", given("in.jsonl", json.dumps(GOOD)), "line 1 is a query"),
    Case("rankings as CSV", query(GOOD, "--output", "out.csv"), "out.csv", ".jsonl"),
    Case("rankings as Parquet", query(GOOD, "--output", "out.parquet"), "out.parquet", ".jsonl"),
]  # fmt: skip

USAGE = [
    *(
        Case(
            f"{' '.join(option)} for rankings",
            query(GOOD, *option),
            option[0],
            "ranks documents",
            code=2,
        )
        for option in (
            ("--metrics",),
            ("--scores",),
            ("--rule", "threshold=1"),
            ("--column", "label=kind"),
            ("--column", "text_pair=kind"),
        )
    ),
    Case("an unknown format", given("in.txt", "", "--input-format", "xml"), "'xml'", code=2),
    Case("no input", lambda p: ["run", p.shared["bert"]], "standard input", code=2),
    Case("a column twice", given("in.csv", "", "--column", "label=text"), "text", code=2),
]


# A command, and what follows its engines folder, at last the option for the file.
READERS = [
    "calibrate --data",
    "calibrate --data dev.jsonl --test",
    "build onnxruntime-int8 --texts",
]


def read_by(reader: str, bad: str) -> Make:
    """A file without texts, or none, for another command."""

    def make(place: Place) -> Arguments:
        place.file("in.csv", "body\na\n")
        place.file("dev.jsonl", '{"text": "a", "label": "b"}\n')
        place.patch.chdir(place.root)
        command, *options = reader.split()
        return [command, place.shared["bert"], *options, bad, "--quiet"]

    return make


OTHER_COMMANDS = [
    Case(f"{reader} {bad}", read_by(reader, bad), bad)
    for reader in READERS
    for bad in ("in.csv", "none.txt")
]


@each(OTHER_COMMANDS, ENCODINGS, JSON, TABLES, LABELLED, EMPTY, FILES, QUERIES, USAGE)
def test_a_bad_input(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    # Otherwise the rows before the bad one would be printed first.
    place.patch.setattr("fpabee.runtime.files.run.BLOCK_ROWS", 2**20)
    check(case, place, capfd)


def test_a_gzip_bomb_takes_little_memory(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    case = Case("a bomb", given("in.txt.gz", gzip.compress(bytes(2**28))), "line 1", "16 MiB")
    tracemalloc.start()
    try:
        check(case, place, capfd)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**27


@pytest.mark.parametrize("column", ["text", "x"])
def test_a_long_text_that_parquet_holds_once(place: Place, column: str) -> None:
    rows = 2000
    long = "a" * 2**20
    repeated = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([long])
    )
    path = place.root / "in.parquet"
    content = {"text": ["rain"] * rows} | {column: repeated}
    parquet.write_table(pyarrow.table(content), path, store_schema=False)
    assert path.stat().st_size < 10**5
    before = pyarrow.total_allocated_bytes()
    first = next(parquet_rows(path, ReadOptions()))
    assert isinstance(first, Row)
    assert (first.text if column == "text" else first.fields["x"]) == long
    assert pyarrow.total_allocated_bytes() - before < 32 * 2**20


def test_many_texts_of_a_row_group_are_not_held_at_once(place: Place) -> None:
    path = place.root / "in.parquet"
    texts = [f"{number} {'a' * 400}" for number in range(40_000)]
    parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd")
    before = pyarrow.total_allocated_bytes()
    most = 0
    for number, row in enumerate(parquet_rows(path, ReadOptions()), start=1):
        assert isinstance(row, Row)
        if number % 1024 == 0:
            most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 8 * 2**20
