"""Write an engines folder completely or not at all, and never over anything else."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..runtime.artifact.folder import lock
from ..runtime.errors import ArtifactError

_OLD = "-old"
_RANDOM_BYTES = 4


@contextmanager
def staging(destination: Path) -> Iterator[Path]:
    """A temporary folder beside the destination, which it replaces at the end if nothing fails.

    Raises:
        ArtifactError: nothing can be written there.
    """
    try:
        with temporary(destination.parent, destination.name) as folder:
            yield folder
            _publish(folder, destination)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {destination}: {error.strerror}", "check the free space and permissions"
        ) from error


@contextmanager
def replacing(destination: Path, last: str = "") -> Iterator[Path]:
    """A temporary folder whose files are moved to the destination when all of them are written.

    Args:
        destination: the folder; its other files stay.
        last: a file without which the others are nothing. An old one is deleted before the first
            file is moved, so that the destination never mixes old and new.

    Raises:
        OSError: a file cannot be written; the destination is unchanged.
    """
    # Inside of the destination if it exists, which may be a disk of its own.
    place = destination if destination.exists() else destination.parent
    with temporary(place, destination.name) as folder:
        yield folder
        destination.mkdir(exist_ok=True)
        if last:
            (destination / last).unlink(missing_ok=True)
        for file in sorted(folder.iterdir(), key=lambda file: (file.name == last, file)):
            file.replace(destination / file.name)


@contextmanager
def reserved(path: Path, size: int) -> Iterator[None]:
    """Keep some space of a disk with a new file, which is deleted at the end.

    Args:
        path: the file.
        size: in bytes.

    Raises:
        OSError: there is not enough space.
    """
    try:
        with path.open("wb") as file:
            reserve(file, size)
        yield
    finally:
        path.unlink(missing_ok=True)


def reserve(file: BinaryIO, size: int) -> None:
    """Take the space of a file that is open for writing, where the system can do that.

    Raises:
        OSError: there is not enough space.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    elif size > shutil.disk_usage(Path(file.name).parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def unique_name(name: str, sha256: str, ending: str) -> str:
    """The name of a file that belongs to its content, so that it never replaces another one."""
    return f"{name}-{sha256[:8]}{ending}"


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Raise the errors of the system that libraries in Rust give as text.

    Args:
        path: what is written.

    Raises:
        OSError: the system refused it.
    """
    try:
        yield
    except Exception as error:  # tokenizers raises Exception itself
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


@contextmanager
def temporary(place: Path, name: str) -> Iterator[Path]:
    """A folder that is deleted at the end; first, those that killed processes left are deleted."""
    digits = "[0-9a-f]" * 2 * _RANDOM_BYTES
    for left in place.glob(f".{glob.escape(name)}-{digits}.unfinished"):
        # One that another process is writing is locked.
        with suppress(OSError), locked(left):
            shutil.rmtree(left)
    with ExitStack() as stack:
        yield _new_folder(place, name, stack)


def _new_folder(place: Path, name: str, stack: ExitStack) -> Path:
    """A new folder that is locked, where that is possible, and deleted with the stack."""
    while True:
        folder = place / _temporary_name(name)
        folder.mkdir(parents=True)  # with the usual permissions, unlike temporary folders
        try:
            stack.enter_context(locked(folder))
        except (BlockingIOError, FileNotFoundError):
            continue  # another process took it for one that was left
        except OSError:
            pass  # the system cannot lock folders
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder


def _temporary_name(name: str) -> str:
    return f".{name}-{secrets.token_hex(_RANDOM_BYTES)}.unfinished"


def longest_name(name: str) -> str:
    """A name as long as the longest one that a folder of this name has while it is written."""
    return _temporary_name(name) + _OLD


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, at most until this process ends; does nothing on Windows.

    Raises:
        BlockingIOError: another process holds it, or has just deleted the folder.
        OSError: the system cannot lock folders.
    """
    if sys.platform == "win32":  # cannot open folders
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle)
        if not (folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())):
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(folder))
        yield
    finally:
        os.close(handle)


def _publish(folder: Path, destination: Path) -> None:
    """Move a folder to the destination, on the same disk; then `folder` may hold what was there."""
    if not destination.exists():
        folder.replace(destination)
        return
    if _exchange(folder, destination):
        return
    old = folder.with_name(folder.name + _OLD)
    destination.replace(old)
    try:
        folder.replace(destination)
    except OSError:
        old.replace(destination)
        raise
    shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that neither name is ever missing; False if that fails."""
    if sys.platform != "linux":
        return False
    # AT_FDCWD and RENAME_EXCHANGE
    here = -100
    swap = 2
    paths = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    # Older C libraries do not have it.
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    return exchange is not None and exchange(here, paths[0], here, paths[1], swap) == 0
