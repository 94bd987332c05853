"""Write an engines folder completely or not at all, and never over anything else."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.artifact.folder import check_outside, is_engines_folder
from ..runtime.errors import ArtifactError


def resolved(output: str | Path) -> Path:
    """The real folder: a link stays, and the folder that it leads to is replaced."""
    return Path(os.path.realpath(output))


def check_output(target: Path, force: bool) -> None:
    """Refuse a folder that must not be written.

    Args:
        target: the folder.
        force: whether an engines folder may be replaced.

    Raises:
        ArtifactError: it holds something else, an engines folder that may not be replaced, or a
            disk of its own.
        InputError: it is inside an engines folder or a model_dir.
    """
    check_outside(target)
    if os.path.ismount(target):  # found now, and not when all is done
        raise ArtifactError(
            f"{target} is a mounted disk, which cannot be replaced",
            "give a folder in it as `output`",
        )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not is_engines_folder(target):
        raise ArtifactError(
            f"{target} exists and is not an engines folder; it will not be replaced",
            "give another folder as `output`",
        )
    if not force:
        raise ArtifactError(f"{target} already holds an engines folder", "replace it with `force`")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, which replaces the target at the end if nothing fails.

    Raises:
        ArtifactError: nothing can be written there.
    """
    folder = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True)  # with the usual permissions, unlike temporary folders
    except OSError as error:
        raise ArtifactError(
            f"cannot write in {target.parent}: {error.strerror}",
            "give a writable folder as `output`",
        ) from error
    try:
        yield folder
        publish(folder, target)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {target}: {error.strerror}", "check the free space and permissions"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary folder whose files are moved to the target when all of them are written.

    Raises:
        OSError: a file cannot be written; the target is unchanged.
    """
    # Inside of the target if it exists, which may be a disk of its own.
    place = target if target.exists() else target.parent
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=place) as name:
        yield Path(name)
        target.mkdir(exist_ok=True)
        for file in sorted(Path(name).iterdir()):
            file.replace(target / file.name)


def publish(folder: Path, target: Path) -> None:
    """Move a folder on the same disk to the target, which it replaces."""
    if not target.exists():
        folder.replace(target)
        return
    old = folder.with_name(folder.name + "-old")
    target.replace(old)
    try:
        folder.replace(target)
    except OSError:
        old.replace(target)
        raise
    shutil.rmtree(old)
