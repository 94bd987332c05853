"""Folders on the Hugging Face hub, by the name `owner/name` of their repository."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .artifact.folder import EnginesFolder
from .artifact.manifest import MANIFEST_NAME
from .errors import ArtifactError, FpabeeError, first_line
from .machine import require
from .targets import target_of

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PATIENCE = 10.0  # seconds
_SERVER_ERROR = 500  # the first status that says so


def repository_of(source: str | Path) -> str | None:
    """The name of the repository that a source stands for; None: it is a path here.

    Args:
        source: a path, or `owner/name`. It is a path if the folder `owner` exists.
    """
    name = str(source).replace(os.sep, "/")
    return name if _NAME.fullmatch(name) and not Path(source).parent.is_dir() else None


def engines_folder(
    source: str | Path,
    target: str | None = None,
    revision: str | None = None,
    every_target: bool = False,
) -> Path:
    """An engines folder: one that is here, or one on the hub.

    From the hub, the manifest comes first, and then only files that it names: those of a target,
    and those of no target, which are small. They lie in the cache of `huggingface_hub`, so what
    was downloaded before needs no network.

    Args:
        source: a folder, or `owner/name` on the hub. A folder that exists here is taken.
        target: the target to download; default: the one that would run here.
        revision: a branch, a tag or a commit on the hub; default: its main branch.
        every_target: download all files that the manifest names.

    Raises:
        ArtifactError: the hub does not provide it; `revision` is given for a folder that is here;
            or the target that would run consists of TensorRT plans and was not asked for.
        BackendError: it has no such target.
        MissingExtraError: it is not here, and `huggingface_hub` is not installed.
    """
    repository = repository_of(source)
    if repository is None:
        if revision is not None:
            raise ArtifactError(
                f"{source} is a path here, which has no revision {revision!r}",
                "leave out the revision, or give OWNER/NAME of a repository on the hub",
            )
        return Path(source)
    folder = downloaded(repository, MANIFEST_NAME, revision).parent
    engines = EnginesFolder.read(folder)
    name = None if every_target else target_of(engines, target)
    if name and target is None and engines.manifest.targets[name].backend.startswith("tensorrt"):
        raise ArtifactError(
            f"{name} of {repository} would run here, but TensorRT plans are executable code",
            "choose this `target` if you trust its author, and otherwise another one",
        )
    from huggingface_hub import hf_hub_download

    for file, _ in engines.hashes(name):
        # The cache names the folder after the commit that has this manifest.
        with hub_errors(repository, revision, file):
            hf_hub_download(repository, file, revision=folder.name)
    return folder


def downloaded(
    repository: str,
    file: str,
    revision: str | None = None,
    error: type[FpabeeError] = ArtifactError,
) -> Path:
    """One file of a repository; if the hub does not answer, from the cache.

    Args:
        repository: the repository.
        file: its path there.
        revision: of the repository.
        error: the class to raise.

    Raises:
        FpabeeError: the hub does not provide it.
        MissingExtraError: `huggingface_hub` is not installed.
    """
    require("hub", f"{repository} is not a folder here, and looking for it on the Hugging Face hub")
    from huggingface_hub import hf_hub_download

    with hub_errors(repository, revision, file, error):
        only_here = not answers(repository, revision)
        return Path(
            hf_hub_download(repository, file, revision=revision, local_files_only=only_here)
        )


def answers(repository: str, revision: str | None = None) -> bool:
    """Whether the hub answers within ten seconds, even if with an error, and may be asked.

    A download would try again for half a minute, and print each failure, or wait without end. It
    does so for an error of a server or a proxy, too, so that is no answer.

    Args:
        repository: the repository that is asked for.
        revision: of it.

    Raises:
        ValueError: the repository cannot have this name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # The bases of its error are those of the library for HTTP.
    failures: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        HfApi().model_info(repository, revision=revision, timeout=_PATIENCE)
    except HfHubHTTPError as error:
        return error.response.status_code < _SERVER_ERROR
    except failures:
        return False
    return True


@contextmanager
def hub_errors(
    repository: str,
    revision: str | None = None,
    file: str = "",
    error: type[FpabeeError] = ArtifactError,
) -> Iterator[None]:
    """Raise errors of ours for those of `huggingface_hub`.

    Args:
        repository: the repository that is read.
        revision: of it.
        file: what is downloaded.
        error: the class to raise.
    """
    from huggingface_hub import errors as hub

    problems: dict[type[Exception], str] = {
        hub.GatedRepoError: "is gated: its owner has to accept your account on its page",
        hub.RepositoryNotFoundError: "is not a folder here, and the hub has no such repository",
        hub.RevisionNotFoundError: f"has no revision {revision or 'main'!r}",
        hub.LocalEntryNotFoundError: "is not a folder here, and the hub cannot be reached",
        hub.EntryNotFoundError: f"has no {file}",
    }
    hint = (
        "check the name, the revision, the network and HF_HUB_OFFLINE; for a private or gated "
        "repository, set HF_TOKEN"
    )
    # The bases of its error for HTTP are those of the library that it uses.
    kinds: tuple[type[Exception], ...] = (RuntimeError, ValueError, *hub.HfHubHTTPError.__bases__)
    try:
        yield
    except kinds as failure:
        known = (problem for kind, problem in problems.items() if isinstance(failure, kind))
        problem = next(known, f"on the hub: {first_line(failure)}")
        if problem == f"has no {MANIFEST_NAME}":
            hint = "if it is a model, make engines of it with `convert` or `export`"
        raise error(f"{repository} {problem}", hint) from failure
