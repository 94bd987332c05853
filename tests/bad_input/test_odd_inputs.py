"""Inputs that look bad but are good: each row gives a record with its text, in order."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from fpabee.runtime import Engine

from .cases import Place, execute

MARK = b"\xef\xbb\xbf"


def gz(*texts: str) -> bytes:
    """Texts that are compressed one after another."""
    return b"".join(gzip.compress(text.encode()) for text in texts)


# By what is odd: lines of plain text.
LINES = {
    "right to left": ("الفيلم ليس سيئا", "הסרט לא רע film", "\u202enot bad\u202c"),
    "emoji": ("good \U0001f469\u200d\U0001f467 film", "\U0001f1ec\U0001f1e7" * 500),
    "combining characters": ("cafe\u0301", "e" + "\u0301" * 500),
    "other planes": ("𝒻𝒾𝓁𝓂 \U0010fffd", "\ufffe\uffff"),
    "other line ends": ("one\x85two\u2028three\u2029four\x0bfive\x0csix", "seven"),
    "empty lines": ("", "rain", "", ""),
    "only spaces": ("   ", "\t", "\u3000"),
    "control characters": ("a\0b", "\0\0\0", "the \x1b[31mfilm\x1b[0m", "\x01\x7f"),
    "a byte order mark within a line": ("the \ufefffilm", "\ufeffx"),
    "special tokens of the model": ("[CLS] the [SEP] film [PAD] [MASK] [UNK]",),
    "what looks like JSON": ('{"text": "not here"}', "[1, 2]", '"'),
    "one long word": ("x" * 10_000,),
    "a megabyte": ("the film is not bad " * 50_000, "rain"),
    "100,000 tokens": ("sun", " ".join(["rain"] * 100_000)),
}
# By what is odd: the name of a file, its content, and the texts that it holds.
FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    **{
        name: ("in.txt", "".join(text + "\n" for text in texts).encode(), texts)
        for name, texts in LINES.items()
    },
    "CRLF": ("in.txt", b"the film\r\n\r\nis bad\r\n", ("the film", "", "is bad")),
    "no line end at the end": ("in.txt", b"the film\nrain", ("the film", "rain")),
    "a byte order mark": ("in.txt", MARK + b"the film\n", ("the film",)),
    "a mark before JSON": ("in.jsonl", MARK + b'{"text": "rain"}\n', ("rain",)),
    "a mark before a quote": ("in.csv", MARK + b'"text"\n"rain"\n', ("rain",)),
    "a name with line ends": ("in\n\x1b.txt", b"rain\n", ("rain",)),
    "JSON with CRLF": ("in.jsonl", b'{"text": "a"}\r\n{"text": "b"}', ("a", "b")),
    "spaces in JSON": ("in.jsonl", b' \t{ "text" : "rain" } \n', ("rain",)),
    "a key twice in JSON": ("in.jsonl", b'{"text": "a", "text": "rain"}\n', ("rain",)),
    "escapes in JSON": (
        "in.jsonl",
        rb'{"text": "\u00e9\ud83d\udc69\u0000\u001b\"\\\/\r\n"}' + b"\n",
        ('é\U0001f469\0\x1b"\\/\r\n',),
    ),
    "gzip in parts": ("in.txt.gz", gz("a\nra", "in\n"), ("a", "rain")),
    "a cell with line ends": ("in.csv", b'text\r\n"the\r\nfilm"\r\n', ("the\r\nfilm",)),
    "other separators in a cell": ("in.csv", b"text,a\nx;y\tz|,1\n", ("x;y\tz|",)),
    "an empty cell": ("in.csv", b'text,a\n"",1\n,2\n', ("", "")),
    "empty lines in a table": ("in.csv", b"\n\ntext,\n\nrain,b\n\n", ("rain",)),
}


@pytest.fixture(scope="module")
def engine(engines: Mapping[str, Path]) -> Iterator[Engine]:
    with Engine.load(engines["bert"], threads=1) as engine:
        yield engine


@pytest.mark.parametrize("odd", FILES)
def test_an_odd_input_is_read(
    odd: str, place: Place, engine: Engine, capfd: pytest.CaptureFixture[str]
) -> None:
    name, content, texts = FILES[odd]
    arguments = ["--input", place.file(name, content), "--with-text", "--threads", 1, "--json"]
    outcome = execute(["run", place.shared["bert"], *arguments], place, capfd)
    assert outcome.code == 0, outcome.err
    # Not splitlines: texts hold other line ends.
    records = [json.loads(record) for record in outcome.out.split("\n")[:-1]]
    assert [record["index"] for record in records] == list(range(len(texts)))
    assert [record["text"] for record in records] == list(texts)
    expected = engine.predict(texts)
    assert [record["label"] for record in records] == [p.labels[0] for p in expected]
    truncated = [p.truncated for p in expected]
    assert [record.get("truncated", False) for record in records] == truncated
    summary = json.loads(outcome.err.splitlines()[-1])
    assert (summary["rows"], summary["errors"]) == (len(texts), 0)
    assert summary["empty"] == texts.count("")
    assert summary["truncated"] == sum(truncated)


DEEP = "[" * 99 + "]" * 99


@pytest.mark.parametrize("value", [DEEP, "1" * 4000, "-0.0", "1e-999", '"\\u0000"', "{}"])
@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_odd_values_are_passed_through(
    value: str, name: str, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    source = place.file("in.jsonl", f'{{"text": "rain", "x": {value}}}\n')
    output = place.root / name
    outcome = execute(place.run(source, "--output", output), place, capfd)
    assert (outcome.code, outcome.err) == (0, "")
    if name == "out.jsonl":
        assert json.loads(output.read_text())["x"] == json.loads(value)
