"""Read and write an engines folder: its manifest, its paths, its hashes.

The only module that touches the manifest's JSON. Hashes find damage, not malice.

A file of the folder may be a symbolic link, even to a place outside, as in the cache that Hugging
Face's `snapshot_download` makes. Only regular files are opened, and each file that
the manifest names must have the hash that the manifest gives.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from ..errors import COPY_AGAIN, EXPORT_AGAIN, ArtifactError, InputError
from .manifest import (
    MANIFEST_NAME,
    QUICK_PASS_VERSION,
    SCHEMA_VERSION,
    BuiltFile,
    Graph,
    Manifest,
    Target,
)
from .quick import quick_targets
from .untrusted.consistency import problems
from .untrusted.graph_content import check_graph

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BAD_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)
"""The errors of msgspec for bytes that are not the JSON that was expected."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_regular(path: Path) -> bytes:
    """The content of a manifest: a pipe would block, and `/dev/zero` would never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return path.read_bytes()


@dataclass(frozen=True)
class EnginesFolder:
    """An engines folder: where it is, and what its manifest says.

    Attributes:
        path: the folder.
        manifest: its manifest, which may have changes that are not written yet.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def read(cls, path: str | Path) -> EnginesFolder:
        """The folder as it is on disk; see `read_manifest` for the errors."""
        return cls(Path(path), read_manifest(path))

    def absolute(self) -> EnginesFolder:
        """The same folder, also after the process has changed its directory."""
        return replace(self, path=self.path.absolute())

    def write(self) -> None:
        """Write the manifest atomically, with the lowest version that can say what it says.

        A manifest that is a link is replaced; the file behind the link is not changed.

        Raises:
            ArtifactError: the folder cannot be written. The old manifest is then unchanged.
        """
        manifest = self.manifest
        needs_new = any(quick_targets(manifest, target) for target in manifest.targets)
        version = QUICK_PASS_VERSION if needs_new else SCHEMA_VERSION
        written = msgspec.structs.replace(manifest, schema_version=version)
        text = msgspec.json.format(msgspec.json.encode(written), indent=2) + b"\n"
        write_whole(self.path / MANIFEST_NAME, text)

    def with_manifest(self, **changes: Any) -> EnginesFolder:
        """The folder with other values of some fields of the manifest, which is not written."""
        return replace(self, manifest=msgspec.structs.replace(self.manifest, **changes))

    def with_target(self, name: str, target: Target) -> EnginesFolder:
        """The folder with one target more, or with one target replaced."""
        return self.with_manifest(targets={**self.manifest.targets, name: target})

    def keep_targets(self, keep: Callable[[str, Target], bool]) -> EnginesFolder:
        """The folder with those of its targets that are kept; unchanged if none would remain."""
        manifest = self.manifest
        targets = {name: target for name, target in manifest.targets.items() if keep(name, target)}
        if not targets:
            return self
        kept = self.with_manifest(targets=targets)
        if manifest.default_target in targets:
            return kept
        return kept.with_manifest(default_target=next(iter(targets)), default_is_fixed=False)

    def file(self, relative: str, sha256: str) -> Path:
        """The path of a file of the folder, after checking its hash; see `checked_file`."""
        return checked_file(self.path, relative, sha256)

    def graph(self, record: Graph | BuiltFile) -> Path:
        """The path of an ONNX graph, after checking its hash and its content.

        Raises:
            ArtifactError: as in `file`, or the graph holds something that the exporter does not
                write, see `graph_content`.
        """
        path = self.file(record.file, record.sha256)
        check_graph(path)
        return path

    def hashes(self, target: str | None = None) -> list[tuple[str, str]]:
        """The path and SHA-256 of each file that the manifest names.

        Args:
            target: leave out the graphs and built files that neither this target runs nor the quick
                passes of its operating points.

        Raises:
            ArtifactError: the folder does not have the graphs that the target runs.
        """
        manifest = self.manifest
        parts: list[Mapping[str, Graph | BuiltFile]]
        if target is None:
            built = (each.files for each in manifest.targets.values())
            parts = [manifest.graphs, *manifest.precisions.values(), *built]
        else:
            names = {target, *quick_targets(manifest, target)} & manifest.targets.keys()
            runs = [each for name, each in manifest.targets.items() if name in names]
            parts = [each.files or manifest.graphs_of(each) for each in runs]
        files = [(manifest.tokenizer.file, manifest.tokenizer.sha256), *manifest.files.items()]
        if manifest.exit_0 is not None:
            files.append((manifest.exit_0.file, manifest.exit_0.sha256))
        files += [(each.file, each.sha256) for part in parts for each in part.values()]
        return list(dict.fromkeys(files))

    def damage(self) -> list[str]:
        """The problem of each file that the manifest names; empty for an intact file."""
        problems = []
        for file, sha256 in self.hashes():
            try:
                path = self.file(file, sha256)
                if path.suffix == ".onnx":
                    check_graph(path)
                problems.append("")
            except ArtifactError as error:
                problems.append(error.message)
        return problems


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of an engines folder; other files are not read.

    Args:
        folder: the folder.

    Raises:
        ArtifactError: the folder is not an engines folder, or its manifest is damaged,
            inconsistent, or of another schema.
    """
    path = Path(folder) / MANIFEST_NAME
    hint = "give the folder that an export or a conversion wrote"
    try:
        if not path.parent.is_dir():
            problem = "is not a folder" if path.parent.exists() else "does not exist"
            raise ArtifactError(f"engines folder {folder} {problem}", hint)
        content = _read_regular(path)
    except FileNotFoundError as error:
        if _is_model_dir(path.parent):
            raise ArtifactError(
                f"{folder} holds a model, and no engines were made of it yet",
                "make them with `convert` if it is a classifier or a reranker, with `export` if it "
                "has exits",
            ) from error
        raise ArtifactError(
            f"{folder} is not an engines folder: it has no {MANIFEST_NAME}", hint
        ) from error
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}",
            "check that it is a file, and its permissions",
        ) from error
    return _parsed(path, content)


def is_engines_folder(folder: Path) -> bool:
    """Whether a folder has a manifest of any version, even an invalid one."""
    try:
        content = _read_regular(folder / MANIFEST_NAME)
        fields = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (OSError, *BAD_JSON):
        return False
    return {"schema_version", "fpabee_version"} <= fields.keys()


def strings_of_manifest(folder: Path) -> set[str]:
    """All texts in a manifest of any version, among which are the names of the folder's files.

    Raises:
        OSError: it cannot be read.
    """
    content = msgspec.json.decode(_read_regular(folder / MANIFEST_NAME))
    strings = set()
    left = [content]
    while left:
        item = left.pop()
        if isinstance(item, str):
            strings.add(item)
        elif isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item
    return strings


def check_outside(output: Path) -> None:
    """Refuse an output inside an engines folder or a model_dir, whose files it could replace.

    Args:
        output: the file or folder to write. It may be such a folder itself.

    Raises:
        InputError: it is inside such a folder, as it is named or where its links lead.
    """
    as_named = os.path.normpath(output.absolute())
    behind_links = os.path.realpath(output)
    for folder in dict.fromkeys((*Path(as_named).parents, *Path(behind_links).parents)):
        if is_engines_folder(folder) or _is_model_dir(folder):
            raise InputError(
                f"{output} is inside {folder}, which holds a model and must not change",
                "write to a path outside of that folder",
            )


def _is_model_dir(folder: Path) -> bool:
    """Whether a folder looks like a model of Hugging Face: a configuration beside weights."""
    weights = "*.safetensors", "pytorch_model*.bin"
    try:
        is_configured = (folder / "config.json").is_file()
        return is_configured and any(any(folder.glob(pattern)) for pattern in weights)
    except OSError:
        return False


def write_whole(path: Path, *parts: bytes) -> None:
    """Write parts as one file, as a whole or not at all; a link is replaced, not followed.

    Raises:
        ArtifactError: the file cannot be written.
    """
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.stem}-"
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=prefix, delete=False) as file:
            partial = Path(file.name)
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise ArtifactError(
            f"cannot write {path}: {error.strerror}",
            "check the folder's permissions and free space",
        ) from error


def lock(handle: int) -> None:
    """Lock an open file or folder until it is closed; does nothing on Windows.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: the system cannot lock it.
    """
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def resolve(folder: Path, relative: str) -> Path:
    """The path of a file of the artifact; its content is not read, see `checked_file`.

    Raises:
        ArtifactError: the path leaves the folder, or is not a regular file.
    """
    pure = PurePosixPath(relative)
    path = folder / pure
    odd = not relative or ".." in pure.parts or "\\" in relative or "\0" in relative
    if odd or pure.is_absolute() or not path.is_relative_to(folder):
        raise ArtifactError(
            f"{folder / MANIFEST_NAME} names {relative!r}, which is outside the engines folder",
            "do not use this folder; export or convert the model again",
        )
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{path} is missing, but the manifest names it", COPY_AGAIN) from error
    except OSError as error:  # a path that is too long, a link to itself, or no permission
        raise ArtifactError(f"{path} cannot be opened: {error.strerror}", COPY_AGAIN) from error
    if not stat.S_ISREG(mode):
        raise ArtifactError(f"{path} is not a regular file, but the manifest names it", COPY_AGAIN)
    return path


def checked_file(folder: Path, relative: str, sha256: str) -> Path:
    """The path of a file of the artifact, after checking its hash.

    Raises:
        ArtifactError: the file is missing, outside the folder, not a regular file, or damaged.
    """
    path = resolve(folder, relative)
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}", "check the permissions, or copy it again"
        ) from error
    if actual != sha256:
        raise ArtifactError(
            f"{path} is damaged: sha256 {actual[:12]}..., expected {sha256[:12]}...",
            COPY_AGAIN,
        )
    return path


class _Written(msgspec.Struct):
    """The writer of a manifest; the rest of another schema may be anything."""

    schema_version: str
    fpabee_version: str = "of another version"


def _parsed(path: Path, content: bytes) -> Manifest:
    try:
        written = msgspec.json.decode(content, type=_Written)
        if written.schema_version not in (SCHEMA_VERSION, QUICK_PASS_VERSION):
            raise ArtifactError(
                f"{path} was written by fpabee {written.fpabee_version} and has schema "
                f"{written.schema_version}; this fpabee reads schema {SCHEMA_VERSION} and "
                f"{QUICK_PASS_VERSION}",
                f"{EXPORT_AGAIN}, or use the fpabee that wrote it",
            )
        manifest = msgspec.json.decode(content, type=Manifest)
        problem = next(problems(manifest), None)
    except BAD_JSON as error:
        problem = str(error) or type(error).__name__
    if problem is not None:
        raise ArtifactError(f"{path} is damaged: {problem}", EXPORT_AGAIN)
    return manifest
