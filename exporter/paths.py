"""Paths that are read and written, checked before PyTorch is loaded, which takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from ..runtime.artifact.folder import (
    BAD_JSON,
    check_outside,
    is_engines_folder,
    strings_of_manifest,
)
from ..runtime.artifact.manifest import ENGINES_CONTENT
from ..runtime.errors import ArtifactError, InputError, ModelError
from ..runtime.hub import downloaded, repository_of
from .staging import longest_name

TRAINED = "give the folder of a trained model"
CONFIG_NAME = "config.json"
CLASSIFIER = "ForSequenceClassification"
"""How the class of a classifier or a reranker of Hugging Face ends."""
MULTI_EXIT = "MultiExit"
"""How a model with exits names its class."""

_OF_WHOLE_TEXTS = "give a classifier of whole texts, or a reranker"
_TRAIN = "make a classifier of it with `train` and labelled rows"
# What a model is and what to do with it, by the end of the name of its class.
_KINDS = {
    CLASSIFIER: ("a classifier without exits", "use `convert` instead"),
    MULTI_EXIT: ("a model with exits", "use `export` instead"),
    "ForTokenClassification": ("a classifier of tokens", _OF_WHOLE_TEXTS),
    "ForQuestionAnswering": ("a model that finds answers in a text", _OF_WHOLE_TEXTS),
    "ForMultipleChoice": ("a model for multiple choice", _OF_WHOLE_TEXTS),
    "ForMaskedLM": ("a masked language model", _TRAIN),
    "ForPreTraining": ("a masked language model", _TRAIN),
    "ForCausalLM": ("a model that writes text", _OF_WHOLE_TEXTS),
    "LMHeadModel": ("a model that writes text", _OF_WHOLE_TEXTS),
    "Model": ("an encoder without a head, such as an embedding model", _TRAIN),
}


def resolved(output: str | Path) -> Path:
    """The real folder: a link stays, and the folder that it leads to is replaced."""
    return Path(os.path.realpath(output))


def check_model_dir(source: str | Path) -> Path:
    """Refuse a model that is neither a folder here nor a repository on the hub.

    Returns:
        A folder with its configuration; of a model on the hub, other files may not be there yet.

    Raises:
        ModelError: there is no such folder or repository, or it is an engines folder.
        MissingExtraError: it is not here, and `huggingface_hub` is not installed.
    """
    repository = repository_of(source)
    if repository is not None:
        return downloaded(repository, CONFIG_NAME, error=ModelError).parent
    folder = Path(source)
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ModelError(f"model folder {source} {problem}", f"{TRAINED}, or its id on the hub")
    if is_engines_folder(folder):
        raise ModelError(
            f"{source} is an engines folder, not a model",
            "run it as it is, build more targets into it, or give the model that it was made of",
        )
    return folder


class _Architectures(msgspec.Struct):
    """The part of config.json that is read."""

    architectures: list[str] | None = None


def check_kind(folder: Path, kind: str) -> None:
    """Refuse a model whose configuration says that it is something else.

    Args:
        folder: a folder with its configuration.
        kind: `CLASSIFIER` or `MULTI_EXIT`.

    Raises:
        ModelError: what it is. What is not known, missing or damaged passes.
    """
    try:
        content = (folder / CONFIG_NAME).read_bytes()
        names = msgspec.json.decode(content, type=_Architectures).architectures or []
    except (OSError, *BAD_JSON):
        return
    for name in names:
        known = next((end for end in _KINDS if name.endswith(end)), kind)
        if known != kind:
            what, hint = _KINDS[known]
            raise ModelError(f"{folder} is {what}: its config.json names {name}", hint)


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
    named = strings_of_manifest(folder)  # a folder of another version may have other files
    others = [path for path in _content(folder) if not ENGINES_CONTENT.fullmatch(path)]
    if others := sorted({*others} - named):
        raise ArtifactError(
            f"{folder} also holds {others[0]}, which no export wrote, and is replaced as a whole",
            "move it elsewhere, or give another folder as `output`",
        )


def _content(folder: Path) -> Iterator[str]:
    """The paths in a folder of its files, of links, and with `/` at the end of empty folders."""
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*files, *links):
            yield (inside / name).as_posix()
        if not (files or folders) and Path(place) != folder:
            yield f"{inside.as_posix()}/"


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
