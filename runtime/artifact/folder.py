"""Read and write an engines folder: its manifest, its paths, its hashes.

The only module that touches the manifest's JSON. Hashes find damage, not malice.

A file of the folder may be a symbolic link, also to a place outside, as in the cache that Hugging
Face's `snapshot_download` makes. The content is what counts: only regular files of bounded size
are opened, and each file that the manifest names must have the hash that the manifest gives.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from ..errors import ArtifactError
from .graph_content import check_graph
from .graphs import chain_problem
from .manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest

_MAX_MANIFEST_BYTES = 16 * 2**20
# No file of an artifact comes near this: ONNX itself ends at 2 GiB, and plans are of that order.
MAX_FILE_BYTES = 16 * 2**30


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: it cannot be read, or gives more than `MAX_FILE_BYTES` bytes.
    """
    digest, left = hashlib.sha256(), MAX_FILE_BYTES
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            left -= len(block)
            if left < 0:
                raise OSError(errno.EFBIG, f"it has more than {MAX_FILE_BYTES} bytes", str(path))
            digest.update(block)
    return digest.hexdigest()


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file, or of one that a link leads to.

    A pipe would block, and a device such as `/dev/zero` would never end.

    Args:
        path: the file.
        most: how many bytes it may have.

    Raises:
        OSError: it is not there, is not a regular file, is larger, or cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return content


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of an engines folder; other files are not looked at.

    Args:
        folder: the folder.

    Raises:
        ArtifactError: no engines folder, damaged, inconsistent, or a newer schema.
    """
    path = Path(folder)
    return _checked(path, _read_bytes(path))


def is_engines_folder(folder: Path) -> bool:
    """Whether a folder holds a manifest of ours, of any version, damaged inside or not."""
    try:
        content = msgspec.json.decode(read_regular(folder / MANIFEST_NAME, _MAX_MANIFEST_BYTES))
    except (OSError, msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False
    return isinstance(content, dict) and {"schema_version", "fpabee_version"} <= content.keys()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically, keeping fields of the old one that this version lacks.

    A manifest that is a link is replaced; the file that the link leads to stays as it is.

    Raises:
        ArtifactError: the folder cannot be written, or `read_manifest` would not give this
            manifest again; the old one is then left as it is.
    """
    new = _plain(manifest)
    if (folder / MANIFEST_NAME).is_file():
        raw = _read_bytes(folder)
        new = _graft(msgspec.json.decode(raw), _plain(_decode(folder, raw)), new)
    text = msgspec.json.format(msgspec.json.encode(new), indent=2) + b"\n"
    _check_readable(folder, text, manifest)
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
    """The path of a file of the artifact; its content is not looked at, see `verified`.

    Raises:
        ArtifactError: the path leaves the folder, or there is no regular file of at most
            `MAX_FILE_BYTES` bytes.
    """
    pure = PurePosixPath(relative)
    path = folder / pure
    odd = not relative or ".." in pure.parts or "\\" in relative or "\0" in relative
    if odd or pure.is_absolute() or not path.is_relative_to(folder):
        raise ArtifactError(
            f"{folder / MANIFEST_NAME} names {relative!r}, which is outside the engines folder",
            "do not use this folder; export the model again with fpabee-export",
        )
    again = "copy the whole engines folder again, or export again with fpabee-export"
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{path} is missing, though the manifest names it", again) from error
    except OSError as error:  # too long, a link to itself, or no permission
        raise ArtifactError(f"{path} cannot be opened: {error.strerror}", again) from error
    if not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"{path} is not a regular file, though the manifest names it", again)
    if found.st_size > MAX_FILE_BYTES:
        raise ArtifactError(f"{path} has {found.st_size} bytes, more than any model", again)
    return path


def verified(folder: Path, relative: str, sha256: str) -> Path:
    """The path of a file of the artifact whose hash is that of the manifest.

    Raises:
        ArtifactError: missing, outside the folder, not a regular file, too large, or damaged.
    """
    path = resolve(folder, relative)
    try:
        found = sha256_of(path)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}", "check the permissions, or copy it again"
        ) from error
    if found != sha256:
        raise ArtifactError(
            f"{path} is damaged: sha256 {found[:12]}..., expected {sha256[:12]}...",
            "copy the engines folder again, or export again with fpabee-export",
        )
    return path


def verified_graph(folder: Path, relative: str, sha256: str) -> Path:
    """The path of an ONNX graph, as `verified`, that holds nothing the exporter does not write.

    Raises:
        ArtifactError: as `verified`, or its content is refused, see `graph_content`.
    """
    path = verified(folder, relative, sha256)
    check_graph(path)
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
    hint = "make one with: fpabee-export model_dir -o engines/"
    if not folder.is_dir():
        raise ArtifactError(f"engines folder {folder} does not exist", hint)
    try:
        return read_regular(path, _MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} is not an engines folder: it has no {MANIFEST_NAME}", hint
        ) from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}", hint) from error


def _checked(folder: Path, raw: bytes) -> Manifest:
    manifest = _decode(folder, raw)
    problem = _inconsistency(manifest)
    if problem:
        raise ArtifactError(
            f"{folder / MANIFEST_NAME} is damaged: {problem}",
            "export the model again with fpabee-export",
        )
    return manifest


def _check_readable(folder: Path, raw: bytes, manifest: Manifest) -> None:
    """Refuse to write what could not be read again: JSON has no NaN, which becomes null."""
    problem = ""
    try:
        if len(raw) > _MAX_MANIFEST_BYTES:
            problem = f"it would have {len(raw)} bytes"
        elif _checked(folder, raw) != manifest:
            problem = "it would be read as another one"
    except ArtifactError as error:
        problem = error.message
    if problem:
        raise ArtifactError(
            f"the new {MANIFEST_NAME} cannot be used, so it was not written: {problem}",
            "nothing was changed; this is a defect of fpabee: please report it",
        )


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
    asked, most = manifest.tokenizer.max_length, manifest.shapes.sequence.max
    if asked > most:
        return f"texts may have {asked} tokens, but the graphs take {most}"
    if manifest.default_target not in manifest.targets:
        return f"the default target {manifest.default_target!r} is not listed"
    for precision, graphs in manifest.precisions.items():
        if graphs.keys() != manifest.graphs.keys():
            return f"its {precision} graphs are not those of fp32"
    for name, target in manifest.targets.items():
        if not re.fullmatch(r"\w[\w.+-]*", name):  # it is part of the names of files
            return f"{name!r} is no name of a target"
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
    if manifest.task.label_thresholds and len(manifest.task.label_thresholds) != len(labels):
        return f"{len(manifest.task.label_thresholds)} cuts for {len(labels)} labels"
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
