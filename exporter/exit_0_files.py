"""Exit 0 as a model_dir and an engines folder store it: `exit_0.safetensors` and `exit_0.npz`.

`runtime.exit_0` says what exit 0 is. Needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.artifact.folder import sha256_of
from ..runtime.artifact.manifest import EXIT_0_NAME, ExitZeroSpec
from ..runtime.errors import ModelError, first_line
from ..runtime.exit_0 import ARRAYS, ExitZero
from .staging import system_errors

EXIT_0_FILE = "exit_0.safetensors"
CONFIG_BLOCK = "fpabee"
"""The key of `config.json` that holds our settings; its key `exit_0` holds those of exit 0."""

_MOST_UNIGRAMS = 65536
_TRAIN_AGAIN = "train the model again"


def unigrams_of(vocabulary: int) -> int:
    """How many rows of the table the unigrams of a vocabulary have; they may share rows."""
    return min(vocabulary, _MOST_UNIGRAMS)


def save_exit_0(folder: Path, exit_0: ExitZero) -> None:
    """Add exit 0 to a model_dir, or replace it; nothing else in the folder changes.

    Args:
        folder: the model_dir, which has a `config.json`.
        exit_0: the weights.

    Raises:
        OSError: a file cannot be written.
    """
    from safetensors.numpy import save_file

    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    block = {"unigrams": exit_0.unigrams, "buckets": exit_0.buckets}
    content[CONFIG_BLOCK] = (content.get(CONFIG_BLOCK) or {}) | {"exit_0": block}
    with system_errors(folder / EXIT_0_FILE):
        save_file(exit_0.arrays, folder / EXIT_0_FILE)
    text = json.dumps(content, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def load_exit_0(folder: Path, config: Any, labels: int) -> ExitZero | None:
    """The exit 0 of a model_dir; None if it has none.

    Args:
        folder: the model_dir.
        config: its Hugging Face configuration.
        labels: how many labels the model has.

    Raises:
        ModelError: its file is missing or damaged, or does not fit the model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    block = (getattr(config, CONFIG_BLOCK, None) or {}).get("exit_0")
    if block is None:
        return None
    path = folder / EXIT_0_FILE
    if not path.is_file():
        raise ModelError(f"{path} is missing, but config.json names exit 0", _TRAIN_AGAIN)
    try:
        arrays = load_file(path)
        found = ExitZero(int(block["unigrams"]), *(arrays[name] for name in ARRAYS))
        found.check_sizes(block["buckets"], labels)
        expected = unigrams_of(int(config.vocab_size))
        if found.unigrams != expected:
            raise ValueError(f"it has {found.unigrams} unigrams, but the vocabulary {expected}")
    # The file is damaged, a setting is missing, or the arrays do not fit together.
    except (SafetensorError, LookupError, TypeError, ValueError, OSError) as error:
        raise ModelError(f"{path} is not an exit 0: {first_line(error)}", _TRAIN_AGAIN) from error
    return found


def export_exit_0(folder: Path, exit_0: ExitZero) -> ExitZeroSpec:
    """Write exit 0 into an engines folder, and return its part of the manifest."""
    np.savez(folder / EXIT_0_NAME, **exit_0.arrays)  # type: ignore[arg-type]
    digest = sha256_of(folder / EXIT_0_NAME)
    return ExitZeroSpec(
        file=EXIT_0_NAME, sha256=digest, unigrams=exit_0.unigrams, buckets=exit_0.buckets
    )
