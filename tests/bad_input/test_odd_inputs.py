"""Inputs that look bad and are not: a record for each row, in order, of the text as it is meant."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from fpabee.runtime import Engine

from .cases import Place, run

MEGABYTE = "the film is not bad " * 50_000
TOKENS = " ".join(["rain"] * 100_000)


@dataclass(frozen=True)
class Odd:
    """One row of the table.

    Attributes:
        name: what is odd.
        file: the name of the file.
        content: what it holds.
        texts: the texts that it means.
        truncated: how many of them are longer than the model takes.
    """

    name: str
    file: str
    content: bytes
    texts: tuple[str, ...]
    truncated: int = 0


def lines(name: str, *texts: str, end: str = "\n", truncated: int = 0) -> Odd:
    """Plain texts."""
    content = "".join(text + end for text in texts).encode()
    return Odd(name, "in.txt", content, texts, truncated)


def objects(name: str, *texts: str, ascii_only: bool = False) -> Odd:
    """The same texts as JSON lines."""
    content = "".join(json.dumps({"text": t}, ensure_ascii=ascii_only) + "\n" for t in texts)
    return Odd(name, "in.jsonl", content.encode(), texts)


MARK = b"\xef\xbb\xbf"
CASES = [
    lines("right to left", "الفيلم ليس سيئا", "הסרט לא רע film", "\u202enot bad\u202c"),
    lines("emoji", "good \U0001f469\u200d\U0001f467 film", "\U0001f1ec\U0001f1e7" * 500),
    lines("combining characters", "cafe\u0301", "e" + "\u0301" * 500),
    lines("other planes", "𝒻𝒾𝓁𝓂 \U0010fffd", "\ufffe\uffff"),
    lines("other line ends within a line", "one\x85two\u2028three\u2029four\x0bfive\x0csix"),
    lines("CRLF", "the film", "", "is bad", end="\r\n"),
    lines("empty lines are empty texts", "", "rain", "", ""),
    lines("only an empty line", ""),
    lines("spaces alone", "   ", "\t", "\u3000"),
    lines("NUL bytes", "a\0b", "\0\0\0"),
    lines("control characters", "the \x1b[31mfilm\x1b[0m", "\x01\x7f"),
    lines("a byte order mark within", "the \ufefffilm", "\ufeff\ufeff"[1:] + "x"),
    lines("special tokens of the model", "[CLS] the [SEP] film [PAD] [MASK] [UNK]"),
    lines("what looks like JSON", '{"text": "not here"}', "[1, 2]", '"'),
    lines("a word without an end", "x" * 10_000),
    lines("a megabyte a line", MEGABYTE, "rain", truncated=1),
    lines("100,000 tokens", "sun", TOKENS, truncated=1),
    Odd("no line end at the end", "in.txt", b"the film\nrain", ("the film", "rain")),
    Odd("a byte order mark", "in.txt", MARK + b"the film\n", ("the film",)),
    Odd("a mark before JSON", "in.jsonl", MARK + b'{"text": "rain"}\n', ("rain",)),
    Odd("a mark before a table", "in.csv", MARK + b"text\nrain\n", ("rain",)),
    Odd("a mark before a quote", "in.csv", MARK + b'"text"\n"rain"\n', ("rain",)),
    Odd("a name without a suffix", "in", b"rain\n", ("rain",)),
    Odd("a name with line ends", "in\n\x1b.txt", b"rain\n", ("rain",)),
    Odd("JSON of CRLF", "in.jsonl", b'{"text": "a"}\r\n{"text": "b"}\r\n', ("a", "b")),
    Odd("JSON in spaces", "in.jsonl", b' \t{ "text" : "rain" } \n', ("rain",)),
    Odd("JSON without a line end", "in.jsonl", b'{"text": "rain"}', ("rain",)),
    Odd("a name twice in JSON", "in.jsonl", b'{"text": "a", "text": "rain"}\n', ("rain",)),
    Odd("JSON lines in gzip", "in.jsonl.gz", gzip.compress(b'{"text": "rain"}\n'), ("rain",)),
    Odd("gzip in parts", "in.txt.gz", gzip.compress(b"a\n") + gzip.compress(b"b\n"), ("a", "b")),
    Odd(
        "gzip cut within a line",
        "in.txt.gz",
        gzip.compress(b"ra") + gzip.compress(b"in"),
        ("rain",),
    ),
    Odd("cells over lines", "in.csv", b'text\r\n"the\r\nfilm"\r\n', ("the\r\nfilm",)),
    Odd("cells of other separators", "in.csv", b"text,a\nx;y\tz|,1\n", ("x;y\tz|",)),
    Odd("an empty cell", "in.csv", b'text,a\n"",1\n,2\n', ("", "")),
    Odd("a column without a name", "in.csv", b"text,\nrain,b\n", ("rain",)),
    Odd("empty lines in a table", "in.csv", b"\n\ntext\n\nrain\n\n", ("rain",)),
    objects("line ends in JSON", "the\nfilm\r\n", "\u2028"),
    objects("escapes in JSON", 'é\U0001f469\u200d\U0001f467\0\x1b"\\/', "\ufeff", ascii_only=True),
    objects("a megabyte in JSON", "x" * 2**20),
]


@pytest.fixture(scope="module")
def engine(engines: Mapping[str, Path]) -> Iterator[Engine]:
    with Engine.load(engines["bert"], threads=1) as engine:
        yield engine


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_odd_input_is_read(
    case: Odd, place: Place, engine: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    source = place.file(case.file, case.content)
    options = ("--with-text", "--threads", 1, "--json")
    outcome = run("run", [place.shared_engines(), "--input", source, *options], place, capfd)
    assert outcome.code == 0, outcome.err
    # Not splitlines: texts hold other line ends.
    records = [json.loads(record) for record in outcome.out.split("\n")[:-1]]
    assert [record["index"] for record in records] == list(range(len(case.texts)))
    assert [record["text"] for record in records] == list(case.texts)
    expected = engine.predict(case.texts)
    assert [record["label"] for record in records] == [p.labels[0] for p in expected]
    assert [record.get("truncated", False) for record in records] == [p.truncated for p in expected]
    summary = json.loads(outcome.err.splitlines()[-1])
    assert (summary["rows"], summary["errors"]) == (len(case.texts), 0)
    assert summary["empty"] == case.texts.count("")
    if case.truncated:
        assert summary["truncated"] == case.truncated


def test_many_columns_are_passed_through(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    names = [f"column {number}" for number in range(5000)]
    values = ["text", *map(str, range(5000))]
    table = place.file("in.csv", ",".join(["text", *names]) + "\n" + ",".join(values) + "\n")
    output = place.root / "out.jsonl"
    arguments = [place.shared_engines(), "--input", table, "--threads", 1, "--output", output]
    assert run("run", arguments, place, capfd).code == 0
    (line,) = output.read_text().splitlines()
    record = json.loads(line)
    assert [record[name] for name in names] == values[1:]


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("value", [deep(99), "1" * 4000, "-0.0", "1e-999", '"\\u0000"', "{}"])
@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_odd_values_are_passed_through(
    value: str, name: str, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    source = place.file("in.jsonl", f'{{"text": "rain", "x": {value}}}\n')
    arguments = [place.shared_engines(), "--input", source, "--threads", 1, "--quiet"]
    output = place.root / name
    outcome = run("run", [*arguments, "--output", output], place, capfd)
    assert (outcome.code, outcome.err) == (0, "")
    if name == "out.jsonl":
        assert json.loads(output.read_text())["x"] == json.loads(value)


FORMATS: list[tuple[str, Callable[[list[str]], bytes]]] = [
    ("in.txt", lambda texts: "".join(t + "\n" for t in texts).encode()),
    ("in.jsonl", lambda texts: "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()),
    ("in.csv", lambda texts: ("text\r\n" + "".join(f'"{t}"\r\n' for t in texts)).encode()),
    ("in.tsv", lambda texts: ("id\ttext\n" + "".join(f"1\t{t}\n" for t in texts)).encode()),
]


def test_every_format_gives_the_same_records(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = random.Random(7)
    alphabet = [
        "film",
        "rain",
        "عربى",
        "é",
        "\U0001f469\u200d\U0001f467",
        "\u200f",
        "\0",
        ";",
        "{",
        "'",
    ]
    texts = [" ".join(chosen.choices(alphabet, k=chosen.randint(1, 9))) for _ in range(64)]
    found = []
    for name, content in FORMATS:
        source = place.file(name, content(texts))
        arguments = [place.shared_engines(), "--input", source, "--threads", 1, "--quiet"]
        outcome = run("run", [*arguments, "--with-text"], place, capfd)
        assert outcome.code == 0, outcome.err
        records = [json.loads(line) for line in outcome.out.splitlines()]
        found.append([{k: v for k, v in record.items() if k != "id"} for record in records])
        assert [record["text"] for record in records] == texts
    assert found == [found[0]] * len(FORMATS)
