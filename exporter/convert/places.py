"""What a conversion reads and writes, checked before PyTorch is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ...runtime.artifact.folder import BAD_JSON
from ...runtime.errors import ModelError
from ...runtime.files import Inputs
from ...runtime.machine import require
from ..paths import CLASSIFIER, check_apart, check_kind, check_model_dir, check_output, resolved
from ..unfinished import check_free, partial_of
from .options import ConvertOptions

STEPS = "conversion"
"""What the folder with the finished steps of a conversion is named after."""


def check_places(
    classifier: str | Path, texts: str | Path, output: str | Path, options: ConvertOptions
) -> Path:
    """Check the paths of a conversion, and what it needs, before any slow step begins.

    Args:
        classifier: as in `convert`.
        texts: as in `convert`.
        output: as in `convert`.
        options: as in `convert`.

    Returns:
        The real folder to write.

    Raises:
        ArtifactError: the output must not be written, or another process is converting into it.
        InputError: there are no such texts, or an input is inside of a folder that is replaced.
        ModelError: there is no such classifier or adapter, or the model is something else.
        MissingExtraError: an adapter needs `peft`, or the texts pyarrow.
    """
    target = resolved(output)
    inputs = (classifier, texts, options.train_texts, options.adapter)
    partial = partial_of(target)
    check_apart(partial, inputs)
    check_output(target, options.force, inputs)
    check_free(partial, STEPS)
    Inputs([each for each in (texts, options.train_texts) if each], options.reading)
    if options.adapter is not None:
        check_adapter(options.adapter)
    folder = check_model_dir(classifier)
    if options.adapter is None:  # which may bring the head
        check_kind(folder, CLASSIFIER)
    return target


class _AdapterSettings(msgspec.Struct):
    """What is read of adapter_config.json."""

    megatron_config: Any = None


def check_adapter(adapter: Path) -> None:
    """Refuse what is not the folder of a PEFT adapter, or would let the library import a module.

    Raises:
        ModelError: its settings are missing or damaged, or name a module.
        MissingExtraError: `peft` is not installed.
    """
    require("peft")
    path = adapter / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"{adapter} has no {path.name}", "give the folder of an adapter")
    try:
        settings = msgspec.json.decode(path.read_bytes(), type=_AdapterSettings)
    except BAD_JSON as error:
        problem = str(error) or type(error).__name__
        raise ModelError(
            f"{path} cannot be read: {problem}",
            "copy the adapter again from where it was trained",
        ) from error
    if settings.megatron_config is not None:
        raise ModelError(
            f"{path} has megatron_config, which names modules to import",
            "give an adapter of a model in the layout of Hugging Face",
        )
