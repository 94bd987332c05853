"""What is fuzzed: a kind of file, how it is changed, and what reads it as the commands do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fpabee.runtime.artifact.folder import (
    EnginesFolder,
    is_engines_folder,
    read_manifest,
    resolve,
    sha256_of,
)
from fpabee.runtime.artifact.manifest import MANIFEST_NAME, REFERENCE_NAME, Manifest
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.encoding import Text, TextEncoder
from fpabee.runtime.files import Inputs, Row
from fpabee.runtime.files.records import to_json
from fpabee.runtime.targets import rule_of, target_of

from . import parquet_files
from .mutations import Mutation, mutate_archive, mutate_bytes, mutate_json, mutate_lines

_TEXTS: list[Text] = ["", "the film is not bad", "\U0001f469\u200d é\u0301", "a" * 300, ("a", "b")]
_ROWS = (
    b'{"text": "rain", "label": "a", "id": 1}\n'
    b'{"text": "a \\u00e9", "text_pair": "b", "labels": ["a", "b"], "more": {"x": [1.5]}}\n'
    b'{"text": "", "labels": []}'
)
_TABLE = b'text,text_pair,label,id\nrain,"a, ""b""",a,1\n"two\nlines",,b,\n'
NAMES = (
    *("manifest", "tokenizer", "reference", "config.json"),
    *("parquet", "txt", "jsonl", "csv"),
)


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        seed: a good file to begin with.
        mutate: changes one.
        path: where the file must be to be read.
        read: reads it; raises only our errors.
    """

    seed: bytes
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
        "config.json": _config(model_dir, place / "config"),
        "parquet": _input(place / "input.parquet", parquet_files.seed(), mutate_bytes),
        "txt": _input(place / "input.txt", b"rain\nthe film is not bad\n\n", mutate_lines),
        "jsonl": _input(place / "input.jsonl", _ROWS, mutate_lines),
        "csv": _input(place / "input.csv", _TABLE, mutate_lines),
    }


def _manifest(engines: Path, folder: Path) -> Target:
    shutil.copytree(engines, folder)
    path = folder / MANIFEST_NAME

    def read() -> None:
        is_engines_folder(folder)  # before an export replaces it
        # As Engine.load does before it loads graphs, and then as calibration writes.
        engines = EnginesFolder.read(folder)
        manifest = engines.manifest
        for name in (None, *manifest.targets):
            target = target_of(engines, name)
            points = manifest.targets[target].operating_points
            for point in (None, *points):
                rule_of(manifest, target, point)
        for graph in manifest.graphs.values():
            resolve(folder, graph.file)
        engines.write()

    return Target(path.read_bytes(), mutate_json, path, read)


def _tokenizer(engines: Path, manifest: Manifest, folder: Path) -> Target:
    spec = manifest.tokenizer
    path = folder / spec.file
    path.parent.mkdir(parents=True)

    def read() -> None:
        # Whoever changes the file corrects its hash.
        correct = msgspec.structs.replace(spec, sha256=sha256_of(path))
        rows = TextEncoder(folder, correct).encode(_TEXTS)
        assert all(len(row) <= spec.max_length for row in rows)

    return Target((engines / spec.file).read_bytes(), mutate_json, path, read)


def _reference(engines: Path, manifest: Manifest, folder: Path) -> Target:
    path = folder / REFERENCE_NAME
    folder.mkdir()

    def read() -> None:
        files = {**manifest.files, REFERENCE_NAME: sha256_of(path)}
        read_reference(EnginesFolder(folder, msgspec.structs.replace(manifest, files=files)))

    return Target((engines / REFERENCE_NAME).read_bytes(), mutate_archive, path, read)


def _input(path: Path, seed: bytes, mutation: Mutation) -> Target:
    def read() -> None:
        for row in Inputs([path]):
            if isinstance(row, Row):
                to_json(row.fields)  # its other fields are written again

    return Target(seed, mutation, path, read)


def _config(model_dir: Path, folder: Path) -> Target:
    from fpabee.exporter.checkpoint import load_checkpoint

    shutil.copytree(model_dir, folder)
    path = folder / "config.json"
    return Target(path.read_bytes(), mutate_json, path, lambda: load_checkpoint(folder))
