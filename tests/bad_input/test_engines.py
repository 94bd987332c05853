"""Engines folders that are missing, damaged, inconsistent, or made by someone who means harm."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from fpabee.runtime.artifact.manifest import MANIFEST_NAME, TOKENIZER_NAME

from .cases import (
    Arguments,
    Case,
    Place,
    change_json,
    change_manifest,
    changed_heads,
    check,
    corrected,
)

REFERENCE = "reference.npz"
FIRST, SECOND, THIRD = (f"onnx/fp32/segment_0{number}.onnx" for number in (1, 2, 3))
DAMAGED = ("manifest.json is damaged", "export the model again")


def texts(folder: Path, place: Place, *options: object) -> Arguments:
    return [folder, "--input", place.texts(), "--threads", 1, "--quiet", *options]


def damaged(change: Callable[[Path], object], *options: object) -> Callable[[Place], Arguments]:
    """A copy of the folder, changed."""

    def make(place: Place) -> Arguments:
        folder = place.engines()
        change(folder)
        return texts(folder, place, *options)

    return make


def raw(content: bytes) -> Callable[[Place], Arguments]:
    """Another manifest."""
    return damaged(lambda folder: (folder / MANIFEST_NAME).write_bytes(content))


def patched(old: bytes, new: bytes) -> Callable[[Place], Arguments]:
    """A manifest with some bytes replaced: numbers that a JSON library would not write."""

    def change(folder: Path) -> None:
        path = folder / MANIFEST_NAME
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new, 1))

    return damaged(change)


def manifest(change: Callable[[Any], object], *options: object) -> Callable[[Place], Arguments]:
    """A manifest that says something else."""
    return damaged(lambda folder: change_manifest(folder, change), *options)


def rule(**settings: object) -> Callable[[Place], Arguments]:
    """A manifest with another default rule."""
    return manifest(lambda m: m.update(default_rule=settings))


def rewritten(file: str, content: bytes) -> Callable[[Place], Arguments]:
    """A file with other content, and its hash corrected."""

    def change(folder: Path) -> None:
        (folder / file).write_bytes(content)
        corrected(folder, file)

    return damaged(change)


def swapped(correct: bool) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        one, two = (folder / file for file in (SECOND, THIRD))
        first, second = one.read_bytes(), two.read_bytes()
        assert first != second
        one.write_bytes(second)
        two.write_bytes(first)
        if correct:
            corrected(folder, SECOND)
            corrected(folder, THIRD)

    return change


def swapped_calls(m: Any) -> None:
    first, second = m["segments"][:2]
    first["calls"], second["calls"] = second["calls"], first["calls"]


def emptied(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


def manifest_folder(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).mkdir()


def cut_short(file: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_bytes(path.read_bytes()[:-100])

    return change


def flipped(file: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)

    return change


def link_to(file: str, name: str) -> Callable[[Path], object]:
    """A link that leads to a file outside, as in the cache of a hub; its content is another."""

    def change(folder: Path) -> None:
        (folder.parent / name).write_bytes(b"other content")
        (folder / file).unlink()
        (folder / file).symlink_to(folder.parent / name)

    return change


def endless(file: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to("/dev/zero")

    return change


def pipe(file: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return change


def longer_texts(m: Any) -> None:
    """A million tokens, where the table of positions has 64."""
    m["tokenizer"].update(max_length=10**6)
    m["shapes"]["sequence"].update(max=10**6)


def long_text(place: Place) -> Arguments:
    folder = change_manifest(place.engines(), longer_texts)
    return [folder, "--input", place.file("in.txt", "rain " * 1000), "--threads", 1, "--quiet"]


def not_an_output(change: Callable[[Path], object]) -> Callable[[Place], Arguments]:
    """An export into a folder whose manifest is not a file that can be read."""

    def make(place: Place) -> Arguments:
        folder = place.engines()
        change(folder)
        return [place.shared_model(), "-o", folder, "--force", "--quiet"]

    return make


def from_another(place: Place, file: str, other: Path) -> Path:
    """A copy of the folder with a file of another model, and its hash corrected."""
    folder = place.engines()
    (folder / file).write_bytes((other / file).read_bytes())
    return corrected(folder, file)


def other_weights(correct: bool) -> Callable[[Path], None]:
    """A graph of the same size with other weights, as another model of the family has."""

    def change(folder: Path) -> None:
        before, size = (folder / MANIFEST_NAME).read_bytes(), (folder / SECOND).stat().st_size
        changed_heads(folder, SECOND, lambda values: values[::-1].copy())
        assert (folder / SECOND).stat().st_size == size
        if not correct:
            (folder / MANIFEST_NAME).write_bytes(before)

    return change


def not_numbers(file: str) -> Callable[[Path], object]:
    """Weights that a half-written or overflowing training leaves."""
    return lambda folder: changed_heads(folder, file, lambda values: values * np.float32("nan"))


def larger_vocabulary(folder: Path) -> None:
    change_json(folder / TOKENIZER_NAME, lambda t: t["model"]["vocab"].update(film=10**6))
    corrected(folder, TOKENIZER_NAME)


def with_loop(proto: Any) -> None:
    """2^62 rounds of nothing."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"])],
        "body",
        [helper.make_tensor_value_info(n, kind, []) for n, kind in (("i", 7), ("go", 9))],
        [helper.make_tensor_value_info("go_on", 9, [])],
    )
    rounds = helper.make_tensor("rounds", 7, [], [2**62])
    go = helper.make_tensor("go", 9, [], [True])
    proto.graph.initializer.extend([rounds, go])
    proto.graph.node.append(helper.make_node("Loop", ["rounds", "go"], [], body=body))


def changed_graph(file: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    """Another graph, and its hash corrected."""

    def apply(folder: Path) -> None:
        proto = onnx.load(folder / file)
        change(proto)
        (folder / file).write_bytes(proto.SerializeToString())
        corrected(folder, file)

    return apply


def weights_beside(folder: Path) -> None:
    """A graph whose weights stand in a file of their own, which no hash covers."""
    onnx.save(onnx.load(folder / FIRST), folder / FIRST, save_as_external_data=True,
              location="weights", size_threshold=0)  # fmt: skip
    corrected(folder, FIRST)


def lowered(change: Callable[[Path], object], *options: str) -> Callable[[Place], Arguments]:
    """What exports another precision of a folder that was changed."""

    def make(place: Place) -> Arguments:
        folder = place.engines()
        change(folder)
        return ["--from", folder, "--quiet", *options]

    return make


def hidden(change: Callable[[Any], object]) -> Callable[[Place], Arguments]:
    def find(m: Any) -> None:
        outputs = m["graphs"]["segment_01"]["outputs"]
        change(next(o for o in outputs if o["name"] == "next_hidden_states"))

    return manifest(find)


MISSING = [
    Case("no folder", lambda p: texts(p.root / "none", p), ("does not exist", "fpabee-export")),
    Case("a file", lambda p: texts(p.texts(), p), ("does not exist", "fpabee-export")),
    Case(
        "an empty folder",
        damaged(emptied),
        ("it has no manifest.json", "fpabee-export MODEL_DIR"),
    ),
    Case(
        "a model_dir",
        lambda p: texts(p.shared_model(), p),
        ("is not an engines folder", "fpabee-export MODEL_DIR"),
    ),
    Case(
        "a folder named manifest.json",
        damaged(manifest_folder),
        ("manifest.json cannot be read: it is not a regular file",),
    ),
    Case(
        "no tokenizer",
        damaged(lambda f: (f / TOKENIZER_NAME).unlink()),
        ("tokenizer.json is missing", "copy the whole engines folder"),
    ),
    Case(
        "no last segment",
        damaged(lambda f: (f / THIRD).unlink()),
        ("segment_03.onnx is missing", "copy the whole engines folder"),
    ),
    Case(
        "no reference to check with",
        damaged(lambda f: (f / "reference.npz").unlink(), "--check"),
        ("reference.npz is missing",),
    ),
]

MANIFESTS = [
    Case("a manifest that is a pipe", damaged(pipe(MANIFEST_NAME)), ("is not a regular file",)),
    Case(
        "a link to an endless manifest", damaged(endless(MANIFEST_NAME)), ("is not a regular file",)
    ),
    Case(
        "an output whose manifest is a pipe",
        not_an_output(pipe(MANIFEST_NAME)),
        ("is not an engines folder", "another folder"),
        "export",
    ),
    Case(
        "an output whose manifest is endless",
        not_an_output(endless(MANIFEST_NAME)),
        ("is not an engines folder", "another folder"),
        "export",
    ),
    Case(
        "texts that are longer than the graphs take",
        manifest(lambda m: m["tokenizer"].update(max_length=10**6)),
        ("texts may have 1000000 tokens",),
    ),
    Case(
        "graphs that take less than the manifest says",
        long_text,
        ("failed in segment_01", "smaller --max-length"),
    ),
    Case("an empty manifest", raw(b""), DAMAGED),
    Case("half a manifest", raw(b'{"schema_version": "1.0", "mod'), DAMAGED),
    Case("bytes", raw(bytes(range(256)) * 9), DAMAGED),
    Case("UTF-16", raw('{"schema_version": "1.0"}'.encode("utf-16")), DAMAGED),
    Case("a list", raw(b"[]"), DAMAGED),
    Case("deep JSON", raw(b"[" * 200_000), DAMAGED),
    Case(
        "deep JSON in a field of a newer version",
        patched(b'"graphs"', b'"new": ' + b"[" * 200_000 + b"]" * 200_000 + b', "graphs"'),
        DAMAGED,
    ),
    Case("more than any manifest", raw(b" " * (16 * 2**20 + 1)), ("more than 16777216 bytes",)),
    Case(
        "a newer schema",
        manifest(lambda m: m.update(schema_version="2.3")),
        ("has schema 2.3", "pip install 'fpabee==0.1.0'"),
    ),
    Case("a threshold that is NaN", patched(b'"threshold": 0.1', b'"threshold": NaN'), DAMAGED),
    Case("an infinite threshold", patched(b'"threshold": 0.1', b'"threshold": 1e999'), DAMAGED),
    Case("a negative length", manifest(lambda m: m["tokenizer"].update(max_length=-1)), DAMAGED),
    Case("a huge length", manifest(lambda m: m["tokenizer"].update(max_length=10**30)), DAMAGED),
    Case("a huge batch", manifest(lambda m: m["shapes"]["batch"].update(max=10**9)), DAMAGED),
    Case("a negative size", hidden(lambda o: o.update(shape=["batch", "sequence", -32])), DAMAGED),
    Case("a huge size", hidden(lambda o: o.update(shape=["batch", "sequence", 2**40])), DAMAGED),
    Case("sizes that are huge together", hidden(lambda o: o.update(shape=[2**19, 2**19])), DAMAGED),
    Case("another width", hidden(lambda o: o.update(shape=["batch", "sequence", 64])), DAMAGED),
    Case("an unknown size", hidden(lambda o: o.update(shape=["batch", "time", 32])), DAMAGED),
    Case("an unknown dtype", hidden(lambda o: o.update(dtype="O")), DAMAGED),
    Case("labels that are one name", manifest(lambda m: m["task"].update(labels="abcd")), DAMAGED),
    Case("labels that are numbers", manifest(lambda m: m["task"].update(labels=[1, 2])), DAMAGED),
    Case("no labels", manifest(lambda m: m["task"].update(labels=[])), DAMAGED),
    Case(
        "fewer labels than the head gives",
        manifest(lambda m: m["task"]["labels"].pop()),
        ("names 3 labels, but the heads give ['batch', 4]", "export the model again"),
    ),
    Case(
        "a label twice",
        manifest(lambda m: m["task"].update(labels=["a", "b", "c", "a"])),
        ("a label name appears twice",),
    ),
    Case("segments as an object", manifest(lambda m: m.update(segments={})), DAMAGED),
    Case("no segments", manifest(lambda m: m.update(segments=[])), DAMAGED),
    Case("targets as a list", manifest(lambda m: m.update(targets=[])), DAMAGED),
    Case("segments in another order", manifest(lambda m: m["segments"].reverse()), DAMAGED),
    Case("a hash that is none", manifest(lambda m: m["tokenizer"].update(sha256="x")), DAMAGED),
    Case(
        "a graph that is not listed",
        manifest(lambda m: m["segments"][0].update(calls=["segment_09"])),
        ("calls graph 'segment_09'",),
    ),
    Case("segments that call each other's graphs", manifest(swapped_calls), DAMAGED),
    Case(
        "a million calls",
        manifest(lambda m: m["segments"][2].update(calls=["segment_03"] * 1_000_000)),
        DAMAGED,
    ),
    Case("an unknown rule", rule(name="newer"), ("exit rule 'newer' does not exist",)),
    Case("a rule without its threshold", rule(name="entropy"), ("needs threshold",)),
    Case("a threshold of words", rule(name="entropy", threshold="low"), ("threshold is 'low'",)),
    Case(
        "an exit that the model has not",
        rule(name="budget", exit=2**40),
        ("the model has 3 exits",),
    ),
    Case(
        "an unknown backend",
        manifest(lambda m: m["targets"]["onnxruntime-fp32"].update(backend="newer")),
        ("backend 'newer'", "pip install -U fpabee"),
    ),
    Case(
        "an unknown default target",
        manifest(lambda m: m.update(default_target="x")),
        ("default target 'x'",),
    ),
]

FILES = [
    Case("a path out of the folder", manifest(lambda m: m["tokenizer"].update(file="../t.json")),
         ("outside the engines folder", "do not use this folder")),
    Case("an absolute path", manifest(lambda m: m["tokenizer"].update(file="/etc/passwd")),
         ("outside the engines folder",)),
    Case("a path with a NUL", manifest(lambda m: m["tokenizer"].update(file="a\0b")),
         ("outside the engines folder",)),
    Case("a link to other content", damaged(link_to(FIRST, "model.onnx")),
         ("segment_01.onnx is damaged",)),
    Case("a tokenizer that is a link to other content", damaged(link_to(TOKENIZER_NAME, "t.json")),
         ("tokenizer.json is damaged",)),
    Case("a reference that is a link to other content", damaged(link_to(REFERENCE, "r"), "--check"),
         ("reference.npz is damaged",)),
    *(Case(f"{file}: a link to an endless device", damaged(endless(file), "--check"),
           (f"{file.split('/')[-1]} is not a regular file",))
      for file in (FIRST, TOKENIZER_NAME, REFERENCE)),
    *(Case(f"{file}: a pipe", damaged(pipe(file), "--check"),
           (f"{file.split('/')[-1]} is not a regular file",))
      for file in (FIRST, TOKENIZER_NAME, REFERENCE)),
    Case("a tokenizer cut short", damaged(cut_short(TOKENIZER_NAME)), ("json is damaged",)),
    Case("a tokenizer that is none", rewritten(TOKENIZER_NAME, b"{}"), ("is not a tokenizer",)),
    Case("a tokenizer in deep JSON", rewritten(TOKENIZER_NAME, b"[" * 100_000),
         ("is not a tokenizer",)),
    Case("a segment cut short", damaged(cut_short(FIRST)), ("segment_01.onnx is damaged",)),
    Case("a flipped bit", damaged(flipped(THIRD)), ("segment_03.onnx is damaged",)),
    Case("a segment swapped with another of its size", damaged(other_weights(False)),
         ("segment_02.onnx is damaged", "copy the whole engines folder")),
    Case("two segments swapped", damaged(swapped(False)),
         ("segment_02.onnx is damaged", "copy the whole engines folder")),
    Case("two segments swapped with hashes corrected", damaged(swapped(True), "--check"),
         ("is another graph than the manifest describes", "export again")),
    Case("a segment that is no ONNX", rewritten(SECOND, b"hello"),
         ("segment_02.onnx is not an ONNX graph", "do not use this folder")),
    Case("an empty segment", rewritten(SECOND, b""),
         ("segment_02.onnx is not an ONNX graph", "export the model again")),
    Case("a segment with a loop", damaged(changed_graph(SECOND, with_loop)),
         ("segment_02.onnx has a node of operator 'Loop'", "do not use this folder")),
    Case("a segment with a loop to be lowered", lowered(changed_graph(SECOND, with_loop), "--bf16"),
         ("segment_02.onnx has a node of operator 'Loop'",), command="export"),
    Case("weights in a file of their own", damaged(weights_beside),
         ("segment_01.onnx keeps weights in other files", "do not use this folder")),
    Case("weights in a file of their own to be lowered", lowered(weights_beside, "--bf16"),
         ("segment_01.onnx keeps weights in other files",), command="export"),
    Case("a segment of another family",
         lambda p: texts(from_another(p, SECOND, p.shared_engines("mpnet")), p),
         ("segment_02.onnx is another graph than the manifest describes",)),
    Case("a segment of another model", damaged(other_weights(True), "--check"),
         ("not the model that was exported", "copy the whole engines folder")),
    Case("a last segment of NaN", damaged(not_numbers(THIRD)),
         ("gives logits that are not finite numbers at exit 3", "fpabee-inspect")),
    Case("a segment of NaN", damaged(not_numbers(SECOND), "--rule", "budget", "--exit", 2),
         ("gives logits that are not finite numbers at exit 2", "--check")),
    Case("a segment of NaN where no row stops",
         damaged(not_numbers(SECOND), "--rule", "budget", "--exit", 3),
         ("gives logits that are not finite numbers at exit 2", "--check")),
    Case("a segment of NaN, checked", damaged(not_numbers(SECOND), "--check"),
         ("gives logits that are not finite numbers at exit 2",)),
    Case("another reference", lambda p: texts(
        from_another(p, "reference.npz", p.shared_engines("albert")), p, "--check"),
        ("reference.npz holds logits of shape",)),
    Case("a tokenizer of a larger vocabulary", damaged(larger_vocabulary),
         ("segment_01", "export again")),
]  # fmt: skip


CASES = [*MISSING, *MANIFESTS, *FILES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_engines_folder(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    check(case, place, capfd)
