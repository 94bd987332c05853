"""Read and write an engines folder: its manifest, its paths, its hashes.

The only module that touches the manifest's JSON. Hashes find damage, not malice.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from .errors import ArtifactError
from .graphs import chain_problem
from .manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest

_MAX_MANIFEST_BYTES = 16 * 2**20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of an engines folder; other files are not looked at.

    Args:
        folder: the folder.

    Raises:
        ArtifactError: no engines folder, damaged, inconsistent, or a newer schema.
    """
    path = Path(folder)
    manifest = _decode(path, _read_bytes(path))
    _check_consistency(path, manifest)
    return manifest


def is_engines_folder(folder: Path) -> bool:
    """Whether a folder holds a manifest of ours, of any version, damaged inside or not."""
    try:
        content = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes())
    except (OSError, msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False
    return isinstance(content, dict) and {"schema_version", "fpabee_version"} <= content.keys()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically, keeping fields of the old one that this version lacks.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    new = _plain(manifest)
    if (folder / MANIFEST_NAME).is_file():
        raw = _read_bytes(folder)
        new = _graft(msgspec.json.decode(raw), _plain(_decode(folder, raw)), new)
    text = msgspec.json.format(msgspec.json.encode(new), indent=2) + b"\n"
    partial = None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".manifest-", delete=False) as file:
            partial = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(folder / MANIFEST_NAME)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise ArtifactError(
            f"cannot write {folder / MANIFEST_NAME}: {error.strerror}",
            "check the folder's permissions and free space",
        ) from error


def resolve(folder: Path, relative: str) -> Path:
    """The path of a file of the artifact.

    Raises:
        ArtifactError: the path leaves the folder, or the file is not there.
    """
    pure = PurePosixPath(relative)
    path = folder / pure
    leaves = pure.is_absolute() or ".." in pure.parts or "\\" in relative or not relative
    try:
        leaves = leaves or not path.resolve().is_relative_to(folder.resolve())
        is_file = path.is_file()
    # No path at all: a null byte, too long, or a link to itself.
    except (ValueError, OSError, RuntimeError):
        leaves, is_file = True, False
    if leaves:
        raise ArtifactError(
            f"{folder / MANIFEST_NAME} names {relative!r}, which is outside the engines folder",
            "do not use this folder; export the model again with fpabee-export",
        )
    if not is_file:
        raise ArtifactError(
            f"{path} is missing, though the manifest names it",
            "copy the whole engines folder again, or export again with fpabee-export",
        )
    return path


def verified(folder: Path, relative: str, sha256: str) -> Path:
    """The path of a file of the artifact whose hash is that of the manifest.

    Raises:
        ArtifactError: missing, outside the folder, or damaged.
    """
    path = resolve(folder, relative)
    found = sha256_of(path)
    if found != sha256:
        raise ArtifactError(
            f"{path} is damaged: sha256 {found[:12]}..., expected {sha256[:12]}...",
            "copy the engines folder again, or export again with fpabee-export",
        )
    return path


def _decode(folder: Path, raw: bytes) -> Manifest:
    try:
        versions = msgspec.json.decode(raw, type=_Version)
        _check_version(versions.schema_version, versions.fpabee_version)
        # Whole, too: fields that this version does not know must be fit to be written again.
        msgspec.json.decode(raw)
        return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{folder / MANIFEST_NAME} is damaged: {error or type(error).__name__}",
            "export the model again with fpabee-export",
        ) from error


class _Version(msgspec.Struct):
    schema_version: str
    fpabee_version: str = ""


def _read_bytes(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise ArtifactError(
            f"engines folder {folder} does not exist",
            "make one with: fpabee-export model_dir -o engines/",
        )
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is not an engines folder: it has no {MANIFEST_NAME}",
            "make one with: fpabee-export model_dir -o engines/",
        )
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise ArtifactError(
            f"{path} has {path.stat().st_size} bytes, more than any manifest",
            "export the model again with fpabee-export",
        )
    return path.read_bytes()


def _check_version(version: str, fpabee_version: str) -> None:
    if not re.fullmatch(r"\d{1,6}\.\d{1,6}", version):
        raise ArtifactError(
            f"schema_version {version!r} is not of the form major.minor",
            "export the model again with fpabee-export",
        )
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        written_by = f"=={fpabee_version}" if re.fullmatch(r"[\w.]+", fpabee_version) else ""
        raise ArtifactError(
            f"the engines folder has schema {version}; this fpabee reads {SCHEMA_VERSION}",
            f"install the fpabee that wrote it: pip install 'fpabee{written_by}', "
            "or export again with this one",
        )


def _check_consistency(folder: Path, manifest: Manifest) -> None:
    problem = _inconsistency(manifest)
    if problem:
        raise ArtifactError(
            f"{folder / MANIFEST_NAME} is damaged: {problem}",
            "export the model again with fpabee-export",
        )


def _inconsistency(manifest: Manifest) -> str:
    for number, segment in enumerate(manifest.segments, start=1):
        if segment.exit != number:
            return f"segment {number} says it ends at exit {segment.exit}"
        for call in segment.calls:
            if call not in manifest.graphs:
                return f"segment {number} calls graph {call!r}, which is not listed"
    layers = manifest.exit_layers
    if list(layers) != sorted(set(layers)) or layers[-1] > manifest.model.layers:
        return f"the exits' layers {list(layers)} do not ascend to {manifest.model.layers}"
    problem = chain_problem(manifest.segments, manifest.graphs, len(manifest.task.labels))
    if problem:
        return problem
    if manifest.default_target not in manifest.targets:
        return f"the default target {manifest.default_target!r} is not listed"
    for precision, graphs in manifest.precisions.items():
        if graphs.keys() != manifest.graphs.keys():
            return f"its {precision} graphs are not those of fp32"
    for name, target in manifest.targets.items():
        if target.precision != "fp32" and target.precision not in manifest.precisions:
            return f"target {name} is in {target.precision}, of which there are no graphs"
        default = target.default_operating_point
        if default and default not in target.operating_points:
            return f"target {name} has no operating point {default!r}, its default"
        if target.files and target.files.keys() != manifest.graphs.keys():
            return f"target {name} does not have one file for each graph"
    labels = manifest.task.labels
    if len(set(labels)) != len(labels):
        return "a label name appears twice"
    if manifest.task.cuts and len(manifest.task.cuts) != len(labels):
        return f"{len(manifest.task.cuts)} cuts for {len(labels)} labels"
    return ""


def _plain(manifest: Manifest) -> Any:
    """The manifest as the dictionaries and lists that stand on disk."""
    return msgspec.json.decode(msgspec.json.encode(manifest))


def _graft(raw: Any, known: Any, new: Any) -> Any:
    """`new`, plus what `raw` holds and this version does not know.

    Args:
        raw: the old content as it stands on disk.
        known: the same content after reading, so without unknown fields.
        new: the content to write.
    """
    if isinstance(raw, dict) and isinstance(known, dict) and isinstance(new, dict):
        merged = {key: value for key, value in raw.items() if key not in known}
        for key, value in new.items():
            both = key in raw and key in known
            merged[key] = _graft(raw[key], known[key], value) if both else value
        return merged
    lists = isinstance(raw, list) and isinstance(known, list) and isinstance(new, list)
    if lists and len(raw) == len(known) == len(new):
        return [_graft(*items) for items in zip(raw, known, new, strict=True)]
    return new
