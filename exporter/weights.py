"""The weights of a model_dir: read without running code, and held against what a model needs."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..runtime.errors import Call, ModelError, Remedy, first_line

logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TRAIN_HINT = Remedy("train a model with {call}", call=Call("train"))
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict of a folder, in the dtypes of its file, on the CPU.

    Raises:
        ModelError: none there, or a file that is damaged or holds more than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ModelError(f"{folder} has neither {' nor '.join(WEIGHTS)}", TRAIN_HINT)
    hint = "copy the file again, or save the state dict with safetensors"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # weights_only: a pickle from a stranger must not run code.
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not torch's own words: they advise to load the file without this protection.
        raise ModelError(f"{path} cannot be read: it holds more than weights", hint) from error
    # Bytes that are no pickle raise almost anything (KeyError, IndexError, ...).
    except (SafetensorError, RuntimeError, LookupError, ValueError, EOFError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}", hint) from error
    named = isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    )
    if not named:
        raise ModelError(f"{path} is not a state dict of names and tensors", hint)
    return cast(dict[str, Tensor], weights)


def fitting_weights(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], folder: Path, prefix: str
) -> dict[str, Tensor]:
    """The weights that a model takes, in float32.

    Args:
        expected: the model's state dict; only names and shapes are read.
        weights: what `read_weights` gave.
        folder: where they are from, for messages.
        prefix: of the encoder's weights.

    Raises:
        ModelError: a weight is missing, of another shape, not of floating-point numbers, or
            not finite.
    """
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights, first {missing[0]!r}",
            f"expected the encoder under {prefix!r}. and classifiers.N; copy the weights again",
        )
    for name, value in expected.items():
        _check(name, weights[name], value.shape, folder)
    unused = sorted(name for name in set(weights) - set(expected) if "position_ids" not in name)
    if unused:
        logger.warning("%s: weights that no exit uses are left out: %s", folder, ", ".join(unused))
    return {name: weights[name].float() for name in expected}


def _check(name: str, found: Tensor, shape: torch.Size, folder: Path) -> None:
    if found.shape != shape:
        raise ModelError(
            f"{folder}: weight {name} has shape {tuple(found.shape)}, "
            f"but config.json asks for {tuple(shape)}",
            "use the config.json and the weights of the same model",
        )
    if found.dtype not in _DTYPES:
        raise ModelError(
            f"{folder}: weight {name} is in {_word(found.dtype)}; "
            f"expected {', '.join(map(_word, _DTYPES))}",
            "give the weights as they were before they were quantized",
        )
    # A pickle can describe a huge tensor as one number, repeated.
    if found.numel() * found.element_size() > found.untyped_storage().nbytes():
        raise ModelError(
            f"{folder}: weight {name} has shape {tuple(found.shape)}, but fewer values",
            "save the state dict again with safetensors",
        )
    if not torch.isfinite(found).all():
        raise ModelError(
            f"{folder}: weight {name} holds NaN or infinity",
            "the training diverged: train again, with a smaller learning rate",
        )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
