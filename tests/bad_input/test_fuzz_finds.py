"""What `scripts/fuzz.py` found: files that gave a traceback, or took memory out of proportion."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from fpabee.runtime.artifact.folder import is_engines_folder, read_manifest
from fpabee.runtime.artifact.manifest import MANIFEST_NAME, TOKENIZER_NAME
from fpabee.runtime.encoding import TextEncoder
from fpabee.runtime.errors import ArtifactError
from fpabee.runtime.files import ReadOptions, Row, read_rows
from fpabee.runtime.files.parquet import parquet_rows

from .cases import Arguments, Case, Place, change_json, check, corrected

REFERENCE = "reference.npz"


def run(folder: Path, source: Path, *options: object) -> Arguments:
    return [folder, "--input", source, "--threads", 1, "--quiet", *options]


def manifest_with(field: bytes) -> Callable[[Place], Arguments]:
    """A manifest with a field that this version does not know."""

    def make(place: Place) -> Arguments:
        path = place.engines() / MANIFEST_NAME
        path.write_bytes(b'{"new": ' + field + b"," + path.read_bytes().lstrip()[1:])
        return run(path.parent, place.texts())

    return make


def reference_of(content: bytes) -> Callable[[Place], Arguments]:
    def make(place: Place) -> Arguments:
        folder = place.engines()
        (folder / REFERENCE).write_bytes(content)
        return run(corrected(folder, REFERENCE), place.texts(), "--check")

    return make


def archive(version: int = 20, header: bytes = b"") -> bytes:
    """A numpy archive of another version of the format, or with another header of its arrays."""
    array = io.BytesIO()
    np.save(array, np.zeros(3, np.float32))
    content = array.getvalue()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for name in ("texts.npy", "logits.npy"):
            new.writestr(name, content[:10] + header + content[10 + len(header) :])
    packed = bytearray(out.getvalue())
    packed[packed.index(b"PK\1\2") + 6] = version
    return bytes(packed)


def tokenizer_without(*path: str) -> Callable[[Place], Arguments]:
    """A tokenizer.json that lacks something."""

    def make(place: Place) -> Arguments:
        return run(damaged_tokenizer(place, *path), place.file("in.txt", "\u4e2d\n"))

    return make


def damaged_tokenizer(place: Place, *path: str) -> Path:
    def drop(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return changed_tokenizer(place, drop)


def changed_tokenizer(place: Place, change: Callable[[Any], object]) -> Path:
    folder = place.engines()
    change_json(folder / TOKENIZER_NAME, change)
    return corrected(folder, TOKENIZER_NAME)


def text_many_times(times: int) -> Callable[[Place], Arguments]:
    def repeat(content: Any) -> None:
        template = content["post_processor"]["single"]
        template += [{"Sequence": {"id": "A", "type_id": 0}}] * times

    return lambda place: run(
        changed_tokenizer(place, repeat), place.file("in.txt", "the film " * 40)
    )


def growing(place: Place) -> Arguments:
    """Three normalizers, each of which makes a thousand letters of one."""
    more = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    bomb = {"type": "Sequence", "normalizers": [more] * 3}
    return run(changed_tokenizer(place, lambda t: t.update(normalizer=bomb)), place.texts())


def table(columns: list[Any], names: list[str]) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=names), out)
    return out.getvalue()


def input_of(name: str, content: bytes) -> Callable[[Place], Arguments]:
    return lambda place: run(place.shared_engines(), place.file(name, content))


TEXTS = pyarrow.array(["rain"])
FAR = pyarrow.array([2**31 - 1], pyarrow.int32()).view(pyarrow.date32())
NOWHERE = pyarrow.array([0]).view(pyarrow.timestamp("us", "No/Where"))
DEEP = json.dumps({"text": "rain"})[:-1] + ', "more": ' + "[" * 900 + "]" * 900 + "}"

CASES = [
    Case("a number out of range in a new field", manifest_with(b"1e999"),
         ("manifest.json is damaged", "export the model again")),
    Case("bytes that are no text in a new field", manifest_with(b'"\xed\xa0\x80"'),
         ("manifest.json is damaged", "export the model again")),
    Case("an archive of another version", reference_of(archive(version=143)),
         ("reference.npz cannot be read", "export the model again")),
    Case("an array with half a header", reference_of(archive(header=b"{'descr': ('<f4', ")),
         ("reference.npz cannot be read", "export the model again")),
    Case("a tokenizer without its unknown token", tokenizer_without("model", "vocab", "[UNK]"),
         ("tokenizer.json fails on a text: ", "export the model again")),
    Case("a tokenizer that gives a text four times", text_many_times(3),
         ("tokens instead of at most 64", "export the model again")),
    Case("a tokenizer that gives a text many times", text_many_times(2000),
         ("its post-processor makes up to 2e+03 parts of one text", "export the model again")),
    Case("a tokenizer that grows a text", growing,
         ("its normalizer and pre-tokenizer make up to 1e+09 bytes of one byte; expected 128",)),
    Case("a Parquet column twice", input_of("in.parquet", table([TEXTS] * 2, ["text", "text"])),
         ('in.parquet names the column "text" twice', "its own name")),
    Case("a date that Python has not", input_of("in.parquet", table([TEXTS, FAR], ["text", "x"])),
         ('row 1: the column "x" holds a date32[day] that cannot be read',)),
    Case("a time zone that is none", input_of("in.parquet", table([TEXTS, NOWHERE], ["text", "x"])),
         ('row 1: the column "x" holds a timestamp[us, tz=No/Where] that cannot be read',)),
    Case("a Parquet column whose name is no text", input_of(
        "in.parquet", table([TEXTS, TEXTS], ["text", "x-x"]).replace(b"x-x", b"x\xfcx")),
        ("cannot be read as Parquet",)),
    Case("a field that is nested deeply", input_of("in.jsonl", DEEP.encode()),
         ("line 1 has a field that is nested deeper than 100", "leave that field out")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_find(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, place, capfd)


def test_a_panic_of_the_tokenizer(place: Place) -> None:
    """It is no Exception, and the library writes to stderr first."""
    folder = damaged_tokenizer(place, "post_processor", "special_tokens", "[CLS]")
    spec = read_manifest(folder).tokenizer
    with pytest.raises(ArtifactError, match=r"tokenizer.json .*export the model again"):
        TextEncoder(folder, spec).encode(["rain"])


@pytest.mark.parametrize("column", ["text", "x"])
def test_a_long_text_that_parquet_holds_once(place: Place, column: str) -> None:
    rows, long = 2000, "a" * 2**20
    repeated = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([long])
    )
    content = {"text": ["rain"] * rows} | {column: repeated}
    path = place.root / "in.parquet"
    parquet.write_table(pyarrow.table(content), path, store_schema=False)
    assert path.stat().st_size < 10**5
    before = pyarrow.total_allocated_bytes()
    first = next(parquet_rows(path, ReadOptions(), lambda share: None))
    assert isinstance(first, Row)
    assert (first.text if column == "text" else first.fields["x"]) == long
    assert pyarrow.total_allocated_bytes() - before < 32 * 2**20


def test_many_texts_of_a_row_group_are_not_held_at_once(place: Place) -> None:
    path = place.root / "in.parquet"
    texts = [f"{number} {'a' * 400}" for number in range(40_000)]
    parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd")
    before, most = pyarrow.total_allocated_bytes(), 0
    for row in parquet_rows(path, ReadOptions(), lambda share: None):
        assert isinstance(row, Row)
        if row.line % 1024 == 0:
            most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 8 * 2**20


def test_a_folder_whose_manifest_is_no_text_is_not_ours(place: Place) -> None:
    place.file(MANIFEST_NAME, b'{"schema_version": "\xed\xa0\x80"}')
    assert not is_engines_folder(place.root)


def test_nesting_that_is_not_too_deep_is_passed_on(place: Place) -> None:
    value: Any = 1
    for _ in range(100):
        value = [value]
    path = place.file("in.jsonl", msgspec.json.encode({"text": "rain", "more": value}))
    assert next(read_rows(path)).fields["more"] == value
