"""Engines folders that are missing, damaged, inconsistent, or made by someone who means harm."""

from __future__ import annotations

import base64
import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.runtime.artifact.folder import read_manifest
from fpabee.runtime.artifact.manifest import CLASSIFIER_NAME, MANIFEST_NAME, TOKENIZER_NAME
from fpabee.runtime.encoding import TextEncoder
from fpabee.runtime.errors import ArtifactError

from .cases import (
    Arguments,
    Case,
    Change,
    Make,
    Place,
    change_json,
    changed_heads,
    check,
    corrected,
    each,
    manifest,
    with_loop,
    with_nan,
)

REFERENCE = "reference.npz"
FIRST, SECOND, THIRD = (f"onnx/fp32/segment_0{number}.onnx" for number in (1, 2, 3))


def folder(change: Change, *options: object) -> Make:
    """A copy of the folder, changed."""
    return lambda place: place.run_texts(*options, folder=place.engines(change))


def served(change: Change) -> Make:
    """A server that checks a copy of the folder first, changed."""
    return lambda place: ["serve", place.engines(change), "--check"]


def says(change: Callable[[Any], object]) -> Make:
    """A manifest that says something else."""
    return folder(manifest(change))


def rewritten(file: str, content: bytes, *options: object) -> Make:
    """A file with other content, whose hash is corrected."""
    return folder(corrected(file, lambda path: path.write_bytes(content)), *options)


def tokenizer(change: Callable[[Any], object]) -> Make:
    """A changed tokenizer, which meets a long text and an unknown word."""

    def make(place: Place) -> Arguments:
        changed = corrected(TOKENIZER_NAME, lambda path: change_json(path, change))
        texts = place.file("in.txt", "the film " * 40 + "\u4e2d\n")
        return place.run(texts, folder=place.engines(changed))

    return make


def of_mpnet(place: Place) -> Arguments:
    """A segment of another model's folder."""
    return rewritten(SECOND, (place.shared["mpnet"] / SECOND).read_bytes())(place)


def long_text(place: Place) -> Arguments:
    """A manifest that allows a million tokens, where the graphs take 64."""

    def longer(m: Any) -> None:
        m["tokenizer"].update(max_length=10**6)
        m["shapes"]["sequence"].update(max=10**6)

    texts = place.file("in.txt", "rain " * 1000)
    return place.run(texts, folder=place.engines(manifest(longer)))


def other_weights(folder: Path) -> None:
    changed_heads(folder, SECOND, lambda values: values[::-1].copy())


def reference(texts: Sequence[str], value: float) -> Make:
    """A server that checks a folder with other reference texts, whose logits are a value or 0."""

    def write(path: Path) -> None:
        logits = np.zeros((3, len(texts), 4), np.float32)
        logits[..., 0] = value
        np.savez(path, texts=np.frombuffer(json.dumps(texts).encode(), np.uint8), logits=logits)

    return served(corrected(REFERENCE, write))


def packed(classifier: bytes) -> Make:
    """One file of a folder with another configuration of the plain classifier."""

    def make(place: Place) -> Arguments:
        change = corrected(CLASSIFIER_NAME, lambda path: path.write_bytes(classifier))
        return ["pack", place.engines(change), "-o", place.root / "packed", "--quiet"]

    return make


def swap_calls(m: Any) -> None:
    first, second = m["segments"][:2]
    first["calls"], second["calls"] = second["calls"], first["calls"]


# The library finds an added token that normalizes to nothing without end.
ENDLESS = {"id": 0, "content": "\u0301", "normalized": True}
ENDLESS |= dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
REPEATS = {"Sequence": {"id": "A", "type_id": 0}}
SPECIAL = {"SpecialToken": {"id": "[SEP]", "type_id": 0}}


def with_table(table: bytes | str) -> Callable[[Any], object]:
    """A tokenizer that replaces characters as SentencePiece does."""
    encoded = table if isinstance(table, str) else base64.b64encode(table).decode()
    normalizer = {"type": "Precompiled", "precompiled_charsmap": encoded}
    return lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [normalizer]})


def table(*units: int) -> bytes:
    """A table that maps nothing, but for its first units."""
    return struct.pack("<257I", 1024, *units, *[0] * (256 - len(units))) + b"text\0"


# The library would print a panic, while it reads the table, or in a text.
TABLES: dict[str, bytes | str] = {
    "is empty": b"",
    "is not in base64": "!",
    "has no trie": struct.pack("<I", 0),
    "is cut short": table()[:1000],
    "holds no text": table() + b"\xff",
    "leads out of its trie": table(1 << 30),
    # The root is unit 0. Its child for "f" has a value, whose unit is next to it.
    "leads out of its texts": table(*[0] * ord("f"), 1 << 10 | 1 << 8 | ord("f"), 1 << 31 | 9),
}

MANIFESTS = [
    Case("no folder", lambda p: p.run_texts(folder=p.root / "none"), "none", "export"),
    Case("a newer schema", says(lambda m: m.update(schema_version="2.3")), "2.3", "export"),
    # Other wrong fields are in tests/runtime/artifact/test_manifest.py.
    Case("a million calls", says(lambda m: m["segments"][2].update(calls=["x"] * 10**6)), "calls"),
    Case("segments in another order", says(lambda m: m["segments"].reverse()), "layers [3, 2, 1]"),
    Case("segments that call each other's graphs", says(swap_calls), "hidden_states"),
    Case("an unknown rule", says(lambda m: m.update(default_rule={"name": "newer"})), "'newer'",
         "--rule"),
    Case("an unknown backend", says(lambda m: m["targets"]["onnxruntime-fp32"].update(backend="x")),
         "'x'", "update fpabee"),
]  # fmt: skip

FILES = [
    Case("a tokenizer that is none", rewritten(TOKENIZER_NAME, b"[" * 10**5), TOKENIZER_NAME),
    Case("a tokenizer without its unknown token",
         tokenizer(lambda t: t["model"]["vocab"].pop("[UNK]")), TOKENIZER_NAME),
    Case("a tokenizer that gives a text many times",
         tokenizer(lambda t: t["post_processor"]["single"].extend([REPEATS] * 2000)), "once"),
    Case("a tokenizer with more special tokens than fit",
         tokenizer(lambda t: t["post_processor"]["single"].extend([SPECIAL] * 2000)), "no room"),
    Case("a tokenizer of a larger vocabulary",
         tokenizer(lambda t: t["model"]["vocab"].update(film=10**6)), "segment_01"),
    *(
        Case(f"a tokenizer whose table {what}", tokenizer(with_table(table)), TOKENIZER_NAME)
        for what, table in TABLES.items()
    ),
    Case("graphs that take less than the manifest says", long_text, "segment_01", "--max-length"),
    Case("a segment that is no ONNX", rewritten(SECOND, b"hello"), SECOND),
    Case("a segment with a loop", folder(corrected(SECOND, with_loop)), SECOND),
    Case("a segment of another family", of_mpnet, "segment_02"),
    Case("a segment of another model", served(other_weights),
         "onnxruntime-fp32"),
    Case("a reference of infinity", reference(["rain"], np.inf), REFERENCE, "infinite"),
    Case("a reference of large numbers", reference(["rain"], -3e38), REFERENCE, "1e+15"),
    Case("a reference of 10,000 texts", reference(["rain"] * 10_000, 0.0), "10,000", "256"),
    *(
        Case(f"a classifier.json of {what}", packed(content), CLASSIFIER_NAME)
        for what, content in {
            "a list": b"[1]", "a number": b"1", "half an object": b'{"a": ', "NaN": b'{"a": NaN}',
            "no text": b"\xff", "a deep list": b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        }.items()
    ),
    Case("a segment of NaN where no row stops",
         folder(with_nan, "--rule", "budget exit=3"), "exit 2"),
]  # fmt: skip


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    """A link, as in the cache of a hub, to a file with another content."""
    other = path.with_name("other")
    other.write_bytes(b"other content")
    path.unlink()
    path.symlink_to(other)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def damaged(file: str, damage: Change) -> Case:
    name = f"{Path(file).name}: {damage.__name__}"
    return Case(name, served(lambda f: damage(f / file)), Path(file).name)


DAMAGES: list[Change] = [Path.unlink, endless, pipe, flip_a_bit, link]
DAMAGED = [
    damaged(file, damage)
    for file in (MANIFEST_NAME, TOKENIZER_NAME, THIRD, REFERENCE)
    for damage in DAMAGES
]


@each(MANIFESTS, FILES, DAMAGED)
def test_a_bad_engines_folder(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, place, capfd)


def test_a_tokenizer_on_which_the_library_panics(place: Place) -> None:
    changes: list[Callable[[Any], object]] = [
        lambda t: t["post_processor"]["special_tokens"].pop("[CLS]"),
        lambda t: t["added_tokens"].append(ENDLESS),
        lambda t: t.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    ]
    for number, change in enumerate(changes):
        path = Path(shutil.copytree(place.shared["bert"], place.root / str(number)))
        corrected(TOKENIZER_NAME, partial(change_json, change=change))(path)
        with pytest.raises(ArtifactError, match=TOKENIZER_NAME):
            TextEncoder(path, read_manifest(path).tokenizer).encode(["rain"])
