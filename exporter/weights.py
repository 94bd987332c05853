"""Read weights from files, and check them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import cast

import msgspec
import torch
from torch import Tensor

from ..runtime.artifact.folder import BAD_JSON
from ..runtime.errors import ModelError, first_line
from .paths import TRAINED

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The names that the file of weights may have."""
_SAVE_AGAIN = "copy the file again, or save the state dict with safetensors"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_weights(folder: Path, names: Sequence[str] = WEIGHTS) -> dict[str, Tensor]:
    """The state dict of a folder, in the dtypes of its files, on the CPU.

    Args:
        folder: a model_dir.
        names: the names that the file of weights may have. The first one that exists is read, or
            the files that an index, `NAME.index.json`, lists in its place.

    Raises:
        ModelError: a file is missing or damaged, is outside of the folder, or holds more than
            tensors.
    """
    for name in names:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return _read_tensors(folder / name)
        if index.is_file():
            parts = (_read_tensors(path) for path in _parts(index))
            return {name: value for part in parts for name, value in part.items()}
    raise ModelError(f"{folder} has neither {' nor '.join(names)}", TRAINED)


class _Index(msgspec.Struct):
    """The file of each weight, by the name of the weight."""

    weight_map: dict[str, str]


def _parts(index: Path) -> list[Path]:
    """The files that an index names; they are in its folder, and have the suffix of its weights.

    Raises:
        ModelError: the index is damaged, or names other files or none.
    """
    hint = "copy the folder again from where the model was trained"
    try:
        names = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
    except BAD_JSON as error:
        problem = str(error) or type(error).__name__
        raise ModelError(f"{index} is not an index of weights: {problem}", hint) from error
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    paths = [index.with_name(name) for name in sorted(names) if _is_file_name(name, suffix)]
    missing = sorted(names - {path.name for path in paths if path.is_file()})
    if missing or not names:
        raise ModelError(
            f"{index} names {(missing or [''])[0]!r}; expected files *{suffix} beside it", hint
        )
    return paths


def _is_file_name(name: str, suffix: str) -> bool:
    """Whether a name of an index stays in its folder and has the suffix."""
    return PurePath(name).name == name and name.endswith(suffix) and "\0" not in name


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name, on the CPU.

    Raises:
        ModelError: it is damaged, or holds more than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # weights_only: a pickle from a stranger must not run code.
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's own message recommends loading the file without this protection.
        problem = f"{path} cannot be read: it holds more than weights"
        raise ModelError(problem, _SAVE_AGAIN) from error
    # Bytes that are not a pickle may raise almost any error.
    except (SafetensorError, RuntimeError, LookupError, ValueError, EOFError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}", _SAVE_AGAIN) from error
    is_state_dict = isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    )
    if not is_state_dict:
        raise ModelError(f"{path} is not a state dict of names and tensors", _SAVE_AGAIN)
    for name, value in weights.items():
        # A pickle can describe a huge tensor by one number that is repeated.
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ModelError(
                f"{path}: weight {name} has shape {tuple(value.shape)}, but fewer values",
                "save the state dict again with safetensors",
            )
    return cast(dict[str, Tensor], weights)


def check_weight(folder: Path, name: str, weight: Tensor, shape: Sequence[int]) -> None:
    """Check one weight.

    Args:
        folder: where it is from, for the message.
        name: its name, for the message.
        weight: its values.
        shape: the shape that it should have.

    Raises:
        ModelError: it has another shape or an unknown dtype, or is not finite in float32.
    """
    problem = hint = ""
    if weight.shape != torch.Size(shape):
        problem = f"has shape {tuple(weight.shape)}, but config.json asks for {tuple(shape)}"
        hint = "use the config.json and the weights of the same model"
    elif weight.dtype not in _DTYPES:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in (weight.dtype, *_DTYPES)]
        problem = f"is in {dtypes[0]}; expected {', '.join(dtypes[1:])}"
        hint = "give the weights as they were before quantization"
    elif not torch.isfinite(weight.float()).all():  # float64 has numbers that float32 has not
        problem = "holds NaN or infinity"
        hint = "the training diverged: train again with a smaller learning rate"
    if problem:
        raise ModelError(f"{folder}: weight {name} {problem}", hint)
