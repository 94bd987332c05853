"""Exit 0 as a model_dir and an engines folder store it: `exit_0.safetensors` and `exit_0.npz`.

`runtime.exit_0` says what exit 0 is. That of a ranking, see `runtime.first_stage`, is a few numbers
in `config.json` and in the manifest. Needs no torch.
"""

from __future__ import annotations

import json
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
    from safetensors.numpy import save_file

    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if isinstance(exit_0, FirstStage):
        block = msgspec.to_builtins(exit_0.spec)
    else:
        block = {"unigrams": exit_0.unigrams, "buckets": exit_0.buckets}
        with system_errors(folder / EXIT_0_FILE):
            save_file(exit_0.arrays, folder / EXIT_0_FILE)
    content[CONFIG_BLOCK] = (content.get(CONFIG_BLOCK) or {}) | {"exit_0": block}
    text = json.dumps(content, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def load_exit_0(
    folder: Path, config: Any, labels: int, ranks: bool = False
) -> ExitZero | FirstStage | None:
    """The exit 0 of a model_dir; None if it has none.

    Args:
        folder: the model_dir.
        config: its Hugging Face configuration.
        labels: how many labels the model has.
        ranks: whether it ranks documents.

    Raises:
        ModelError: its file is missing or damaged, or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    block = (getattr(config, CONFIG_BLOCK, None) or {}).get("exit_0")
    if block is None:
        return None
    if ranks:
        try:
            return FirstStage(msgspec.convert(block, FirstStageSpec))
        except msgspec.ValidationError as error:
            problem = f"{folder / 'config.json'} has no exit 0 of a ranking: {error}"
            raise ModelError(problem, "convert the model again") from error
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


def export_exit_0(folder: Path, exit_0: ExitZero) -> ExitZeroSpec:
    """Write exit 0 into an engines folder, and return its part of the manifest."""
    np.savez(folder / EXIT_0_NAME, **exit_0.arrays)  # type: ignore[arg-type]
    digest = sha256_of(folder / EXIT_0_NAME)
    return ExitZeroSpec(
        file=EXIT_0_NAME, sha256=digest, unigrams=exit_0.unigrams, buckets=exit_0.buckets
    )
