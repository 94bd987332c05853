"""Read and write model_dir: a multi-exit checkpoint in the Hugging Face layout.

Checkpoints of PABEE, F-PABEE, PCEE-BERT and EPEE training code load unchanged. Without our block in
`config.json` there is one exit per layer, pooled at the first token.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..runtime.artifact.manifest import TRAINED_ON_NAME, Activation, ProblemType
from ..runtime.errors import ModelError, first_line
from ..runtime.hub import answers, hub_errors, repository_of
from ..runtime.tasks.kinds import KINDS
from .backbones import build_encoder, family_of
from .exit_0_files import CONFIG_BLOCK, EXIT_0_FILE
from .exit_config import COPY_CONFIG, MultiExitConfig, Pooling
from .model import MultiExitModel
from .paths import MULTI_EXIT, TRAINED, check_kind, check_model_dir
from .staging import system_errors
from .weights import WEIGHTS, check_weight, read_weights

logger = logging.getLogger(__name__)

COPY_WEIGHTS = "copy the weights again, or train again"

# These leave out the copies for other frameworks that many repositories hold.
_HUB_FILES = ["*.json", "*.txt", "*.model", *WEIGHTS, EXIT_0_FILE, TRAINED_ON_NAME]
# The parts of weights that are too large for one file.
_HUB_FILES += ["model-*.safetensors", "pytorch_model-*.bin"]
# Settings that ask for memory although no weight has a shape that could contradict them, and the
# largest values that are accepted, which are beyond those of any encoder.
_LARGEST = {
    "num_hidden_layers": 1024,
    "n_layers": 1024,
    "num_hidden_groups": 1024,
    "inner_group_num": 1024,
    "num_labels": 2**20,
    "max_position_embeddings": 2**20,
}
_LARGEST_OF_OTHERS = 1e38
CONFIG_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""The errors of a wrong configuration, depending on the setting."""


def resolve_model_dir(source: str | Path) -> Path:
    """The folder of a model, downloaded if it is on the Hugging Face hub.

    Args:
        source: a local folder or a hub id.

    Raises:
        ModelError: there is no such folder, and the hub has no such model.
    """
    repository = repository_of(source)
    if repository is None:
        return check_model_dir(source)
    from huggingface_hub import snapshot_download

    with hub_errors(repository, error=ModelError):
        only_here = not answers(repository)
        return Path(
            snapshot_download(repository, allow_patterns=_HUB_FILES, local_files_only=only_here)
        )


def load_checkpoint(
    source: str | Path,
    problem_type: ProblemType | None = None,
    attention: str | None = "eager",
) -> MultiExitModel:
    """Load a multi-exit model in eval mode, in float32.

    Args:
        source: a model_dir or a hub id.
        problem_type: the task, if the checkpoint does not name it.
        attention: Hugging Face's attention implementation; None: the fastest.

    Raises:
        ModelError: files are missing or damaged, the family is not supported, there are no exit
            heads or they do not fit, or weights are missing or not finite.
    """
    folder = resolve_model_dir(source)
    config = load_config(folder)
    weights = read_weights(folder)
    exit_config = _exit_config(folder, config, weights, problem_type)
    # First without memory, because the configuration may ask for far more than the weights fill.
    with torch.device("meta"):
        planned = _build(folder, config, exit_config, attention)
    _check_weights(planned, weights, folder)
    model = _build(folder, config, exit_config, attention)
    model.load_state_dict(weights, strict=False)
    return model.eval()


def _build(
    folder: Path, config: Any, exit_config: MultiExitConfig, attention: str | None
) -> MultiExitModel:
    """A model with random weights, or with none if the default device is `meta`.

    Raises:
        ModelError: no encoder can have this configuration.
    """
    try:
        return MultiExitModel(build_encoder(config, attention), exit_config)
    except CONFIG_ERRORS as error:
        raise ModelError(
            f"no encoder can be built from {folder / 'config.json'}: "
            f"{type(error).__name__}: {first_line(error)}",
            COPY_CONFIG,
        ) from error


def load_pretrained(model_class: Any, folder: Path, config: Any) -> tuple[Any, list[str]]:
    """A Hugging Face model with the weights of a folder, in eval mode, in float32, on the CPU.

    Args:
        model_class: such as `transformers.AutoModel`.
        folder: a local folder.
        config: its configuration.

    Returns:
        The model, and the names of its weights that the folder lacks, which are random.

    Raises:
        ModelError: the weights are missing or damaged, do not fit the configuration, or are not
            finite.
    """
    weights = read_weights(folder)
    try:
        # First without memory, because the configuration may ask for far more than the weights
        # fill, and what is lacking would be made.
        with torch.device("meta"):
            planned = model_class.from_config(config)
        _check_size(planned, weights, folder)
        # The library reads no file: it would read those that the files of the folder name.
        model, loaded = type(planned).from_pretrained(
            None,
            config=config,
            state_dict=dict(weights),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # it names them only in its log
            output_loading_info=True,
        )
    except (*CONFIG_ERRORS, ImportError) as error:
        raise ModelError(
            f"no model can be made from {folder}: {type(error).__name__}: {first_line(error)}",
            COPY_CONFIG,
        ) from error
    for name, stored, expected in sorted(loaded["mismatched_keys"]):
        # If only the number of labels differs, the error says so.
        if expected[0] == config.num_labels and expected[1:] == stored[1:]:
            label_names(folder, config, stored[0])
        check_weight(folder, name, torch.empty(stored, device="meta"), expected)
    for name, value in model.state_dict().items():
        check_weight(folder, name, weights.get(name, value), value.shape)
    return model.eval(), sorted(loaded["missing_keys"])


def _check_size(planned: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Check how large a model would be, before it takes memory.

    Args:
        planned: the model, on the device `meta`.
        weights: what it is made from.
        folder: where they are from, for the message.

    Raises:
        ModelError: it has more than twice as many numbers as the weights.
    """
    asked = sum(value.numel() for value in planned.state_dict().values())
    held = sum(value.numel() for value in weights.values())
    if asked > 2 * held:
        raise ModelError(
            f"{folder / 'config.json'} asks for {asked:,} numbers, but the weights have {held:,}",
            "use the config.json and the weights of the same model",
        )


def _check_weights(model: MultiExitModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Check the weights that a model needs, and log the names of those that it does not need.

    Raises:
        ModelError: a weight is missing, has another shape or dtype, or is not finite.
    """
    expected = model.state_dict()
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights, first {missing[0]!r}; expected the encoder "
            f"under {model.backbone.prefix!r} and the heads under 'classifiers'",
            COPY_WEIGHTS,
        )
    for name, value in expected.items():
        check_weight(folder, name, weights[name], value.shape)
    unused = sorted(name for name in set(weights) - set(expected) if "position_ids" not in name)
    if unused:
        logger.warning("%s: ignored weights that no exit uses: %s", folder, ", ".join(unused))


def save_checkpoint(model: MultiExitModel, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, without a tokenizer and without exit 0.

    Args:
        model: the model.
        folder: the folder to write to; it is made if it does not exist.

    Raises:
        OSError: a file cannot be written.
    """
    save_config(model, folder)
    save_weights(model, folder)
    for name in (EXIT_0_FILE, TRAINED_ON_NAME):  # those of a model which is replaced
        (folder / name).unlink(missing_ok=True)


def save_config(model: MultiExitModel, folder: Path) -> None:
    """Write `config.json`; the arguments and errors are those of `save_checkpoint`."""
    folder.mkdir(parents=True, exist_ok=True)
    exits = model.exit_config
    config = model.backbone.config
    config.id2label = dict(enumerate(exits.labels))
    config.label2id = {label: index for index, label in enumerate(exits.labels)}
    config.problem_type = exits.problem_type.value
    config.architectures = [f"{type(model.backbone).__name__}{MULTI_EXIT}"]
    others = ("labels", "problem_type")  # which the settings of Hugging Face hold
    block = {name: value for name, value in msgspec.to_builtins(exits).items() if value}
    setattr(config, CONFIG_BLOCK, {name: block[name] for name in block if name not in others})
    config.save_pretrained(folder)


def save_weights(model: MultiExitModel, folder: Path) -> None:
    """Write `model.safetensors`; the errors are those of `save_checkpoint`."""
    from safetensors.torch import save_file

    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    with system_errors(folder / WEIGHTS[0]):
        save_file(weights, folder / WEIGHTS[0], metadata={"format": "pt"})


def load_config(folder: Path) -> Any:
    """The Hugging Face configuration of a folder.

    Args:
        folder: a model_dir, or the folder of another Hugging Face model.

    Raises:
        ModelError: it is missing or damaged, or names a family that is not supported.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig

    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json", TRAINED)
    try:
        # Before it becomes a configuration, for which one of the numbers may ask for memory.
        content, _ = PreTrainedConfig.get_config_dict(folder)
        for name, value in content.items():
            _check_number(name, value)
        family_of(str(content["model_type"]))
        return AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, *CONFIG_ERRORS) as error:
        raise ModelError(
            f"{path} is not a valid configuration: {type(error).__name__}: "
            f"{' '.join(str(error).split())}",
            COPY_CONFIG,
        ) from error


def _check_number(name: str, value: Any) -> None:
    """Check a setting, if it is a number.

    Raises:
        ValueError: it is larger than any encoder needs, or NaN.
    """
    largest = 1.0 if name.endswith("_eps") else _LARGEST.get(name, _LARGEST_OF_OTHERS)
    if isinstance(value, (int, float)) and not abs(value) <= largest:  # as NaN is not, either
        raise ValueError(f"{name} is {value}, expected at most {largest}")


def _exit_config(
    folder: Path, config: Any, weights: dict[str, Tensor], problem_type: ProblemType | None
) -> MultiExitConfig:
    """The exits of a checkpoint; without our block, every layer has one.

    Args:
        folder: the model_dir, for messages.
        config: its configuration.
        weights: its state dict, whose heads say how many labels there are.
        problem_type: the task that the caller asks for.

    Raises:
        ModelError: there are no heads, our block is wrong, or it does not fit the heads.
    """
    from transformers.activations import ACT2FN

    heads = [name for name in weights if re.fullmatch(r"classifiers\.\d+\.weight", name)]
    if not heads:
        check_kind(folder, MULTI_EXIT)
        raise ModelError(
            f"{folder} is not a multi-exit model: it has no weights classifiers.0.weight, ...",
            "if it is a classifier, use `convert` instead",
        )
    every_layer = tuple(range(1, int(config.num_hidden_layers) + 1))
    defaults = {"exits": every_layer, "labels": ()}
    task = problem_type_of(folder, config, problem_type)
    try:
        block = getattr(config, CONFIG_BLOCK, None) or {}
        exit_config = msgspec.convert(defaults | block, MultiExitConfig)
        if exit_config.last_head is not None:
            _check_number("norm_eps", exit_config.last_head.norm_eps)
            if exit_config.last_head.activation not in ACT2FN:
                raise ValueError(f"unknown activation {exit_config.last_head.activation!r}")
    except (ValueError, TypeError, msgspec.ValidationError) as error:
        raise ModelError(
            f"{folder / 'config.json'} has a wrong {CONFIG_BLOCK!r} block: {error}",
            "give exits as a list of layers, hidden_layers, hidden_width and queries as numbers, "
            f"pooling as {', '.join(kind.value for kind in Pooling)}, "
            f"and activation as {' or '.join(kind.value for kind in Activation)}",
        ) from error
    exits = exit_config.exits
    thresholds = exit_config.label_thresholds
    if len(heads) != len(exits):  # one with another number is missed later
        raise ModelError(
            f"{folder}: there are {len(heads)} heads; expected one classifier for each of the "
            f"{len(exits)} exits",
            COPY_WEIGHTS,
        )
    first = weights[heads[0]]
    outputs = len(first) if first.ndim else 0
    if len(thresholds) not in (0, outputs) or not all(0 <= value <= 1 for value in thresholds):
        raise ModelError(
            f"{folder / 'config.json'} has the label_thresholds {list(thresholds)}",
            f"give {outputs} probabilities, one for each label, or none",
        )
    return replace(exit_config, labels=label_names(folder, config, outputs), problem_type=task)


def problem_type_of(folder: Path, config: Any, asked: ProblemType | None) -> ProblemType:
    """The task that the checkpoint names or the caller asks for.

    A model that names none and has one label ranks, as in sentence-transformers; one with more is
    single-label.

    Args:
        folder: the model_dir, for the message.
        config: its configuration.
        asked: the task that the caller asks for.

    Raises:
        ModelError: they contradict each other, the configuration names a task that does not exist,
            or it is a regression with several outputs.
    """
    try:
        named = ProblemType(config.problem_type) if config.problem_type else None
    except ValueError as error:
        raise ModelError(
            f"{folder / 'config.json'} has the problem_type {config.problem_type!r}",
            f"give problem_type as {' or '.join(kind.value for kind in ProblemType)}",
        ) from error
    if named and asked and named is not asked:
        raise ModelError(
            f"{folder} was trained for {named.value}, not for {asked.value}",
            "leave out `problem_type`",
        )
    labels = len(config.id2label)
    usual = ProblemType.RANKING if labels == 1 else ProblemType.SINGLE_LABEL
    task = named or asked or usual
    if KINDS[task].has_one_logit and labels != 1:
        raise ModelError(
            f"{folder} is a regression model with {labels} labels",
            "give a classifier, or a reranker, which has one label",
        )
    return task


def label_names(folder: Path, config: Any, outputs: int) -> tuple[str, ...]:
    """The labels that a configuration names, in order.

    Args:
        folder: the model_dir, for messages.
        config: its configuration.
        outputs: how many logits the heads give.

    Raises:
        ModelError: there are more or fewer labels than logits, or a label appears twice.
    """
    labels = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    if len(labels) != outputs:
        raise ModelError(
            f"{folder / 'config.json'} names {len(labels)} labels, but the heads give {outputs}",
            "make id2label list every label of the heads in order; without it, there are two",
        )
    if len(set(labels)) != len(labels):
        raise ModelError(
            f"{folder / 'config.json'} names a label twice: {list(labels)}",
            "make the names in id2label distinct",
        )
    return labels
