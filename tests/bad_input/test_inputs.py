"""Files of texts and labels that cannot be read, or hold what a command cannot use."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from fpabee.runtime.files.lines import MAX_LINE_BYTES

from .cases import Arguments, Case, Place, check

ARRAY = "jq -c '.[]' IN > OUT"
NO_ROWS = "has no rows -> give a file with at least one line"
QUOTES = 'write a quote in a quoted cell twice (""), or give --no-quotes'
LABELS = "the model's labels are: music, weather, alarm, travel"


def run(place: Place, source: object, *options: object) -> Arguments:
    return [place.shared_engines(), "--input", source, "--threads", 1, "--quiet", *options]


def given(name: str, content: bytes | str, *options: object) -> Callable[[Place], Arguments]:
    """A file of texts for fpabee-run."""
    return lambda place: run(place, place.file(name, content), *options)


def text(content: bytes | str, *options: object) -> Callable[[Place], Arguments]:
    return given("in.txt", content, *options)


def line(content: bytes | str, *options: object) -> Callable[[Place], Arguments]:
    """A second line of a file of JSON lines; the first is good."""
    raw = content.encode() if isinstance(content, str) else content
    return given("in.jsonl", b'{"text": "rain", "label": "music"}\n' + raw + b"\n", *options)


def labelled(label: object, name: str = "label") -> Callable[[Place], Arguments]:
    return line(json.dumps({"text": "sun", name: label}), "--metrics")


def table(content: bytes | str, *options: object) -> Callable[[Place], Arguments]:
    return given("in.csv", content, *options)


def named(name: str, *options: object) -> Callable[[Place], Arguments]:
    """A path that nothing was written to."""
    return lambda place: run(place, place.root / name, *options)


def piped(content: bytes, *options: object) -> Callable[[Place], Arguments]:
    def make(place: Place) -> Arguments:
        place.stdin = content
        return run(place, "-", *options)

    return make


def columns(*options: object, **values: object) -> Callable[[Place], Arguments]:
    """A Parquet file."""

    def make(place: Place) -> Arguments:
        path = place.root / "in.parquet"
        parquet.write_table(pyarrow.table(values), path)
        return run(place, path, *options)

    return make


def twice(name: str) -> Callable[[Place], Arguments]:
    def make(place: Place) -> Arguments:
        path = place.root / "in.parquet"
        values = [pyarrow.array(["a"])] * 3
        parquet.write_table(pyarrow.Table.from_arrays(values, names=["text", name, "x"]), path)
        return run(place, path)

    return make


def link_to_itself(place: Place) -> Arguments:
    path = place.root / "in.txt"
    path.symlink_to(path)
    return run(place, path)


def refused_by_the_system(place: Place) -> Arguments:
    """What a user without the right to search the folder gets: root may search any."""
    path = Path("/closed/in.txt")
    stat = os.stat

    def refuse(file: object, *arguments: object, **options: object) -> os.stat_result:
        if file == path:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(file, *arguments, **options)  # type: ignore[arg-type]

    place.patch.setattr(os, "stat", refuse)
    return run(place, path)


ENCODINGS = [
    Case("Latin-1", text("é\n".encode("latin-1")), ("line 1 is not UTF-8: byte 0xe9", "iconv -f")),
    Case("Latin-1 later", text(b"a\nb\xe9\n"), ("line 2 is not UTF-8", "at column 2")),
    Case("UTF-16", text("one\n".encode("utf-16")), ("the file is UTF-16", "iconv -f UTF-16 -t")),
    Case("UTF-16, big-endian", text(b"\xfe\xff\0a\0\n"), ("the file is UTF-16", "-f UTF-16")),
    *(
        Case(
            f"UTF-16{order} without a mark {name}",
            given(name, content.encode(f"utf-16-{order}"), *options),
            (f"{name}, line 1 is UTF-16 without a byte order mark", f"iconv -f UTF-16{order}"),
        )
        for order in ("LE", "BE")
        for name, content, options in [
            ("in.txt", "ok\r\nno\n", ()),
            ("in.txt", "for skipped rows\n\n", ("--on-error", "skip")),
            ("in.csv", "text,label\na,b\n", ()),
            ("in.jsonl", '{"text": "a"}\n', ()),
        ]
    ),
    Case(
        "UTF-16 of which rows are skipped",
        text("a\nb\n".encode("utf-16"), "--on-error", "skip"),
        ("the file is UTF-16",),
    ),
    Case("UTF-16 in a table", table("text\na\n".encode("utf-16")), ("the file is UTF-16",)),
    Case("UTF-16 in JSON", given("in.jsonl", '{"text": "a"}\n'.encode("utf-16")), ("is UTF-16",)),
    Case("a raw surrogate", text(b"\xed\xa0\x80\n"), ("line 1 is not UTF-8: byte 0xed",)),
    Case("half a character", text("日".encode()[:2]), ("line 1 is not UTF-8",)),
    Case("a header in Latin-1", table(b"te\xe9xt\na\n"), ("in.csv, line 1 is not UTF-8",)),
    Case("bytes", text(bytes(range(256)) * 9), ("is not UTF-8",)),
    Case("gzip without its name", text(gzip.compress(b"a\n")), ("the file is gzip", ".gz")),
    Case("a spreadsheet", table(b"PK\x03\x04\x14\0\xff\n"), ("such as .xlsx", "as .csv")),
    Case("Parquet without its name", text(b"PAR1\x15\xff\n"), ("is Parquet", ".parquet")),
]

JSON = [
    Case("an empty line", line(""), ("line 2 is empty", 'a JSON object with a "text" field')),
    Case("a line of spaces", line("   "), ("line 2 is empty",)),
    Case("a plain text", line("plain"), ("line 2 is not JSON", 'such as {"text": "..."}')),
    Case("JSON cut short", line('{"text": "cut'), ("line 2 is not JSON",)),
    Case("two objects a line", line('{"text": "a"} {"text": "b"}'), ("line 2 is not JSON",)),
    Case("an array", line('[{"text": "a"}]'), ("line 2 is an array, not an object", ARRAY)),
    Case("a file that is one array", given("in.json", '[\n{"text": "a"}\n]\n'),
         ("over several lines", ARRAY)),
    Case("an object over lines", given("in.json", '{\n"text": "a"\n}\n'), ("lines", "jq -c . IN")),
    Case("a string", line('"a"'), ('line 2 has no string field "text"',)),
    Case("null", line("null"), ('line 2 has no string field "text"',)),
    Case("NUL bytes", line(b"\0" * 9), ("line 2 is not JSON",)),
    Case("a lone surrogate", line(r'{"text": "\ud800"}'), ("half of a surrogate pair", r"\ufffd")),
    Case("a low surrogate", line(r'{"text": "\udc00 a"}'), ("half of a surrogate pair",)),
    Case("a surrogate in a name", line(r'{"text": "a", "\ud83d": 1}'), ("surrogate pair",)),
    Case("NaN", line('{"text": "a", "x": NaN}'), ("NaN and Infinity", "write null")),
    Case("an infinity", line('{"text": "a", "x": [-Infinity]}'), ("NaN and Infinity",)),
    Case("1e999", line('{"text": "a", "x": 1e999}'), ("line 2 is not JSON", "out of range")),
    Case("5000 digits", line('{"text": "a", "x": ' + "9" * 5000 + "}"), ("out of range",)),
    Case("deep JSON", line('{"text": "a", "x": ' + "[" * 100_000), ("line 2 is not JSON",)),
    Case("closed deep JSON", line('{"text": "a", "x": ' + "[" * 9999 + "]" * 9999 + "}"),
         ("line 2 is not JSON",)),
    Case("no text", line('{"sentence": "a"}'), ('has no string field "text"', "--text-column")),
    Case("a text of another name", line('{"text": "a"}', "--text-column", "body"),
         ('line 1 has no string field "body"',)),
    Case("a text that is a number", line('{"text": 5}'), ('no string field "text"',)),
    Case("a text that is null", line('{"text": null}'), ('no string field "text"',)),
    Case("a text that is a list", line('{"text": ["a"]}'), ('no string field "text"',)),
    Case("a pair that is a number", line('{"text": "a", "text_pair": 5}'), ('"text_pair" is a',)),
    Case("a name beyond any line", line('{"text": "a"}', "--text-column", "x\n" * 9999),
         (r'no string field "x\nx\n',)),
]  # fmt: skip

TABLES = [
    Case("no text column", table("sentence,label\na,b\n"),
         ('line 1 has no column "text"; it has: sentence, label', "--text-column")),
    Case("another case", table("Text\na\n"), ('no column "text"; it has: Text',)),
    Case("a text column that is not there", table("text\na\n", "--text-column", "body"),
         ('no column "body"', "--text-column")),
    Case("20,000 columns", table(",".join(map(str, range(20_000))) + "\na\n"),
         ("it has: 0, 1, 2", "19999")),
    Case("a name of a megabyte", table("x" * 2**20 + "\na\n"), ("it has: xxx", "xxx ->")),
    Case("a line end in a name", table('"a\nb",c\na,b\n'), (r"it has: a\nb, c",)),
    Case("escape codes in a name", table("te\x1b[31mxt,b\na,b\n"), (r"te\x1b[31mxt",)),
    Case("NUL in a name", table("te\0xt\na\n"), (r"te\x00xt",)),
    Case("a header twice", table("text,text\na,b\n"), ('names the column "text" twice',)),
    Case("nameless columns", table("text,,\na,b,c\n"), ('names the column "" twice',)),
    Case("a header line again", table("text,label\na,music\ntext,label\n", "--metrics"),
         ("line 3 has label 'label'",)),
    Case("semicolons", table("text;label\na;b\n"), ("separated by semicolons", "with commas")),
    Case("quoted semicolons", table('"text";"label"\n"a";"b"\n'), ("separated by semicolons",)),
    Case("semicolons, as a spreadsheet has them", table("sep=;\ntext;label\na;b\n"),
         ("separated by semicolons",)),
    Case("tabs in .csv", table("text\tlabel\na\tb\n"), ("by tabs: text\\tlabel", ".tsv")),
    Case("commas in .tsv", given("in.tsv", "text,label\na,b\n"), ("separated by commas", ".csv")),
    Case("an open quote", table('text,id\n"a,1\nb,2\n'), ("line 2 (up to line 4)", QUOTES)),
    Case("an open quote in the header", table('"text,id\na,1\n'), ("line 1 (up to", QUOTES)),
    Case("a quote in a quoted cell", table('text\n"a "b" c"\n'), ("line 2 is not a row", QUOTES)),
    Case("lines of an old Mac", table("text,id\ra,1\rb,2\r"), ("no line end", r"tr '\r' '\n'")),
    Case("too few cells", table("text,id\na,1\nb\n"), ("line 3 has 1 columns, the header has 2",)),
    Case("too many cells", table("text,id\na, b,1\n"), ("line 2 has 3 columns", "quote cells")),
    Case("a label column that is not there", table("text\na\n", "--label-column", "gold"),
         ('has no column "gold"', "--label-column")),
    Case("a pair column that is not there", table("text\na\n", "--text-pair-column", "b"),
         ('has no column "b"', "--text-pair-column")),
    Case("prose as a table", given("in.txt", "Well, no.\n", "--input-format", "csv"),
         ('no column "text"; it has: Well,  no.',)),
]  # fmt: skip

LABELLED = [
    Case("an unknown label", labelled("jazz"), ("line 2 has label 'jazz'", LABELS)),
    Case("a label that is a number", labelled(1), ("line 2 has label '1'", LABELS)),
    Case("an empty label", labelled(""), ("line 2 has label ''", LABELS)),
    Case("a label of a megabyte", labelled("x" * 2**20), ("line 2 has label 'xxx", LABELS)),
    Case("a label with escape codes", labelled("a\x1b[31m\n"), (r"a\x1b[31m\n",)),
    Case("a label that is a list", labelled(["music"]), ('"label" is not a name',)),
    Case("a label that is an object", labelled({"a": 1}), ('"label" is not a name',)),
    Case("no label", line('{"text": "a"}', "--metrics"), ("line 2 has no label", "--metrics")),
    Case("a label that is null", labelled(None), ("line 2 has no label",)),
    Case("two labels", labelled(["music", "alarm"], "labels"), ("line 2 has 2 labels",)),
    Case("no labels in the list", labelled([], "labels"), ("line 2 has 0 labels",)),
    Case("labels that are one name", labelled("music", "labels"), ('"labels" is not a list',)),
    Case("labels that are lists", labelled([["music"]], "labels"), ('"labels" is not a list',)),
    Case("labels that are null", labelled([None], "labels"), ('"labels" is not a list',)),
]

EMPTY = [
    Case("an empty file", text(""), (NO_ROWS,)),
    Case("a byte order mark alone", text(b"\xef\xbb\xbf"), (NO_ROWS,)),
    Case("empty JSON lines", given("in.jsonl", ""), (NO_ROWS,)),
    Case("a mark alone in JSON lines", given("in.jsonl", b"\xef\xbb\xbf"), (NO_ROWS,)),
    Case("JSON of empty lines", given("in.jsonl", "\n\n"), ("line 1 is empty",)),
    Case("a table of empty lines", table("\n\n\n"), (NO_ROWS,)),
    Case("a header alone", table("text,label\n\n\n"), (NO_ROWS,)),
    Case("nothing in gzip", given("in.txt.gz", gzip.compress(b"")), (NO_ROWS,)),
    Case("an empty .gz", given("in.txt.gz", b""), (NO_ROWS,)),
    Case("Parquet without rows", columns(text=[]), ("in.parquet has no rows",)),
    Case("two empty files", lambda p: run(p, p.file("a.txt", ""), "--input", p.file("b.txt", "")),
         ("a.txt has no rows (nor have the 1 others)",)),
    Case("columns of a piped text", piped(b"body\na\n", "--text-column", "body"),
         ("standard input looks like plain text, which has no columns", "--input-format, such as")),
    Case("an empty pipe", piped(b""), (f"standard input {NO_ROWS}",)),
]  # fmt: skip

LONG = b"a" * (MAX_LINE_BYTES + 1)
FILES = [
    Case("a line over 16 MiB", text(LONG + b"\n"), ("line 1 is longer than 16 MiB", "split it")),
    Case("a row over 16 MiB", table(b"text\n" + LONG), ("line 2 is longer than 16 MiB",)),
    Case("a quote open for 16 MiB", table(b'text\n"' + (b"b" * 1023 + b"\n") * 2**14),
         ("line 2 begins a row of more than", "close the quote")),
    Case("not gzip", given("in.txt.gz", "plain\n"), ("cannot be read", "copy the file again")),
    Case("gzip cut short", given("in.txt.gz", gzip.compress(b"a\n" * 99)[:-12]),
         ("cannot be read", "copy the file again")),
    Case("gzip with another checksum", given("in.txt.gz", gzip.compress(b"a\n")[:-8] + b"\0" * 8),
         ("cannot be read", "copy the file again")),
    Case("gzip with a wrong block", given("in.txt.gz", gzip.compress(b"a\n")[:10] + b"\xff" * 9),
         ("cannot be read", "copy the file again")),
    Case("gzip and more", given("in.txt.gz", gzip.compress(b"a\n") + b"more"), ("cannot be read",)),
    Case("gzip of gzip", given("in.txt.gz", gzip.compress(gzip.compress(b"a\n"))), ("is gzip",)),
    Case("not Parquet", given("in.parquet", "plain\n"), ("cannot be read as Parquet",)),
    Case("empty Parquet", given("in.parquet", b""), ("cannot be read as Parquet",)),
    Case("Parquet of zeros", given("in.parquet", b"PAR1" + bytes(99) + b"PAR1"), ("as Parquet",)),
    Case("Parquet in gzip", given("in.parquet.gz", b""), ("needs a plain file",)),
    Case("Parquet in a pipe", piped(b"PAR1", "--input-format", "parquet"), ("needs a plain file",)),
    Case("Parquet without the column", columns(body=["a"]), ('no column "text"; it has: body',)),
    Case("Parquet of numbers", columns(text=[1, 2]), ('"text" is int64, not a string',)),
    Case("Parquet with a column twice", twice("text"), ('names the column "text" twice',)),
    Case("Parquet with another column twice", twice("x"), ('names the column "x" twice',)),
    Case("Parquet with a day beyond any", columns(text=["a"], day=pyarrow.array([2**30], "date32")),
         ("holds a date32[day] that cannot be read",)),
    Case("Parquet with a null", columns(text=["a", None]), ("row 2 has no string field",)),
    Case("Parquet with a list of nulls", columns("--metrics", text=["a"], labels=[[None]]),
         ('"labels" is not a list of names',)),
    Case("no file", named("none.txt"), ("none.txt does not exist", "- for stdin")),
    Case("a file below a file", lambda p: run(p, p.texts() / "in.txt"), ("does not exist",)),
    Case("a folder", lambda p: run(p, p.root), ("is a folder", "give a .txt")),
    Case("a name that is too long", named("a" * 300 + ".txt"), ("File name too long", "the path")),
    Case("a name with a line end", named("a\nb.txt"), (r"a\nb.txt does not exist",)),
    Case("a name that is no text", named("a\udcff.txt"), (r"a\udcff.txt does not exist",)),
    Case("no name", lambda p: run(p, ""), ("is a folder",)),
    Case("a link to itself", link_to_itself, ("in.txt does not exist",)),
    Case("a folder that may not be searched", refused_by_the_system, ("Permission denied",)),
    Case("a device that cannot be read", lambda p: run(p, "/proc/self/mem"), ("cannot be read",)),
    Case("a device without an end", lambda p: run(p, "/dev/zero"), ("is longer than 16 MiB",)),
    Case("a second file that is not there", lambda p: run(p, p.texts(), "--input", "none.txt"),
         ("none.txt does not exist",)),
    Case("standard input twice", lambda p: run(p, "-", "--input", "-"), ("given twice", "once")),
    Case("standard input that is an array", piped(b'[{"text": "a"}]\n'), ("an array", ARRAY)),
    Case("standard input that is an array over lines", piped(b'[\n{"text": "a"}\n]\n'), (ARRAY,)),
    Case("standard input in bad JSON", piped(b'{"text": "a"}\n{\n'), ("standard input, line 2",)),
    Case("an unknown suffix", given("in.xls", "a\n"), ("the format from '.xls'", "rename")),
    Case("another packer", given("in.txt.bz2", "a\n"), ("the format from '.bz2'",)),
    Case("texts said to be JSON", given("in.txt", "rain\n", "--input-format", "jsonl"),
         ("line 1 is not JSON",)),
    Case("texts said to be Parquet", given("in.txt", "rain\n", "--input-format", "parquet"),
         ("cannot be read as Parquet",)),
]  # fmt: skip

USAGE = [
    Case("an unknown format", given("in.txt", "a\n", "--input-format", "xml"), ("'xml'",), code=2),
    Case("no input", lambda p: [p.shared_engines()], ("no input",), code=2),
    Case(
        "a column for two",
        table("text\na\n", "--label-column", "text"),
        ("different columns",),
        code=2,
    ),
]


@pytest.mark.parametrize(
    "case",
    [*ENCODINGS, *JSON, *TABLES, *LABELLED, *EMPTY, *FILES, *USAGE],
    ids=lambda case: case.name,
)
def test_a_bad_input(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    # Rows before the bad one would be printed first.
    place.patch.setattr("fpabee.runtime.files.job.BLOCK_ROWS", 2**20)
    check(case, place, capfd)


def test_a_gzip_bomb_takes_little_memory(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    case = Case("a bomb", given("in.txt.gz", gzip.compress(bytes(2**28))), ("longer than 16 MiB",))
    tracemalloc.start()
    try:
        check(case, place, capfd)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**27


def data(name: str, content: bytes | str) -> Callable[[Place], Path]:
    return lambda place: place.file(name, content)


# The same of every command that reads texts: what is wrong, the file, and what the line says.
ANYWHERE: list[tuple[str, Callable[[Place], object], tuple[str, ...]]] = [
    ("Latin-1", data("in.jsonl", b'{"text": "\xe9"}\n'), ("in.jsonl, line 1 is not UTF-8",)),
    ("UTF-16", data("in.csv", "text\na\n".encode("utf-16")), ("the file is UTF-16",)),
    ("an array", data("in.json", '[{"text": "a"}]'), ("is an array", ARRAY)),
    ("no text", data("in.csv", "body\na\n"), ('has no column "text"; it has: body', "rename it")),
    ("empty", data("in.txt", ""), (NO_ROWS,)),
    ("not gzip", data("in.txt.gz", "plain\n"), ("cannot be read",)),
    ("not Parquet", data("in.parquet", "plain\n"), ("cannot be read as Parquet",)),
    ("an unknown suffix", data("in.xls", "a\n"), ("cannot tell the format from '.xls'",)),
    ("a folder", lambda place: place.root, ("is a folder",)),
    ("not there", lambda place: place.root / "none.txt", ("none.txt does not exist",)),
    ("a name that is too long", lambda place: "a" * 300, ("File name too long",)),
]
READERS: dict[str, tuple[str, Callable[[Place, object], Arguments]]] = {
    "calibrate": (
        "calibrate",
        lambda p, file: [p.shared_engines(), "--data", file, "--threads", 1, "--quiet"],
    ),
    "calibrate --test": (
        "calibrate",
        lambda p, file: [
            *(p.shared_engines(), "--data", p.file("dev.jsonl", '{"text": "a", "label": "b"}\n')),
            *("--test", file, "--threads", 1, "--quiet"),
        ],
    ),
    "bench": (
        "bench",
        lambda p, file: [p.shared_engines(), "--input", file, "--threads", 1, "--quiet"],
    ),
    "export --verify-data": (
        "export",
        lambda p, file: ["--from", p.shared_engines(), "--fp16", "--quiet", "--verify-data", file],
    ),
    "export --calibration-data": (
        "export",
        lambda p, file: [
            *("--from", p.shared_engines(), "--int8", "--quiet", "--calibration-data", file),
        ],
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("name", "make", "says"), ANYWHERE, ids=[row[0] for row in ANYWHERE])
def test_a_bad_input_of_another_command(
    reader: str,
    name: str,
    make: Callable[[Place], object],
    says: tuple[str, ...],
    place: Place,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command, arguments = READERS[reader]
    check(Case(name, lambda p: arguments(p, make(p)), says, command), place, capfd)
