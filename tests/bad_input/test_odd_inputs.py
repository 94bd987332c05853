"""Inputs that look bad but are good: each row gives a record with its text, in order."""

from __future__ import annotations

import gzip
import json
import sys

import pytest

from fpabee.runtime import Engine

from .cases import Place, execute

MARK = b"\xef\xbb\xbf"


# Lines of plain text.
LINES = (
    *("الفيلم ليس سيئا", "הסרט לא רע film", "\u202enot bad\u202c"),
    *("good \U0001f469\u200d\U0001f467 film", "\U0001f1ec\U0001f1e7" * 500, "e" + "\u0301" * 500),
    *("𝒻𝒾𝓁𝓂 \U0010fffd", "\ufffe\uffff", "one\x85two\u2028three\u2029four\x0bfive\x0csix"),
    *("", "rain", "", "   ", "\t", "\u3000", "a\0b", "\0\0\0", "the \x1b[31mfilm\x1b[0m"),
    *("the \ufefffilm", "\ufeffx", "[CLS] the [SEP] film [PAD] [MASK] [UNK]"),
    *(
        '{"text": "not here"}',
        '"',
        "x" * 10_000,
        "the film is not bad " * 50_000,
        "rain " * 100_000,
    ),
)
# By what is odd: the name of a file, its content, and the texts that it holds.
FILES: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "lines": ("in.txt", "".join(text + "\n" for text in LINES).encode(), LINES),
    "marks and CRLF": ("in.txt", MARK + b"the film\r\n\r\nis bad", ("the film", "", "is bad")),
    "a mark before a quote": ("in.csv", MARK + b'"text"\n"rain"\n', ("rain",)),
    "a name with line ends": ("in\n\x1b.txt", b"rain\n", ("rain",)),
    "a mark, CRLF and spaces in JSON": (
        "in.jsonl", MARK + b'{"text": "a"}\r\n \t{ "text" : "b" } ', ("a", "b")
    ),
    "a key twice in JSON": ("in.jsonl", b'{"text": "a", "text": "rain"}\n', ("rain",)),
    "escapes in JSON": (
        "in.jsonl",
        rb'{"text": "\u00e9\ud83d\udc69\u0000\u001b\"\\\/\r\n"}' + b"\n",
        ('é\U0001f469\0\x1b"\\/\r\n',),
    ),
    "gzip in parts": ("in.txt.gz", gzip.compress(b"a\nra") + gzip.compress(b"in\n"), ("a", "rain")),
    "other separators in a cell": ("in.csv", b"text,a\nx;y\tz|,1\n", ("x;y\tz|",)),
}  # fmt: skip


@pytest.mark.parametrize("odd", FILES)
def test_an_odd_input_is_read(odd: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    name, content, texts = FILES[odd]
    arguments = [place.file(name, content), "--with-text", "--threads", 1, "--json"]
    outcome = execute(["run", place.shared["bert"], *arguments], place, capfd)
    assert outcome.code == 0, outcome.err
    # Not splitlines: texts hold other line ends.
    records = [json.loads(record) for record in outcome.out.split("\n")[:-1]]
    assert [record["index"] for record in records] == list(range(len(texts)))
    assert [record["text"] for record in records] == list(texts)
    with Engine.load(place.shared["bert"], threads=1) as engine:
        expected = engine.predict(texts)
    assert [record["label"] for record in records] == [p.labels[0] for p in expected]
    truncated = [p.truncated for p in expected]
    assert [record.get("truncated", False) for record in records] == truncated
    summary = json.loads(outcome.err.splitlines()[-1])
    assert (summary["rows"], summary["errors"]) == (len(texts), 0)
    assert summary["empty"] == texts.count("")
    assert summary["truncated"] == sum(truncated)


VALUES = ("[" * 99 + "]" * 99, "1" * 4000, "-0.0", "1e-999", '"\\u0000"', "{}")


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_odd_values_are_passed_through(
    name: str, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = "".join(f', "x{number}": {value}' for number, value in enumerate(VALUES))
    source = place.file("in.jsonl", f'{{"text": "rain"{fields}}}\n')
    output = place.root / name
    outcome = execute(place.run(source, "--output", output), place, capfd)
    if name == "out.csv" and sys.version_info < (3, 11):  # whose csv does not write NUL
        assert outcome.code == 1
        assert ".jsonl or .parquet" in outcome.err
        return
    assert (outcome.code, outcome.err) == (0, "")
    if name == "out.jsonl":
        record = json.loads(output.read_text())
        assert [record[f"x{n}"] for n in range(len(VALUES))] == [*map(json.loads, VALUES)]
