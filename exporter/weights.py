"""Read the weights of a model_dir without running code, and check them against the model."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..runtime.errors import ModelError, first_line

logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TRAIN = "train a model with fpabee"
COPY_WEIGHTS = "copy the weights again, or train again"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The state dict of a folder, in the dtypes of its file, on the CPU.

    Args:
        folder: a model_dir.

    Raises:
        ModelError: the file is missing or damaged, or holds more than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ModelError(f"{folder} has neither {' nor '.join(WEIGHTS)}", TRAIN)
    hint = "copy the file again, or save the state dict with safetensors"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # weights_only: a pickle from a stranger must not run code.
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's own message recommends loading the file without this protection.
        raise ModelError(f"{path} cannot be read: it holds more than weights", hint) from error
    # Bytes that are not a pickle may raise almost any error.
    except (SafetensorError, RuntimeError, LookupError, ValueError, EOFError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}", hint) from error
    is_state_dict = isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    )
    if not is_state_dict:
        raise ModelError(f"{path} is not a state dict of names and tensors", hint)
    return cast(dict[str, Tensor], weights)


def fitting_weights(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], folder: Path, prefix: str
) -> dict[str, Tensor]:
    """The weights that a model needs, in float32.

    Args:
        expected: the model's state dict; only names and shapes are read.
        weights: the weights of a file, see `read_weights`.
        folder: its folder, for messages.
        prefix: of the names of the encoder's weights, for messages.

    Raises:
        ModelError: a weight is missing, has another shape or dtype, or is not finite.
    """
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights, first {missing[0]!r}; expected the encoder "
            f"under {prefix!r} and the heads under 'classifiers'",
            COPY_WEIGHTS,
        )
    for name, value in expected.items():
        problem, hint = _problem(weights[name], value.shape)
        if problem:
            raise ModelError(f"{folder}: weight {name} {problem}", hint)
    unused = sorted(name for name in set(weights) - set(expected) if "position_ids" not in name)
    if unused:
        logger.warning("%s: ignored weights that no exit uses: %s", folder, ", ".join(unused))
    return {name: weights[name].float() for name in expected}


def _problem(found: Tensor, shape: torch.Size) -> tuple[str, str]:
    """What is wrong with a weight, and what to do; empty: nothing."""
    has_shape = f"has shape {tuple(found.shape)}, but"
    if found.shape != shape:
        hint = "use the config.json and the weights of the same model"
        return f"{has_shape} config.json asks for {tuple(shape)}", hint
    if found.dtype not in _DTYPES:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (found.dtype, *_DTYPES)]
        hint = "give the weights as they were before quantization"
        return f"is in {dtypes[0]}; expected {', '.join(dtypes[1:])}", hint
    # A pickle can describe a huge tensor by one number that is repeated.
    if found.numel() * found.element_size() > found.untyped_storage().nbytes():
        return f"{has_shape} fewer values", "save the state dict again with safetensors"
    if not torch.isfinite(found).all():
        hint = "the training diverged: train again with a smaller learning rate"
        return "holds NaN or infinity", hint
    return "", ""
