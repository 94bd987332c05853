"""Train: read the rows, build the model, train its exits and exit 0, score every exit, save."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import AutoModel, set_seed

from ... import __version__
from ...calibration.progress import Progress, silent
from ...runtime.artifact.folder import sha256_of
from ...runtime.artifact.manifest import ProblemType, Task
from ...runtime.artifact.trained_on import write_trained_on
from ...runtime.errors import InputError, ModelError
from ...runtime.exit_0 import ExitZero
from ...runtime.files import Row
from ...runtime.files.rows import data_sha256
from ...runtime.quality import Labels
from ...runtime.tasks import task_of
from ..checkpoint import (
    load_config,
    load_pretrained,
    resolve_model_dir,
    save_config,
    save_weights,
)
from ..exit_0_files import EXIT_0_FILE, save_exit_0
from ..exit_config import MultiExitConfig
from ..model import MultiExitModel, by_row, predict
from ..paths import CONFIG_NAME, resolved
from ..staging import replacing, reserved, system_errors
from ..tokenizer import load_tokenizer, pad_id
from ..unfinished import unfinished
from ..weights import WEIGHTS, check_weight, read_weights
from .bag_of_ngrams import train_exit_0
from .examples import Examples, encoded_rows, label_names, labelled_rows
from .options import FEWEST_LABELS, REPORT_NAME, STEPS, TrainOptions, check_training
from .report import DataSource, TrainReport, model_card
from .trainer import exit_scores, train_exits

_PACKAGES = ("fpabee", "torch", "transformers")
_ROWS = 1024  # whose n-grams are in memory at once


def train(
    output: str | Path, options: TrainOptions, progress: Progress = silent, command: str = ""
) -> TrainReport:
    """Train a multi-exit model.

    All exits of the encoder are trained together, and then exit 0. The folder can be compiled with
    `fpabee.exporter.export`.

    Args:
        output: the model_dir to write: `config.json`, `model.safetensors`, `exit_0.safetensors`,
            the tokenizer, a model card (`README.md`) and the report (`training.json`).
        options: the settings.
        progress: called with (loss and dev scores, steps done, steps in total) of the encoder,
            and then of exit 0.
        command: how this training was started, for the report.

    Returns:
        The scores of every exit, and what they were obtained with.

    Raises:
        InputError: rows cannot be read or lack labels, there is already a model, or bfloat16 is
            asked for where it is slow.
        ArtifactError: a file cannot be written. A trained encoder stays in `OUTPUT.partial`, and
            the same call goes on from it.
        ModelError: the encoder cannot be used, or the training diverged.
        MissingExtraError: a package of `fpabee[train]` is not installed.

    Example:
        ```python
        from fpabee.exporter.training import TrainOptions, train

        options = TrainOptions(
            train="train.jsonl", dev="dev.jsonl", backbone="sentence-transformers/all-MiniLM-L6-v2"
        )
        report = train("model_dir", options)
        print([scores["accuracy"] for scores in report.scores["dev"]])
        ```
    """
    output = Path(output)
    check_training(output, options)
    if options.bf16 and not has_fast_bf16():
        raise InputError(
            "PyTorch computes many times slower in bfloat16 than in float32 on this CPU",
            "leave out `bf16`",
        )
    set_seed(options.seed)
    sources = {"train": options.train, "dev": options.dev, "test": options.test}
    rows = {
        name: list(labelled_rows(source, options.reading))
        for name, source in sources.items()
        if source
    }
    model, tokenizer = build_model(options, rows["train"])
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    config = model.exit_config
    length = min(options.max_length, model.backbone.max_positions())
    padding = {"input_ids": pad_id(tokenizer, model)}
    if "token_type_ids" in tokenizer.model_input_names:
        padding["token_type_ids"] = tokenizer.pad_token_type_id
    data = {
        name: Examples(encoded_rows(part, tokenizer, length), _labels(part, config))
        for name, part in rows.items()
    }
    used = {name: _source(str(sources[name]), part) for name, part in rows.items()}
    options = replace(options, epochs=options.epochs_for(len(rows["train"])))
    fingerprint = _fingerprint(model, rows["train"], options)
    with unfinished(resolved(output), STEPS, fingerprint) as steps:
        seconds = _train_encoder(model, data, padding, options, steps, progress)
        for name, value in model.state_dict().items():  # before exit 0, and not at the export
            check_weight(output, name, value, value.shape)
        started = time.perf_counter()
        before: list[ExitZero] = []
        if options.exit_0:
            seed = options.seed
            before = [train_exit_0(model, data["train"], data["dev"], padding, seed, progress)]
        seconds += time.perf_counter() - started
        report = TrainReport(
            options=options,
            problem_type=config.problem_type,
            model_type=model.backbone.model_type,
            data=used,
            labels=config.labels,
            exits=(*range(1 - len(before), 1), *config.exits),
            exit_0_bytes=sum(part.nbytes for each in before for part in each.arrays.values()),
            scores={
                name: _scores(model, before, part, padding)
                for name, part in data.items()
                if name != "train"
            },
            train_seconds=round(seconds, 1),
            command=command,
            versions={"python": platform.python_version()}
            | {package: version(package) for package in _PACKAGES},
        )
        output.mkdir(parents=True, exist_ok=True)
        # Without its configuration, a folder is no model.
        with replacing(output, last=CONFIG_NAME) as new:
            save_config(model, new)
            with system_errors(new):
                tokenizer.save_pretrained(new)
                write_trained_on(new, (row.content for row in rows["train"]))
            for each in before:
                save_exit_0(new, each)
            model_card(report).save(new / "README.md")
            text = json.dumps(report.to_dict(), indent=2)
            (new / REPORT_NAME).write_text(text, encoding="utf-8")
            # Last, because all else may not fit on the disk, and this takes no space.
            shutil.move(steps / WEIGHTS[0], new / WEIGHTS[0])
    if not before:
        (output / EXIT_0_FILE).unlink(missing_ok=True)  # that of a model which was replaced
    return report


def _fingerprint(model: MultiExitModel, rows: Sequence[Row], options: TrainOptions) -> str:
    """A hash of everything that decides the trained weights, before they are trained."""
    settings = replace(options, train="", dev="", test=None, backbone="", force=False)
    content = [__version__, msgspec.to_builtins(settings), data_sha256(rows)]
    digest = hashlib.sha256(msgspec.json.encode(content))
    for value in model.state_dict().values():
        digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()


def _train_encoder(
    model: MultiExitModel,
    data: Mapping[str, Examples],
    padding: Mapping[str, float],
    options: TrainOptions,
    steps: Path,
    progress: Progress,
) -> float:
    """Train the encoder and its exits, or take the weights that an earlier call has trained.

    Args:
        model: the model to train, on its device.
        data: the rows of `train` and `dev`.
        padding: see `model_inputs`.
        options: of the training.
        steps: where the weights are kept.
        progress: see `train`.

    Returns:
        How many seconds it took.

    Raises:
        OSError: the weights do not fit on the disk, which is found before the training.
    """
    times = steps / "seconds.json"
    if (steps / WEIGHTS[0]).is_file():
        model.load_state_dict(read_weights(steps))
        return float(json.loads(times.read_text()))
    started = time.perf_counter()
    size = sum(value.nbytes for value in model.state_dict().values())
    with reserved(steps / "space", size):
        train_exits(model, data["train"], data["dev"], padding, options, progress)
    seconds = time.perf_counter() - started
    with replacing(steps, last=WEIGHTS[0]) as new:
        (new / times.name).write_text(json.dumps(seconds))
        save_weights(model, new)
    return seconds


def has_fast_bf16() -> bool:
    """Whether PyTorch computes in bfloat16 without its slow substitute on this machine."""
    slow = "DEFAULT", "NO AVX", "AVX2"  # other values are AVX-512, or its like elsewhere
    return torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() not in slow


def build_model(options: TrainOptions, rows: Sequence[Row]) -> tuple[MultiExitModel, Any]:
    """The model to train, and its tokenizer.

    Args:
        options: the settings.
        rows: the training rows, which name the labels.

    Raises:
        InputError: the rows have too few labels.
        ModelError: the encoder or its tokenizer cannot be used, or the exits do not fit it.
    """
    labels = label_names(rows, options.train)
    problem_type = options.problem_type or ProblemType.SINGLE_LABEL
    fewest = FEWEST_LABELS[problem_type]
    if len(labels) < fewest:
        raise InputError(
            f"the labels of {options.train} are {', '.join(labels) or 'none'}; expected at least "
            f"{fewest}",
            "give rows of every label, or list them in labels.json beside the file",
        )
    folder = resolve_model_dir(options.backbone)
    encoder, lacking = load_pretrained(AutoModel, folder, load_config(folder))
    # Published encoders may lack a pooler, which no exit uses.
    lacking = [name for name in lacking if not name.startswith("pooler.")]
    if lacking:
        raise ModelError(
            f"{folder} lacks {len(lacking)} weights of its encoder, such as {lacking[0]}",
            "copy the weights again, or give another `backbone`",
        )
    exits = options.exits or tuple(range(1, encoder.config.num_hidden_layers + 1))
    exit_config = MultiExitConfig(exits, labels, problem_type, options.pooling)
    hidden = int(encoder.config.hidden_size)
    model = MultiExitModel(encoder, exit_config.with_hidden_layers(hidden))
    return model, load_tokenizer(folder, model)


def _labels(rows: Sequence[Row], config: MultiExitConfig) -> Labels:
    """The labels of rows, as targets.

    Raises:
        InputError: a label that the model does not have, or not exactly one in single-label rows.
    """
    names = [row.labels or () for row in rows]
    places = [row.where for row in rows]
    task = Task(problem_type=config.problem_type, labels=config.labels)
    return task_of(task).encode(names, places)


def _scores(
    model: MultiExitModel,
    before: Sequence[ExitZero],
    data: Examples,
    padding: Mapping[str, float],
) -> list[dict[str, float]]:
    """The scores of every exit, first of those before layer 1."""
    rows = data.rows
    logits = predict(model, rows, padding, by_row)
    for exit_0 in before:
        parts = [exit_0(rows[n : n + _ROWS]) for n in range(0, len(rows), _ROWS)]
        logits = np.concatenate([np.concatenate(parts)[:, None], logits], axis=1)
    return exit_scores(logits, data.targets, model.exit_config.problem_type)


def _source(source: str, rows: Sequence[Row]) -> DataSource:
    path = Path(source)
    digest = sha256_of(path) if path.is_file() else data_sha256(rows)
    return DataSource(source, len(rows), digest)
