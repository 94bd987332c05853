"""What sentence-transformers stores beside a `CrossEncoder`: read as data, without its code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ...runtime.artifact.folder import BAD_JSON
from ...runtime.artifact.manifest import Activation
from ...runtime.errors import ModelError

_SETTINGS = "config_sentence_transformers.json"
_MODULES = "modules.json"
# The classes of PyTorch by their last name: it has several paths to each of them.
_ACTIVATIONS = {"Sigmoid": Activation.SIGMOID, "Identity": Activation.IDENTITY}
_OF_PYTORCH = "torch.nn."
_COPY = "copy the folder again from where the model was trained"


class _Settings(msgspec.Struct):
    """What is read of config_sentence_transformers.json (since version 6)."""

    activation_fn: Any = None
    prompts: dict[str, str | None] = {}
    default_prompt_name: str | None = None


class _Module(msgspec.Struct):
    """What is read of a part of the model in modules.json (since version 6)."""

    type: str


def activation_of(folder: Path, config: Any) -> Activation:
    """What makes a score of a logit, as `CrossEncoder` would do it.

    It is named in `config_sentence_transformers.json`, or else in `config.json` in the block
    `sentence_transformers` (versions 4 and 5) or as `sbert_ce_default_activation_function` (before
    4). By default it is the sigmoid, also for models of other libraries.

    Args:
        folder: of the model.
        config: its Hugging Face configuration.

    Raises:
        ModelError: a file is damaged, or the model does more than a `transformers` model and one of
            these functions do.
    """
    settings = _read(folder / _SETTINGS, _Settings) or _Settings()
    modules = _read(folder / _MODULES, list[_Module]) or []
    names = [module.type.rpartition(".")[2] for module in modules]
    if names not in ([], ["Transformer"]):
        raise ModelError(
            f"{folder / _MODULES} has the modules {', '.join(names)}; expected Transformer alone",
            "give a reranker that AutoModelForSequenceClassification loads",
        )
    if settings.prompts.get(settings.default_prompt_name or ""):
        raise ModelError(
            f"{folder / _SETTINGS} puts the prompt {settings.default_prompt_name!r} before every "
            "pair, which is not supported",
            "give a reranker without a default prompt",
        )
    block = getattr(config, "sentence_transformers", None)
    of_block = block.get("activation_fn") if isinstance(block, dict) else None
    oldest = getattr(config, "sbert_ce_default_activation_function", None)
    name = settings.activation_fn or of_block or oldest or f"{_OF_PYTORCH}Sigmoid"
    activation = _ACTIVATIONS.get(str(name).rpartition(".")[2])
    if activation is None or not str(name).startswith(_OF_PYTORCH):
        raise ModelError(
            f"{folder} has the activation {name!r}",
            f"only {' and '.join(_OF_PYTORCH + each for each in _ACTIVATIONS)} are supported",
        )
    return activation


def _read(path: Path, kind: Any) -> Any:
    """The content of a file of JSON; None if it is not there.

    Raises:
        ModelError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except BAD_JSON as error:
        problem = str(error) or type(error).__name__
        raise ModelError(f"{path} cannot be read: {problem}", _COPY) from error
