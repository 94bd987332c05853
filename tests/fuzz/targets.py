"""What is fuzzed: a kind of file, how it is changed, and what reads it as the commands do."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec

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
from fpabee.runtime.targets import rule_of, target_of

from . import parquet_files
from .mutations import (
    Mutation,
    compressed,
    headed,
    mutate_archive,
    mutate_json,
    mutate_json_lines,
    mutate_lines,
)

# A compressed file may hold any number of rows; they are read one after another.
_MOST_ROWS = 5000
_MOST_WRITTEN = 2**24
_TEXTS: list[Text] = ["", "the film is not bad", "\U0001f469\u200d é\u0301", "a" * 300, ("a", "b")]
_ROWS = (
    b'{"text": "rain", "label": "a", "id": 1}\n'
    b'{"text": "a \\u00e9", "text_pair": "b", "labels": ["a", "b"], "more": {"x": [1.5]}}\n'
    b'{"text": "", "labels": []}'
)
_TABLE = b'text,text_pair,label,id\nrain,"a, ""b""",a,1\n"two\nlines",,b,\n'
NAMES = (
    *("manifest", "tokenizer", "reference", "config.json", "model.safetensors", "parquet"),
    *("txt", "jsonl", "csv", "jsonl.gz"),
)


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        seeds: files to begin with; the first can be read.
        mutate: changes one.
        path: where the file must be to be read.
        read: reads it; raises only our errors.
    """

    seeds: tuple[bytes, ...]
    mutate: Mutation
    path: Path
    read: Callable[[], object]


def every_target(place: Path, engines: Path, model_dir: Path) -> dict[str, Target]:
    """All targets by name.

    Args:
        place: an empty folder for the files to be read.
        engines: an engines folder.
        model_dir: a model folder.
    """
    manifest = read_manifest(engines)
    return {
        "manifest": _manifest(engines, place / "engines"),
        "tokenizer": _tokenizer(engines, manifest, place / "tokenizer"),
        "reference": _reference(engines, manifest, place / "reference"),
        "config.json": _model(model_dir, place / "config", "config.json", mutate_json),
        "model.safetensors": _model(
            model_dir, place / "weights", "model.safetensors", headed(mutate_json)
        ),
        "parquet": _input(place / "input.parquet", parquet_files.seeds(), parquet_files.mutate),
        "txt": _input(place / "input.txt", (b"rain\nthe film is not bad\n\n",), mutate_lines),
        "jsonl": _input(place / "input.jsonl", (_ROWS,), mutate_json_lines),
        "csv": _input(place / "input.csv", (_TABLE,), mutate_lines),
        "jsonl.gz": _input(
            place / "input.jsonl.gz",
            (gzip.compress(_ROWS, mtime=0),),
            compressed(mutate_json_lines),
        ),
    }


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
            for point in (None, *points):
                rule_of(folder, manifest, target, point)
        for graph in manifest.graphs.values():
            resolve(folder, graph.file)
        write_manifest(folder, manifest)

    return Target((path.read_bytes(),), mutate_json, path, read)


def _tokenizer(engines: Path, manifest: Manifest, folder: Path) -> Target:
    spec = manifest.tokenizer
    path = folder / spec.file
    path.parent.mkdir(parents=True)

    def read() -> None:
        # Whoever changes the file corrects its hash.
        correct = msgspec.structs.replace(spec, sha256=sha256_of(path))
        rows = TextEncoder(folder, correct).encode(_TEXTS)
        assert all(len(row) <= spec.max_length for row in rows)

    return Target(((engines / spec.file).read_bytes(),), mutate_json, path, read)


def _reference(engines: Path, manifest: Manifest, folder: Path) -> Target:
    path = folder / REFERENCE_NAME
    folder.mkdir()

    def read() -> None:
        files = {**manifest.files, REFERENCE_NAME: sha256_of(path)}
        read_reference(folder, msgspec.structs.replace(manifest, files=files))

    return Target(((engines / REFERENCE_NAME).read_bytes(),), mutate_archive, path, read)


def _input(path: Path, seeds: tuple[bytes, ...], mutation: Mutation) -> Target:
    def read() -> None:
        written = 0
        for row in islice(Inputs([path]), _MOST_ROWS):
            if isinstance(row, Row):
                # Its other fields are written again.
                written += len(to_json(row.fields).encode()) + len(row.text)
            if written > _MOST_WRITTEN:
                break

    return Target(seeds, mutation, path, read)


def _model(model_dir: Path, folder: Path, name: str, mutation: Mutation) -> Target:
    from fpabee.exporter.checkpoint import load_checkpoint

    shutil.copytree(model_dir, folder)
    path = folder / name
    return Target((path.read_bytes(),), mutation, path, lambda: load_checkpoint(folder))
