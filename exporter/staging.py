"""Where an engines folder is written: never over what is not ours, never half."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runtime.artifact.folder import is_engines_folder
from ..runtime.errors import ArtifactError


def resolved(output: str | Path) -> Path:
    """The folder itself: a link or the current folder is replaced, and not what names it.

    Raises:
        ArtifactError: it is a link to itself.
    """
    target = Path(os.path.realpath(output))
    if target.is_symlink():
        raise ArtifactError(f"{output} is a link to itself", "give another folder with -o")
    return target


def check_output(target: Path, force: bool) -> None:
    """Refuse a folder that is not free.

    Args:
        target: the folder.
        force: whether an engines folder may be replaced.

    Raises:
        ArtifactError: it holds something else, or an engines folder that may not be replaced.
    """
    if not target.exists():
        return
    is_free = target.is_dir() and not any(target.iterdir())
    if not is_free and not is_engines_folder(target):
        raise ArtifactError(
            f"{target} exists and is not an engines folder; it will not be replaced",
            "give another folder with -o",
        )
    if not force and not is_free:
        raise ArtifactError(f"{target} already holds an engines folder", "replace it with --force")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, gone afterwards unless published.

    Raises:
        ArtifactError: nothing can be written there.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise ArtifactError(
            f"cannot write in {target.parent}: {error.strerror}",
            "give a writable folder with -o",
        ) from error
    folder = Path(name)
    try:
        yield folder
    except OSError as error:
        raise ArtifactError(
            f"cannot write {target}: {error.strerror}", "check the free space and permissions"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary folder whose files get their places in the target when all are written.

    Raises:
        OSError: they cannot be written; the target is as it was.
    """
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as name:
        yield Path(name)
        target.mkdir(exist_ok=True)
        for file in sorted(Path(name).iterdir()):
            file.replace(target / file.name)


def publish(folder: Path, target: Path) -> None:
    """Put the temporary folder in the place of the target."""
    folder.chmod(0o777 & ~_umask())
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
