"""Paths that are read and written, checked before PyTorch is loaded, which takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..runtime.artifact.folder import check_outside, is_engines_folder
from ..runtime.artifact.manifest import ENGINES_CONTENT
from ..runtime.errors import ArtifactError, InputError, ModelError
from ..runtime.hub import repository_of
from .staging import longest_name

TRAINED = "give the folder of a trained model"


def resolved(output: str | Path) -> Path:
    """The real folder: a link stays, and the folder that it leads to is replaced."""
    return Path(os.path.realpath(output))


def check_model_dir(source: str | Path) -> None:
    """Refuse a model that is neither a folder here nor possibly a repository on the hub.

    Raises:
        ModelError: there is no such folder.
    """
    if repository_of(source) is None and not Path(source).is_dir():
        raise ModelError(
            f"model folder {source} does not exist", f"{TRAINED}, or its id on the hub"
        )


def check_output(folder: Path, force: bool, inputs: Iterable[str | Path | None] = ()) -> None:
    """Refuse a folder that must not be written.

    Args:
        folder: the folder, see `resolved`.
        force: whether an engines folder may be replaced.
        inputs: what is read; see `check_apart`.

    Raises:
        ArtifactError: it holds something else, an engines folder that may not be replaced, or a
            disk of its own; or its name is too long.
        InputError: it is inside an engines folder or a model_dir, or an input is inside of it.
    """
    _check_place(folder, inputs, "output")
    if _is_free(folder):
        return
    if not is_engines_folder(folder):
        raise ArtifactError(
            f"{folder} exists and is not an engines folder; it will not be replaced",
            "give another folder as `output`",
        )
    if not force:
        raise ArtifactError(f"{folder} already holds an engines folder", "replace it with `force`")
    others = sorted(
        path.name
        for path in folder.iterdir()
        # What a process that was killed has left is ours as well.
        if path.name not in ENGINES_CONTENT and not path.name.startswith(".manifest-")
    )
    if others:
        raise ArtifactError(
            f"{folder} also holds {others[0]}, which no export wrote, and is replaced as a whole",
            "move it elsewhere, or give another folder as `output`",
        )


def check_new(
    folder: Path, inputs: Iterable[str | Path | None] = (), parameter: str = "output"
) -> None:
    """Refuse a folder that exists, unless it is empty, or that must not be written.

    Args:
        folder: the folder, see `resolved`.
        inputs: what is read; see `check_apart`.
        parameter: its name, for the hint.

    Raises:
        ArtifactError: it exists, is a disk of its own, or its name is too long.
        InputError: it is inside an engines folder or a model_dir, or an input is inside of it.
    """
    _check_place(folder, inputs, parameter)
    if not _is_free(folder):
        raise ArtifactError(f"{folder} exists already", f"give another folder as `{parameter}`")


def check_apart(
    folder: Path, others: Iterable[str | Path | None], parameter: str = "output"
) -> None:
    """Refuse to replace or delete a folder that something else is inside of.

    Args:
        folder: the folder, see `resolved`. It may not exist yet.
        others: what is read or written beside it: paths, of which each link on the way counts as
            well. None and what may be a repository on the hub are passed over.
        parameter: the name of what decides the folder, for the hint.

    Raises:
        InputError: one of them is the folder or inside of it.
    """
    for other in others:
        if other is None or repository_of(other) is not None:
            continue
        if any(place.is_relative_to(folder) for place in _places(Path(other))):
            raise InputError(
                f"{folder} is written as a whole, and {other} is inside of it",
                f"give another folder as `{parameter}`",
            )


def _places(path: Path) -> Iterator[Path]:
    """Where a path really is, and each link that leads there from its name."""
    named = Path(os.path.normpath(path.absolute()))
    for part in (named, *named.parents):
        yield Path(os.path.realpath(part.parent), part.name)
    yield Path(os.path.realpath(named))


def _check_place(folder: Path, inputs: Iterable[str | Path | None], parameter: str) -> None:
    check_outside(folder)
    check_apart(folder, inputs, parameter)
    if os.path.ismount(folder):  # found now, and not when all is done
        raise ArtifactError(
            f"{folder} is a mounted disk, which cannot be replaced",
            f"give a folder in it as `{parameter}`",
        )
    try:
        os.lstat(folder.with_name(longest_name(folder.name)))
    except FileNotFoundError:
        return
    except OSError as error:  # the name is too long, or a folder on the way is a file
        raise ArtifactError(
            f"cannot write {folder}: {error.strerror}", f"give another folder as `{parameter}`"
        ) from error


def _is_free(folder: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
