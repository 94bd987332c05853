"""Write an engines folder completely or not at all, and never over anything else."""

from __future__ import annotations

import ctypes
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..runtime.artifact.folder import check_outside, is_engines_folder, lock
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
    try:
        with _temporary(target.parent, target.name) as folder:
            yield folder
            _publish(folder, target)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {target}: {error.strerror}", "check the free space and permissions"
        ) from error


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary folder whose files are moved to the target when all of them are written.

    Raises:
        OSError: a file cannot be written; the target is unchanged.
    """
    # Inside of the target if it exists, which may be a disk of its own.
    with _temporary(target if target.exists() else target.parent, target.name) as folder:
        yield folder
        target.mkdir(exist_ok=True)
        for file in sorted(folder.iterdir()):
            file.replace(target / file.name)


def unique_name(name: str, sha256: str, ending: str) -> str:
    """The name of a file that belongs to its content, so that it never replaces another one."""
    return f"{name}-{sha256[:8]}{ending}"


@contextmanager
def _temporary(place: Path, name: str) -> Iterator[Path]:
    """A folder that is deleted at the end; first, those that killed processes left are deleted."""
    for left in place.glob(f".{glob.escape(name)}-*.unfinished"):
        # One that another process is writing is locked.
        with suppress(OSError), _locked(left):
            shutil.rmtree(left)
    folder = place / f".{name}-{secrets.token_hex(4)}.unfinished"
    folder.mkdir(parents=True)  # with the usual permissions, unlike temporary folders
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with suppress(OSError):
            stack.enter_context(_locked(folder))
        yield folder


def discard(folder: Path) -> None:
    """Delete a folder as a whole: no moment shows a part of it."""
    with _temporary(folder.parent, folder.name) as place:
        folder.replace(place / folder.name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, at most until this process ends.

    Raises:
        OSError: another process holds it, or the system cannot lock folders.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle)
        yield
    finally:
        os.close(handle)


def _publish(folder: Path, target: Path) -> None:
    """Move a folder to the target, on the same disk; what was there may then be in `folder`."""
    if not target.exists():
        folder.replace(target)
        return
    if _exchange(folder, target):
        return
    old = folder.with_name(folder.name + "-old")
    target.replace(old)
    try:
        folder.replace(target)
    except OSError:
        old.replace(target)
        raise
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that neither name is ever missing; False if that fails."""
    if sys.platform != "linux":
        return False
    here, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    paths = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    # Older C libraries do not have it.
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    return exchange is not None and exchange(here, paths[0], here, paths[1], swap) == 0
