"""Compiled graphs in the user's cache directory, so that a later process starts faster.

Every file ends with its checksum. A damaged file counts as missing and is written again. A file
appears completely or not at all, so processes may read and write at the same time. Without a
directory that can be written, nothing is kept.
"""

from __future__ import annotations

import logging
import mmap
import zlib
from contextlib import suppress
from pathlib import Path

from ..artifact.folder import write_whole
from ..errors import ArtifactError
from ..machine import cache_folder

logger = logging.getLogger(__name__)

_CHECKSUM_BYTES = 4
# The files that were not used for longest are deleted, until the rest has at most this size.
_MOST_BYTES = 8 * 2**30


def folder() -> Path:
    """Where the files are; it need not exist.

    Raises:
        OSError: the user has no home directory.
    """
    return cache_folder() / "compiled"


def read(key: str) -> memoryview | None:
    """The content under a key, mapped into memory; None if there is none, or it is damaged."""
    try:
        path = folder() / key
        with path.open("rb") as file:
            # Copy on write, because OpenVINO refuses memory that is read-only.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):  # an empty file cannot be mapped
        return None
    with suppress(OSError):  # without permission to write, the file can be used all the same
        path.touch()
    content = memoryview(mapped)[:-_CHECKSUM_BYTES]
    return content if _checksum(content) == mapped[-_CHECKSUM_BYTES:] else None


def write(key: str, content: bytes) -> None:
    """Keep content under a key, if possible."""
    try:
        write_whole(folder() / key, content, _checksum(content))
        _shrink(folder())
    except (ArtifactError, OSError) as error:
        logger.info("compiled graphs are not kept: %s", error)


def drop_pages(content: memoryview) -> None:
    """Give back the memory of mapped content; what is read again comes from the file again."""
    mapped = content.obj
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _checksum(content: bytes | memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "big")


def _shrink(home: Path) -> None:
    entries = []
    for path in home.iterdir():
        with suppress(FileNotFoundError):  # another process may have deleted or renamed it
            entries.append((path.stat(), path))
    left = _MOST_BYTES
    for status, path in sorted(entries, key=lambda item: item[0].st_mtime, reverse=True):
        left -= status.st_size
        if left < 0:
            with suppress(OSError):  # another process may have deleted it, or still use it
                path.unlink()
