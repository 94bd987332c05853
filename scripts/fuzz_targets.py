"""What is fuzzed: a file, how it is changed, and what reads it as the commands do."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import fuzz_parquet
import msgspec
from fuzz_mutate import (
    Mutation,
    archived,
    headed,
    mutate_json,
    mutate_json_lines,
    mutate_lines,
    packed,
)

from fpabee.runtime.artifact.folder import (
    is_engines_folder,
    read_manifest,
    resolve,
    sha256_of,
    write_manifest,
)
from fpabee.runtime.artifact.manifest import MANIFEST_NAME, REFERENCE_NAME, Manifest
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.encoding import Text, TextEncoder
from fpabee.runtime.files import Inputs, Row
from fpabee.runtime.files.records import to_json
from fpabee.runtime.targets import operating_point_of, rule_of, target_of

# Rows of an input that are read: a packed file may hold any number, one after another.
_MOST_ROWS = 5000
_MOST_WRITTEN = 2**24
_TEXTS: list[Text] = [
    "",
    "the film is not bad",
    "\U0001f469\u200d é\u0301 \u202e",
    "a" * 300,
    ("a", "b"),
]
_ROWS = [
    b'{"text": "rain", "label": "a", "id": 1}',
    b'{"text": "a \\u00e9", "text_pair": "b", "labels": ["a", "b"], "more": {"x": [1.5]}}',
    b'{"text": "", "labels": []}',
]
_TABLE = [
    b"text,text_pair,label,id",
    b'rain,"a, ""b""",a,1',
    b'"two\nlines",,b,',
    b"",
]


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        group: what `--only` chooses: manifest, reference, inputs, tokenizer or model.
        seeds: files to begin with.
        mutate: changes one.
        path: where the file must stand to be read.
        read: reads it; raises only our errors.
    """

    group: str
    seeds: tuple[bytes, ...]
    mutate: Mutation
    path: Path
    read: Callable[[], object]


def every_target(engines: Path, model_dir: Path | None, place: Path) -> dict[str, Target]:
    """All targets by name.

    Args:
        engines: an engines folder.
        model_dir: the folder of a model, or none, and its files are not fuzzed.
        place: an empty folder of the caller's, where files will stand.
    """
    manifest = read_manifest(engines)
    targets = {
        "manifest": _manifest(engines, place / "engines"),
        "tokenizer": _tokenizer(engines, manifest, place / "tokenizer"),
        "reference": _reference(engines, manifest, place / "reference"),
    }
    table = b"\n".join(_TABLE)
    for suffix, seed, mutation in (
        ("txt", b"rain\nthe film is not bad\n\n", mutate_lines),
        ("jsonl", b"\n".join(_ROWS), mutate_json_lines),
        ("csv", table, mutate_lines),
        ("tsv", table.replace(b",", b"\t"), mutate_lines),
    ):
        targets[suffix] = _input(place / f"input.{suffix}", (seed,), mutation)
        targets[f"{suffix}.gz"] = _input(
            place / f"input.{suffix}.gz", (gzip.compress(seed, mtime=0),), packed(mutation)
        )
    targets["parquet"] = _input(place / "input.parquet", fuzz_parquet.seeds(), fuzz_parquet.mutate)
    return targets | ({} if model_dir is None else _model(model_dir, place / "model"))


def _manifest(engines: Path, folder: Path) -> Target:
    shutil.copytree(engines, folder)
    path = folder / MANIFEST_NAME

    def read() -> None:
        is_engines_folder(folder)  # before an export replaces it
        # As Engine.load does before it loads graphs, and then as calibration writes.
        manifest = read_manifest(folder)
        for name in (None, *manifest.targets):
            target = target_of(folder, manifest, name)
            points = manifest.targets[target].operating_points
            for point in (operating_point_of(folder, manifest, target, None), *points):
                rule_of(manifest, target, point)
        for graph in manifest.graphs.values():
            resolve(folder, graph.file)
        write_manifest(folder, manifest)

    return Target("manifest", (path.read_bytes(),), mutate_json, path, read)


def _tokenizer(engines: Path, manifest: Manifest, folder: Path) -> Target:
    spec = manifest.tokenizer
    path = folder / spec.file
    path.parent.mkdir(parents=True)

    def read() -> None:
        # Whoever changes the file corrects its hash.
        correct = msgspec.structs.replace(spec, sha256=sha256_of(path))
        rows = TextEncoder(folder, correct).encode(_TEXTS)
        assert all(len(row) <= spec.max_length for row in rows)

    return Target("tokenizer", ((engines / spec.file).read_bytes(),), mutate_json, path, read)


def _reference(engines: Path, manifest: Manifest, folder: Path) -> Target:
    path = folder / REFERENCE_NAME
    folder.mkdir()

    def read() -> None:
        files = {**manifest.files, REFERENCE_NAME: sha256_of(path)}
        read_reference(folder, msgspec.structs.replace(manifest, files=files))

    seeds = ((engines / REFERENCE_NAME).read_bytes(),)
    return Target("reference", seeds, archived, path, read)


def _input(path: Path, seeds: tuple[bytes, ...], mutation: Mutation) -> Target:
    def read() -> None:
        written = 0
        for row in islice(Inputs([path]), _MOST_ROWS):
            if isinstance(row, Row):
                # Its other fields are written again.
                written += len(to_json(row.fields).encode()) + len(row.text)
            if written > _MOST_WRITTEN:
                break

    return Target("inputs", seeds, mutation, path, read)


def _model(model_dir: Path, folder: Path) -> dict[str, Target]:
    from fpabee.exporter.checkpoint import load_checkpoint

    targets = {}
    for name, mutation in (
        ("config.json", mutate_json),
        ("model.safetensors", headed(mutate_json)),
    ):
        copy = folder / name
        shutil.copytree(model_dir, copy)
        targets[name] = Target(
            "model",
            ((copy / name).read_bytes(),),
            mutation,
            copy / name,
            partial(load_checkpoint, copy),
        )
    return targets
