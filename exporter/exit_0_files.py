"""Exit 0 as a model_dir and an engines folder store it: `exit_0.safetensors` and `exit_0.npz`.

`runtime.exit_0` says what exit 0 is. That of a ranking, see `runtime.first_stage`, is a few numbers
in `config.json` and in the manifest. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import singledispatch
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..runtime.artifact.folder import sha256_of
from ..runtime.artifact.manifest import EXIT_0_NAME, ExitZeroSpec, FirstStageSpec
from ..runtime.errors import ModelError, first_line
from ..runtime.exit_0 import ExitZero
from ..runtime.first_stage import FirstStage
from .staging import system_errors

EXIT_0_FILE = "exit_0.safetensors"
CONFIG_BLOCK = "fpabee"
"""The key of `config.json` that holds our settings; its key `exit_0` holds those of exit 0."""

_MOST_UNIGRAMS = 65536
_TRAIN_AGAIN = "train the model again"


def unigrams_of(vocabulary: int) -> int:
    """How many rows of the table the unigrams of a vocabulary have; they may share rows."""
    return min(vocabulary, _MOST_UNIGRAMS)


def save_exit_0(folder: Path, exit_0: ExitZero | FirstStage) -> None:
    """Add exit 0 to a model_dir, or replace it; nothing else in the folder changes.

    Args:
        folder: the model_dir, which has a `config.json`.
        exit_0: exit 0 of a classifier or of a ranking.

    Raises:
        OSError: a file cannot be written.
    """
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    block = _saved(exit_0, folder)
    content[CONFIG_BLOCK] = (content.get(CONFIG_BLOCK) or {}) | {"exit_0": block}
    text = json.dumps(content, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


@singledispatch
def _saved(exit_0: object, folder: Path) -> Any:
    """The block of the configuration of one exit 0, whose file is written if it needs one."""
    raise TypeError(f"{exit_0!r} is not an exit 0")


@_saved.register
def _(exit_0: FirstStage, folder: Path) -> Any:
    return msgspec.to_builtins(exit_0.spec)


@_saved.register
def _(exit_0: ExitZero, folder: Path) -> Any:
    from safetensors.numpy import save_file

    with system_errors(folder / EXIT_0_FILE):
        save_file(exit_0.arrays, folder / EXIT_0_FILE)
    return {"unigrams": exit_0.unigrams, "buckets": exit_0.buckets}


def load_exit_0(
    folder: Path, config: Any, labels: int, method: str = "predict"
) -> ExitZero | FirstStage | None:
    """The exit 0 of a model_dir; None if it has none.

    Args:
        folder: the model_dir.
        config: its Hugging Face configuration.
        labels: how many labels the model has.
        method: `Task.method` of the model.

    Raises:
        ModelError: its file is missing or damaged, or does not fit the model.
    """
    block = (getattr(config, CONFIG_BLOCK, None) or {}).get("exit_0")
    return None if block is None else LOADERS[method](folder, block, config, labels)


def _load_scores(folder: Path, block: Any, config: Any, labels: int) -> FirstStage:
    try:
        return FirstStage(msgspec.convert(block, FirstStageSpec))
    except msgspec.ValidationError as error:
        problem = f"{folder / 'config.json'} has no exit 0 of a ranking: {error}"
        raise ModelError(problem, "convert the model again") from error


def _load_ngrams(folder: Path, block: Any, config: Any, labels: int) -> ExitZero:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / EXIT_0_FILE
    if not path.is_file():
        raise ModelError(f"{path} is missing, but config.json names exit 0", _TRAIN_AGAIN)
    try:
        arrays = load_file(path)
        exit_0 = ExitZero(
            unigrams=int(block["unigrams"]),
            table=arrays["table"],
            weights=arrays["weights"],
            bias=arrays["bias"],
        )
        exit_0.check_sizes(block["buckets"], labels)
        expected = unigrams_of(int(config.vocab_size))
        if exit_0.unigrams != expected:
            raise ValueError(f"it has {exit_0.unigrams} unigrams, but the vocabulary {expected}")
    # The file is damaged, a setting is missing, or the arrays do not fit together.
    except (SafetensorError, LookupError, TypeError, ValueError, OSError) as error:
        raise ModelError(f"{path} is not an exit 0: {first_line(error)}", _TRAIN_AGAIN) from error
    return exit_0


LOADERS: dict[str, Callable[[Path, Any, Any, int], ExitZero | FirstStage]] = {
    "predict": _load_ngrams,
    "rank": _load_scores,
}
"""The functions that read exit 0, by the method of `Engine` that asks the model."""


@singledispatch
def export_exit_0(exit_0: object, folder: Path) -> dict[str, Any]:
    """Write exit 0 into an engines folder, and return its fields of the manifest.

    Args:
        exit_0: exit 0 of a classifier or of a ranking; None: the model has none.
        folder: the engines folder.
    """
    return {}


@export_exit_0.register
def _(exit_0: FirstStage, folder: Path) -> dict[str, Any]:
    return {"first_stage": exit_0.spec}


@export_exit_0.register
def _(exit_0: ExitZero, folder: Path) -> dict[str, Any]:
    np.savez(folder / EXIT_0_NAME, **exit_0.arrays)  # type: ignore[arg-type]
    digest = sha256_of(folder / EXIT_0_NAME)
    spec = ExitZeroSpec(
        file=EXIT_0_NAME, sha256=digest, unigrams=exit_0.unigrams, buckets=exit_0.buckets
    )
    return {"exit_0": spec}
