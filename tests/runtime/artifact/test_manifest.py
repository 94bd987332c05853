"""The artifact: what is read, what is refused, and what a rewrite keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fpabee.runtime.artifact import folder as engines_folder
from fpabee.runtime.artifact.folder import (
    is_engines_folder,
    read_manifest,
    resolve,
    sha256_of,
    verified,
    write_manifest,
)
from fpabee.runtime.artifact.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    BuiltFile,
    Graph,
    Manifest,
    Model,
    ProblemType,
    Range,
    Segment,
    Shapes,
    Target,
    Task,
    TensorSpec,
    TokenizerSpec,
    Verification,
)
from fpabee.runtime.artifact.operating_point import Certificate, Goal, OperatingPoint
from fpabee.runtime.errors import ArtifactError

Json = dict[str, Any]
Change = Callable[[Json], object]


@pytest.fixture
def manifest() -> Manifest:
    """A manifest that uses every record there is."""
    digest = "0" * 64
    tokens = TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence"))
    hidden = TensorSpec(name="next_hidden_states", dtype="float32", shape=("batch", "sequence", 8))
    carried = msgspec.structs.replace(hidden, name="hidden_states")
    logits = TensorSpec(name="logits", dtype="float32", shape=("batch", 2))
    return Manifest(
        schema_version=SCHEMA_VERSION,
        fpabee_version="0.1.0",
        versions={"torch": "2.9"},
        model=Model(
            model_type="bert",
            layers=2,
            hidden_size=8,
            shared_layers=False,
            pooling="mean",
            source_sha256={"config.json": digest},
        ),
        task=Task(
            problem_type=ProblemType.MULTI_LABEL, labels=("no", "да"), label_thresholds=(0.5, 0.25)
        ),
        tokenizer=TokenizerSpec(
            file="tokenizer/tokenizer.json",
            sha256=digest,
            max_length=16,
            pad_id=0,
            inputs=("input_ids",),
        ),
        shapes=Shapes(batch=Range(min=1, opt=8, max=32), sequence=Range(min=1, opt=16, max=16)),
        verification=Verification(
            rows=12, max_logit_difference=1e-6, label_agreement=1.0, exit_agreement=1.0
        ),
        graphs={
            "one": Graph(
                file="one.onnx", sha256=digest, inputs=(tokens,), outputs=(hidden, logits)
            ),
            "two": Graph(file="two.onnx", sha256=digest, inputs=(carried,), outputs=(logits,)),
        },
        precisions={
            "fp16": {
                name: Graph(file=f"{name}.16", sha256=digest, inputs=(carried,), outputs=(logits,))
                for name in ("one", "two")
            }
        },
        segments=(
            Segment(exit=1, layer=1, calls=("one",)),
            Segment(exit=2, layer=2, calls=("one", "two")),
        ),
        targets={
            "tensorrt-fp16-sm87": Target(
                backend="tensorrt",
                precision="fp16",
                device="sm87",
                versions={"tensorrt": "10.3"},
                files={
                    name: BuiltFile(file=f"{name}.plan", sha256=digest, onnx_sha256=digest)
                    for name in ("one", "two")
                },
                tolerance=0.01,
                row_invariant=False,
                operating_points={
                    "fast": OperatingPoint(
                        rule={"name": "entropy", "threshold": (0.25, 0.5)},
                        goal=Goal(max_drop=2.0),
                        metric="accuracy",
                        score=0.9,
                        full_depth_score=0.91,
                        drop_interval=(0.1, 1.9),
                        held_out="test.jsonl",
                        rows=100,
                        data_sha256=digest,
                        mean_depth=1.5,
                        exits=(50, 50),
                        theoretical_speedup=1.33,
                        estimated_speedup=1.3,
                        certificate=Certificate(
                            risk_of="drop", risk=1.0, confidence=95.0, rows=100
                        ),
                    )
                },
            )
        },
        default_target="tensorrt-fp16-sm87",
        default_rule={"name": "pabee", "patience": 1},
        files={"reference.npz": digest},
    )


@pytest.fixture
def folder(tmp_path: Path, manifest: Manifest) -> Path:
    """A folder that holds the manifest."""
    write_manifest(tmp_path, manifest)
    return tmp_path


def change(folder: Path, how: Change) -> None:
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    how(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def content_of(folder: Path) -> Any:
    return json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        read_manifest(folder)
    assert caught.value.hint
    return str(caught.value)


def test_a_manifest_comes_back_as_it_was_written(folder: Path, manifest: Manifest) -> None:
    assert read_manifest(folder) == manifest
    assert manifest.exit_layers == (1, 2)
    assert [path.name for path in folder.iterdir()] == [MANIFEST_NAME]


def test_writing_again_changes_no_byte(folder: Path) -> None:
    before = (folder / MANIFEST_NAME).read_bytes()
    write_manifest(folder, read_manifest(folder))
    assert (folder / MANIFEST_NAME).read_bytes() == before


@pytest.mark.parametrize(
    "where",
    [
        (),
        ("model",),
        ("task",),
        ("tokenizer",),
        ("graphs", "two"),
        ("graphs", "two", "inputs", 0),
        ("segments", 1),
        ("targets", "tensorrt-fp16-sm87"),
        ("targets", "tensorrt-fp16-sm87", "files", "one"),
        ("targets", "tensorrt-fp16-sm87", "operating_points", "fast"),
    ],
    ids=str,
)
def test_fields_of_a_newer_minor_version_survive_a_rewrite(
    folder: Path, where: tuple[str | int, ...]
) -> None:
    def record(content: Any) -> Any:
        for key in where:
            content = content[key]
        return content

    change(folder, lambda content: content.update(schema_version="1.7"))
    change(folder, lambda content: record(content).update(novelty={"a": [1, 2]}))
    manifest = read_manifest(folder)
    changed = msgspec.structs.replace(manifest, fpabee_version="0.9.9")
    write_manifest(folder, changed)
    content = content_of(folder)
    assert record(content)["novelty"] == {"a": [1, 2]}
    assert (content["schema_version"], content["fpabee_version"]) == ("1.7", "0.9.9")
    assert read_manifest(folder) == changed


def test_what_is_removed_does_not_come_back(folder: Path) -> None:
    manifest = read_manifest(folder)
    ((name, target),) = manifest.targets.items()
    without = {name: msgspec.structs.replace(target, operating_points={})}
    write_manifest(folder, msgspec.structs.replace(manifest, targets=without, files={}))
    assert content_of(folder)["targets"][name]["operating_points"] == {}
    assert content_of(folder)["files"] == {}


Replaced = Callable[[Manifest], Manifest]


def with_point(**fields: Any) -> Replaced:
    """The manifest with an operating point that says something else."""

    def replaced(manifest: Manifest) -> Manifest:
        ((name, target),) = manifest.targets.items()
        point = msgspec.structs.replace(target.operating_points["fast"], **fields)
        target = msgspec.structs.replace(target, operating_points={"fast": point})
        return msgspec.structs.replace(manifest, targets={name: target})

    return replaced


def with_tolerance(value: float) -> Replaced:
    def replaced(manifest: Manifest) -> Manifest:
        ((name, target),) = manifest.targets.items()
        target = msgspec.structs.replace(target, tolerance=value)
        return msgspec.structs.replace(manifest, targets={name: target})

    return replaced


NAN = float("nan")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (with_point(theoretical_speedup=NAN), "theoretical_speedup"),
        (with_point(exits=(1.5,)), "exits"),
        (with_point(rule={"name": "entropy", "threshold": NAN}), "read as another one"),
        (with_tolerance(NAN), "read as another one"),
        (lambda m: msgspec.structs.replace(m, default_target="none"), "default target 'none'"),
        (lambda m: msgspec.structs.replace(m, fpabee_version="0" * 2**24), "bytes"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(
    folder: Path, how: Replaced, says: str
) -> None:
    before = (folder / MANIFEST_NAME).read_bytes()
    with pytest.raises(ArtifactError, match=f"was not written.*{says}") as caught:
        write_manifest(folder, how(read_manifest(folder)))
    assert "report it" in caught.value.hint
    assert [path.name for path in folder.iterdir()] == [MANIFEST_NAME]
    assert (folder / MANIFEST_NAME).read_bytes() == before


def test_a_manifest_that_is_a_link_is_read_and_then_replaced(
    folder: Path, manifest: Manifest
) -> None:
    blob = folder / "blob"
    (folder / MANIFEST_NAME).rename(blob)
    (folder / MANIFEST_NAME).symlink_to("blob")
    before = blob.read_bytes()
    assert read_manifest(folder) == manifest
    changed = msgspec.structs.replace(manifest, fpabee_version="0.9.9")
    write_manifest(folder, changed)
    assert blob.read_bytes() == before
    assert not (folder / MANIFEST_NAME).is_symlink()
    assert read_manifest(folder) == changed


@pytest.mark.parametrize("damage", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_manifest_that_is_a_pipe_or_a_device_is_not_read(
    folder: Path, damage: Callable[[Path], object]
) -> None:
    (folder / MANIFEST_NAME).unlink()
    damage(folder / MANIFEST_NAME)
    assert "not a regular file" in refusal(folder)
    assert not is_engines_folder(folder)


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write .*manifest.json"):
        write_manifest(tmp_path / "nowhere", manifest)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert "does not exist" in message
    assert "fpabee-export model_dir -o engines/" in message


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    assert "it has no manifest.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("2.0", "pip install 'fpabee==3.4.5'"),
        ("0.9", "this fpabee reads 1.0"),
        ("1", "not of the form major.minor"),
        ("1.x", "not of the form major.minor"),
        ("", "not of the form major.minor"),
        (1.0, "is damaged"),
        (None, "is damaged"),
    ],
)
def test_other_schema_versions(folder: Path, version: Any, says: str) -> None:
    # Checked before all else: a newer manifest may have any shape.
    (folder / MANIFEST_NAME).write_text(
        json.dumps({"schema_version": version, "fpabee_version": "3.4.5", "graphs": 7})
    )
    assert says in refusal(folder)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not JSON",
        b"[]",
        b"{}",
        b'{"schema_version": "1.0"}',
        b'{"schema_version": "1.0", "x": NaN}',
        b'{"schema_version": "1.\xff"}',
        b'{"schema_version": "1.0", "x": "\xff"}',
        b'{"schema_version": "1.0", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 100_000,
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_damaged_json(folder: Path, raw: bytes) -> None:
    (folder / MANIFEST_NAME).write_bytes(raw)
    message = refusal(folder)
    assert "is damaged" in message
    assert "fpabee-export" in message
    assert "\n" not in message


def test_an_endless_manifest_is_not_read(folder: Path) -> None:
    with (folder / MANIFEST_NAME).open("ab") as file:
        file.truncate(17 * 2**20)
    assert "more than 16777216 bytes" in refusal(folder)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (lambda m: m.pop("task"), "task"),
        (lambda m: m.update(segments={}), "segments"),
        (lambda m: m.update(segments=[]), "segments"),
        (lambda m: m["segments"][0].update(exit="1"), "exit"),
        (lambda m: m["segments"][0].update(exit=2), "segment 1 says it ends at exit 2"),
        (lambda m: m["segments"][0].update(calls=[]), "calls"),
        (lambda m: m["segments"][0].update(calls=["x"]), "calls graph 'x', which is not listed"),
        (lambda m: m["segments"][0].update(layer=2), "do not ascend to 2"),
        (lambda m: m["segments"][1].update(layer=3), "do not ascend to 2"),
        (lambda m: m["model"].update(layers=-1), "layers"),
        (lambda m: m["model"].update(hidden_size=10**12), "hidden_size"),
        (lambda m: m["task"].update(labels=[]), "labels"),
        (lambda m: m["task"].update(labels=["a", "a"]), "a label name appears twice"),
        (lambda m: m["task"].update(labels=[1, 2]), "labels"),
        (lambda m: m["precisions"]["fp16"].pop("one"), "fp16 graphs are not those of fp32"),
        (lambda m: m["precisions"].clear(), "is in fp16, of which there are no graphs"),
        (
            lambda m: m["targets"]["tensorrt-fp16-sm87"]["files"].pop("one"),
            "does not have one file for each graph",
        ),
        (lambda m: m["task"].update(problem_type="regression"), "problem_type"),
        (lambda m: m["task"].update(cuts=[0.5]), "1 cuts for 2 labels"),
        (lambda m: m["task"].update(cuts=[0.5, 1.5]), "cuts"),
        (lambda m: m["task"].update(cuts=[0.5, float("nan")]), "malformed"),
        (lambda m: m["tokenizer"].update(sha256="0" * 63), "sha256"),
        (lambda m: m["tokenizer"].update(sha256="G" * 64), "sha256"),
        (lambda m: m["tokenizer"].update(max_length=0), "max_length"),
        (
            lambda m: m["tokenizer"].update(max_length=1_000_000),
            "texts may have 1000000 tokens, but the graphs take 16",
        ),
        (lambda m: m["tokenizer"].update(pad_id=-1), "pad_id"),
        (lambda m: m["graphs"]["one"].update(inputs=[{"name": "x"}]), "inputs"),
        (lambda m: m["graphs"]["one"]["inputs"][0].update(name="x"), "segment 1 needs 'x'"),
        (lambda m: m["graphs"]["one"]["outputs"].pop(), "segment 1 gives no logits"),
        (
            lambda m: m["graphs"]["two"]["inputs"][0].update(dtype="float16"),
            "graph two has another 'hidden_states'",
        ),
        (lambda m: m["graphs"]["one"]["outputs"][0].update(dtype="O"), "dtype"),
        (lambda m: m["graphs"]["one"]["outputs"][0].update(shape=["time"]), "shape"),
        (lambda m: m["graphs"]["one"]["outputs"][0].update(shape=[-1]), "shape"),
        (
            lambda m: m["graphs"]["one"]["outputs"][0].update(shape=[2**11, 2**11]),
            "larger than that of any model",
        ),
        (
            lambda m: m["task"].update(labels=["a"], cuts=[]),
            "names 1 labels, but the heads give",
        ),
        (lambda m: m.update(default_target="other"), "default target 'other' is not listed"),
        (lambda m: m["targets"].update({"../x": m["targets"]["tensorrt-fp16-sm87"]}), "'../x'"),
        (lambda m: m.update(default_rule={"name": ["x"]}), "default_rule"),
        (lambda m: m["targets"]["tensorrt-fp16-sm87"].update(tolerance=-1), "tolerance"),
        (lambda m: m["targets"]["tensorrt-fp16-sm87"].update(tolerance="a"), "tolerance"),
    ],
)
def test_wrong_content_is_named(folder: Path, how: Change, says: str) -> None:
    change(folder, how)
    message = refusal(folder)
    assert "is damaged" in message
    assert says in message


def test_a_file_with_the_right_hash_is_found(folder: Path) -> None:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "a.onnx").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(folder / "onnx" / "a.onnx") == digest
    assert verified(folder, "onnx/a.onnx", digest) == folder / "onnx" / "a.onnx"


def test_a_flipped_byte_is_found(folder: Path) -> None:
    path = folder / "a.onnx"
    path.write_bytes(bytes(3 * 2**20))
    digest = sha256_of(path)
    with path.open("r+b") as file:
        file.seek(2**21)
        file.write(b"\1")
    with pytest.raises(ArtifactError, match=r"a\.onnx is damaged: sha256 .*copy"):
        verified(folder, "a.onnx", digest)


def test_a_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a\.onnx is missing.*copy the whole"):
        resolve(folder, "a.onnx")


@pytest.mark.parametrize(
    "relative",
    [
        "",
        ".",
        "..",
        "../outside.onnx",
        "onnx/../../outside.onnx",
        "/etc/hostname",
        "..\\outside.onnx",
        "a\0b",
        "a" * 5000,
    ],
    ids=lambda relative: repr(relative[:20]),
)
def test_a_path_that_leaves_the_folder_or_is_no_file(folder: Path, relative: str) -> None:
    inner = folder / "engines"
    inner.mkdir()
    (folder / "outside.onnx").write_bytes(b"x")
    with pytest.raises(ArtifactError):
        resolve(inner, relative)


DIGEST = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc"


@pytest.mark.parametrize("relative", ["a.onnx", "sub/blob"])
def test_a_link_may_leave_the_folder_if_the_hash_fits(folder: Path, relative: str) -> None:
    inner = folder / "engines"
    inner.mkdir()
    (folder / "blob").write_bytes(b"abc")
    (inner / "a.onnx").symlink_to("../blob")
    (inner / "sub").symlink_to("..")
    assert verified(inner, relative, DIGEST).read_bytes() == b"abc"
    (folder / "blob").write_bytes(b"abd")
    with pytest.raises(ArtifactError, match="is damaged"):
        verified(inner, relative, DIGEST)


def test_a_link_to_nothing_is_a_missing_file(folder: Path) -> None:
    (folder / "a.onnx").symlink_to("../blob")
    with pytest.raises(ArtifactError, match=r"a\.onnx is missing"):
        resolve(folder, "a.onnx")


@pytest.mark.parametrize("what", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_only_regular_files_are_opened(folder: Path, what: Callable[[Path], object]) -> None:
    what(folder / "a.onnx")
    with pytest.raises(ArtifactError, match=r"a\.onnx is not a regular file"):
        verified(folder, "a.onnx", DIGEST)


def test_a_file_larger_than_any_model_is_not_read(folder: Path) -> None:
    with (folder / "a.onnx").open("wb") as file:
        file.truncate(engines_folder.MAX_FILE_BYTES + 1)
    with pytest.raises(ArtifactError, match="more than any model"):
        verified(folder, "a.onnx", DIGEST)


def test_a_file_that_gives_more_than_its_size_is_not_read_to_its_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "a.onnx"
    path.write_bytes(b"abc")
    monkeypatch.setattr(engines_folder, "MAX_FILE_BYTES", 2)
    monkeypatch.setattr(engines_folder, "resolve", lambda folder, relative: path)
    with pytest.raises(ArtifactError, match="more than 2 bytes"):
        verified(folder, "a.onnx", DIGEST)


def test_a_link_to_itself_is_refused(folder: Path) -> None:
    (folder / "a.onnx").symlink_to("a.onnx")
    with pytest.raises(ArtifactError):
        resolve(folder, "a.onnx")


def test_a_link_within_the_folder_and_to_the_folder_is_followed(folder: Path) -> None:
    (folder / "a.onnx").write_bytes(b"x")
    (folder / "b.onnx").symlink_to("a.onnx")
    (folder / "engines").symlink_to(".")
    assert resolve(folder / "engines", "b.onnx").read_bytes() == b"x"
