"""A target is checked once on each kind of machine, before anybody relies on its answers.

Libraries compute in other ways on other processors. A model that was exported on one kind may give
other answers on another, and what an operating point promises is then void. The kind of machine
that verified a target is in its record in the manifest. Others are remembered in the user's cache
directory, one small file for each target and kind.
"""

from __future__ import annotations

import hashlib
import logging

import msgspec

from .artifact.folder import EnginesFolder, write_whole
from .artifact.manifest import REFERENCE_NAME
from .errors import ArtifactError
from .machine import cache_folder

logger = logging.getLogger(__name__)


def must_check(engines: EnginesFolder, target: str, kind: str) -> bool:
    """Whether a target has not been checked yet on this kind of machine, but can be.

    Args:
        engines: the engines folder.
        target: the name of the target.
        kind: the kind of this machine, see `kind_of_machine`.
    """
    if kind == engines.manifest.targets[target].checked_on:
        return False
    if not (engines.path / REFERENCE_NAME).exists():
        told = f"{engines.path} has no {REFERENCE_NAME}, so {target} is not checked on {kind}"
        logger.warning("%s, a new kind of machine", told)
        return False
    try:
        return not (cache_folder() / "checked" / _key(engines, target, kind)).is_file()
    except OSError:  # there is no home directory, or it cannot be read
        return True


def remember(engines: EnginesFolder, target: str, kind: str) -> None:
    """Note that a target was checked on this kind of machine, if the cache can be written."""
    try:
        path = cache_folder() / "checked" / _key(engines, target, kind)
        write_whole(path, f"{target} was checked on {kind}\n".encode())
    except (ArtifactError, OSError) as error:
        logger.info("that %s was checked is not remembered: %s", target, error)


def _key(engines: EnginesFolder, target: str, kind: str) -> str:
    """A name for the files that the target runs, the reference among them, on a kind of machine."""
    content = msgspec.json.encode([target, kind, engines.hashes(target)])
    return hashlib.sha256(content).hexdigest()
