"""Train: read the rows, build the model, train its exits and exit 0, score every exit, save."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, set_seed

from ...calibration.progress import Progress, silent
from ...runtime.artifact.folder import sha256_of
from ...runtime.artifact.manifest import ProblemType
from ...runtime.artifact.trained_on import write_trained_on
from ...runtime.errors import InputError, ModelError
from ...runtime.exit_0 import ExitZero
from ...runtime.files import Row
from ...runtime.files.rows import data_sha256, encode_labels
from ...runtime.quality import Labels
from ..checkpoint import load_config, load_pretrained, resolve_model_dir, save_checkpoint
from ..exit_0_files import save_exit_0
from ..exit_config import MultiExitConfig
from ..model import MultiExitModel, by_row, predict
from ..staging import system_errors
from ..tokenizer import load_tokenizer, pad_id
from ..weights import check_weight
from .bag_of_ngrams import train_exit_0
from .examples import Examples, encoded_rows, label_names, load_rows
from .options import REPORT_NAME, TrainOptions, check_training
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
        ModelError: the encoder cannot be used.
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
    rows = {name: load_rows(source, options.reading) for name, source in sources.items() if source}
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
    started = time.perf_counter()
    options = replace(options, epochs=options.epochs_for(len(rows["train"])))
    output.mkdir(parents=True, exist_ok=True)
    train_exits(model, data["train"], data["dev"], padding, options, progress)
    for name, value in model.state_dict().items():  # before hours of exit 0, and not at the export
        check_weight(output, name, value, value.shape)
    exit_0 = None
    if options.exit_0:
        exit_0 = train_exit_0(model, data["train"], data["dev"], padding, options.seed, progress)
    seconds = time.perf_counter() - started
    report = TrainReport(
        options=options,
        problem_type=config.problem_type,
        model_type=model.backbone.model_type,
        data={name: _source(str(sources[name]), part) for name, part in rows.items()},
        labels=config.labels,
        exits=(0, *config.exits) if exit_0 else config.exits,
        exit_0_bytes=sum(part.nbytes for part in exit_0.arrays.values()) if exit_0 else 0,
        scores={
            name: _scores(model, exit_0, part, padding)
            for name, part in data.items()
            if name != "train"
        },
        train_seconds=round(seconds, 1),
        command=command,
        versions={"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
    )
    save_checkpoint(model, output)
    with system_errors(output):
        tokenizer.save_pretrained(output)
        write_trained_on(output, (row.content for row in rows["train"]))
    if exit_0:
        save_exit_0(output, exit_0)
    model_card(report).save(output / "README.md")
    # Last, because this file marks the training as finished.
    text = json.dumps(report.to_dict(), indent=2)
    (output / REPORT_NAME).write_text(text, encoding="utf-8")
    return report


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
    fewest = 2 if problem_type is ProblemType.SINGLE_LABEL else 1
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
    return encode_labels(names, config.labels, config.problem_type, places)


def _scores(
    model: MultiExitModel, exit_0: ExitZero | None, data: Examples, padding: Mapping[str, float]
) -> list[dict[str, float]]:
    """The scores of every exit, exit 0 first if there is one."""
    rows = data.rows
    logits = predict(model, rows, padding, by_row)
    if exit_0:
        parts = [exit_0(rows[n : n + _ROWS]) for n in range(0, len(rows), _ROWS)]
        logits = np.concatenate([np.concatenate(parts)[:, None], logits], axis=1)
    return exit_scores(logits, data.targets, model.exit_config.problem_type)


def _source(source: str, rows: Sequence[Row]) -> DataSource:
    path = Path(source)
    digest = sha256_of(path) if path.is_file() else data_sha256(rows)
    return DataSource(source, len(rows), digest)
