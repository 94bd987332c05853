"""Manifests: what is read, what is refused, and what a rewrite keeps."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fpabee.runtime.artifact.folder import EnginesFolder, is_engines_folder, read_manifest
from fpabee.runtime.artifact.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest
from fpabee.runtime.errors import ArtifactError

Json = dict[str, Any]
Change = Callable[[Json], object]

# It has every kind of record. Its fields are the format 1.0, so they may not be renamed.
GOLDEN = Path(__file__).parents[2] / "golden" / "manifest.json"
TARGET = "tensorrt-fp16-sm87"
NAN = float("nan")


@pytest.fixture
def manifest() -> Manifest:
    return msgspec.json.decode(GOLDEN.read_bytes(), type=Manifest)


@pytest.fixture
def folder(tmp_path: Path, manifest: Manifest) -> Path:
    """A folder that holds the manifest."""
    EnginesFolder(tmp_path, manifest).write()
    return tmp_path


def change(folder: Path, how: Change) -> None:
    content = content_of(folder)
    how(content)
    (folder / MANIFEST_NAME).write_text(json.dumps(content), encoding="utf-8")


def content_of(folder: Path) -> Any:
    return json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_manifest(folder)
    assert caught.value.hint
    return str(caught.value)


def test_a_manifest_is_written_as_it_was_read(folder: Path, manifest: Manifest) -> None:
    assert (folder / MANIFEST_NAME).read_bytes() == GOLDEN.read_bytes()
    assert read_manifest(folder) == manifest
    assert manifest.exit_layers == (1, 2)
    EnginesFolder(folder, manifest).write()
    assert (folder / MANIFEST_NAME).read_bytes() == GOLDEN.read_bytes()
    assert [path.name for path in folder.iterdir()] == [MANIFEST_NAME]


def test_a_manifest_that_is_a_link_is_read_and_then_replaced(
    folder: Path, manifest: Manifest
) -> None:
    blob = folder / "blob"
    (folder / MANIFEST_NAME).rename(blob)
    (folder / MANIFEST_NAME).symlink_to("blob")
    assert read_manifest(folder) == manifest
    changed = msgspec.structs.replace(manifest, fpabee_version="0.9.9")
    EnginesFolder(folder, changed).write()
    assert blob.read_bytes() == GOLDEN.read_bytes()
    assert not (folder / MANIFEST_NAME).is_symlink()
    assert read_manifest(folder) == changed


def test_a_folder_keeps_at_least_one_target(folder: Path, manifest: Manifest) -> None:
    engines = EnginesFolder(folder, manifest)
    assert engines.keep_targets(lambda *_: False) == engines


@pytest.mark.parametrize("damage", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_manifest_that_is_a_pipe_or_a_device_is_not_read(
    folder: Path, damage: Callable[[Path], object]
) -> None:
    (folder / MANIFEST_NAME).unlink()
    damage(folder / MANIFEST_NAME)
    assert "not a regular file" in refusal(folder)
    assert not is_engines_folder(folder)


def test_a_large_file_that_is_no_manifest_takes_hardly_more_memory_than_its_size(
    folder: Path,
) -> None:
    content = b'{"segments": [' + b'"x", ' * 400_000 + b"1]}"
    (folder / MANIFEST_NAME).write_bytes(content)
    tracemalloc.start()
    try:
        assert not is_engines_folder(folder)
        assert "is damaged" in refusal(folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(content)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    assert "has no manifest.json -> give the folder that an export" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "holds a model" in refusal(tmp_path)
    assert "with `convert`" in refusal(tmp_path)
    assert "does not exist -> give the folder that an export" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("written", "says"),
    [
        (
            {"schema_version": "0.9", "fpabee_version": "0.1.0"},
            "0.1.0 and has schema 0.9",
        ),
        (
            {"schema_version": "2.0", "fpabee_version": "3.4.5"},
            "3.4.5 and has schema 2.0",
        ),
        ({"schema_version": "1.2", "fpabee_version": "1.2.0"}, "1.2.0 and has schema 1.2"),
        ({"schema_version": "2.0"}, "of another version and has schema 2.0"),
    ],
)
def test_other_schemas_are_refused(folder: Path, written: Json, says: str) -> None:
    """What another version wrote may have any other content."""
    (folder / MANIFEST_NAME).write_text(json.dumps({**written, "graphs": 7}))
    message = refusal(folder)
    assert f"was written by fpabee {says}; this fpabee reads schema {SCHEMA_VERSION}" in message
    assert " -> export or convert the model again" in message


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'{"schema_version": 1.0}',
        b'{"schema_version": "1.0"}',
        b'{"schema_version": "1.0", "x": NaN}',
        b'{"schema_version": "1.0", "x": "\xff"}',
        b'{"schema_version": "1.0", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_damaged_json_is_refused(folder: Path, raw: bytes) -> None:
    (folder / MANIFEST_NAME).write_bytes(raw)
    message = refusal(folder)
    assert "is damaged" in message
    assert "export or convert the model again" in message
    assert "\n" not in message


def updated(*path: str | int, **fields: Any) -> Change:
    """A change of some fields of a record; None removes a field."""

    def how(content: Any) -> None:
        for key in path:
            content = content[key]
        for name, value in fields.items():
            content.pop(name) if value is None else content.update({name: value})

    return how


FIRST_STAGE: Json = {"weights": [1, 2, 3], "bias": 0.5}
ONE = ("graphs", "one", "outputs", 0)
FAST = ("targets", TARGET, "operating_points", "fast")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (updated(task=None), "task"),
        (updated("segments", 0, calls=[]), "calls"),
        (updated("segments", 0, calls=["x"]), "calls graph 'x'"),
        (updated("model", hidden_size=10**12), "hidden_size"),
        (updated("task", labels=["a"], label_thresholds=[]), "names 1 labels, but the heads give"),
        (updated("task", problem_type="token_classification"), "problem_type"),
        (updated("task", label_thresholds=[0.5]), "1 label thresholds for 2 labels"),
        (updated("task", label_thresholds=[0.5, 1.5]), "label_thresholds"),
        (updated("task", label_thresholds=[0.5, NAN]), "malformed"),
        (updated("precisions", "fp16", one=None), "fp16 graphs do not have the names"),
        (updated("tokenizer", sha256="G" * 64), "sha256"),
        (updated("tokenizer", max_length=0), "max_length"),
        (updated("graphs", "one", "inputs", 0, name="x"), "segment 1 needs 'x'"),
        (lambda m: m["graphs"]["one"]["outputs"].pop(), "segment 1 produces no logits"),
        (updated("graphs", "two", "inputs", 0, dtype="float16"), "different 'hidden_states'"),
        (updated(*ONE, dtype="O"), "dtype"),
        (updated(*ONE, shape=["time"]), "shape"),
        (updated(default_target="other"), "default target 'other' is not listed"),
        (updated(default_rule={"name": ["x"]}), "default_rule"),
        (lambda m: m["targets"].update({"../x": m["targets"][TARGET]}), "'../x'"),
        (updated("targets", TARGET, "files", one=None), "does not have one file for each graph"),
        (updated("targets", TARGET, tolerance=-1), "tolerance"),
        (updated(*FAST, exits=[-1, 2]), "exits"),
        (updated(*FAST, exits=[1, 2, 3]), "'fast' of target"),
        (updated(*FAST, exits=[0, 0]), "not all 0"),
        (updated("task", labels=["a", "a"]), "the same name"),
        (updated(first_stage=FIRST_STAGE), "but it classifies"),
        (updated(first_stage=FIRST_STAGE | {"weights": [1, 2]}), "first_stage.weights"),
        (updated(first_stage=FIRST_STAGE | {"bias": 1e31}), "first_stage.bias"),
        (updated(first_stage=FIRST_STAGE | {"bias": NAN}), "malformed"),
        (updated("segments", 1, layer=1), "after layers"),
        (updated("model", layers=9), "up to 9"),
        (updated("targets", TARGET, precision="x", graph_precision=""), "graphs in 'x'"),
    ],
)
def test_the_wrong_field_is_named(folder: Path, how: Change, says: str) -> None:
    change(folder, how)
    message = refusal(folder)
    assert "is damaged" in message
    assert says in message
