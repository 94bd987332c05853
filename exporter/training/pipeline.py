"""Train: read the rows, build the model, train all exits together, score every exit, save."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, set_seed

from ...calibration.trace import data_sha256
from ...runtime.artifact.folder import sha256_of
from ...runtime.artifact.manifest import ProblemType
from ...runtime.files import Row
from ...runtime.metrics import encode_labels
from ...runtime.progress import Progress, silent
from ..backbones import build_encoder
from ..checkpoint import load_config, resolve_model_dir, save_checkpoint
from ..model import MultiExitConfig, MultiExitModel
from .from_classifier import Classifier
from .model_card import model_card
from .options import TrainOptions
from .report import REPORT_NAME, DataSource, TrainReport
from .resume import begin, check_output, checkpoints_of, last_checkpoint
from .rows import label_names, load_rows
from .trainer import Features, MultiExitTrainer, is_head

_PACKAGES = ("fpabee", "torch", "transformers")


def train(
    output: str | Path, options: TrainOptions, progress: Progress = silent, command: str = ""
) -> TrainReport:
    """Train a multi-exit model.

    All exits are trained together. The folder can be compiled with `fpabee.exporter.export`.

    Args:
        output: the model_dir to write: `config.json`, `model.safetensors`, the tokenizer, a model
            card (`README.md`) and the report (`training.json`).
        options: the settings.
        progress: called with (loss and dev scores, steps done, steps in total).
        command: how this training was started, for the report.

    Returns:
        The scores of every exit, and what they were obtained with.

    Raises:
        InputError: rows cannot be read or lack labels, there is already a model, or there is
            nothing to resume.
        ModelError: the encoder or classifier cannot be used.
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
    check_output(output, options)
    set_seed(options.seed)
    teacher = None
    if options.from_classifier:
        teacher = Classifier(options.from_classifier, options.problem_type)
    sources = {"train": options.train, "dev": options.dev, "test": options.test}
    rows = {
        name: load_rows(source, teacher is None or name != "train", options.reading)
        for name, source in sources.items()
        if source
    }
    labels = teacher.labels if teacher else label_names(rows["train"], options.train)
    model, tokenizer = build_model(options, labels, teacher)
    config, length = model.exit_config, options.max_length
    teachers = {"train": teacher}
    data = {
        name: features(part, tokenizer, config, length, teachers.get(name))
        for name, part in rows.items()
    }
    begin(output, options, data_sha256(rows["train"]))
    checkpoints = checkpoints_of(output)
    trainer = MultiExitTrainer(model, options, checkpoints, data, tokenizer, progress)
    started = time.perf_counter()
    resumed = str(last_checkpoint(output)) if options.resume else None
    trainer.train(resume_from_checkpoint=resumed)
    seconds = time.perf_counter() - started
    save_checkpoint(model, output)
    tokenizer.save_pretrained(output)
    report = TrainReport(
        options=options,
        problem_type=config.problem_type,
        model_type=model.backbone.model_type,
        data={name: _source(str(sources[name]), part) for name, part in rows.items()},
        labels=config.labels,
        exits=config.exits,
        scores={name: trainer.scores(name) for name in data if name != "train"},
        train_seconds=round(seconds, 1),
        command=command,
        versions={"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
    )
    model_card(report).save(output / "README.md")
    # Last, because this file marks the training as finished.
    (output / REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return report


def build_model(
    options: TrainOptions, labels: tuple[str, ...], teacher: Classifier | None = None
) -> tuple[MultiExitModel, Any]:
    """The model to train, from an encoder or a classifier, and its tokenizer.

    Raises:
        ModelError: the encoder cannot be used, or the exits do not fit it.
    """
    if teacher:
        folder, model = teacher.folder, teacher.multi_exit(options.exits, options.pooling)
    else:
        folder = resolve_model_dir(str(options.backbone))
        config = load_config(folder)
        if options.random_init:
            encoder = build_encoder(config, attention=None)
        else:
            encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
        exits = options.exits or tuple(range(1, encoder.config.num_hidden_layers + 1))
        problem_type = options.problem_type or ProblemType.SINGLE_LABEL
        exit_config = MultiExitConfig(exits, labels, problem_type, options.pooling)
        model = MultiExitModel(encoder, exit_config)
    if options.freeze_encoder:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and is_head(name))
    return model, AutoTokenizer.from_pretrained(folder)


def features(
    rows: Sequence[Row],
    tokenizer: Any,
    config: MultiExitConfig,
    max_length: int,
    teacher: Classifier | None = None,
) -> Features:
    """Tokenized rows with their labels.

    Args:
        rows: the rows.
        tokenizer: of the model.
        config: names the labels and the task.
        max_length: longer rows are truncated to so many tokens.
        teacher: its predictions are the labels, instead of those of the rows.

    Raises:
        InputError: a label that the model does not have, or not exactly one in single-label rows.
    """
    # As the engine does: a single text is not a pair with an empty second text.
    encoded = tokenizer([row.content for row in rows], truncation=True, max_length=max_length)
    inputs = [{name: encoded[name][index] for name in encoded} for index in range(len(rows))]
    if teacher:
        targets = teacher.soft_labels(inputs, DataCollatorWithPadding(tokenizer))
    else:
        given = [row.labels or () for row in rows]
        places = [row.place for row in rows]
        targets = encode_labels(given, config.labels, config.problem_type, places).tolist()
    return [row | {"labels": target} for row, target in zip(inputs, targets, strict=True)]


def _source(source: str, rows: Sequence[Row]) -> DataSource:
    path = Path(source)
    digest = sha256_of(path) if path.is_file() else data_sha256(rows)
    return DataSource(source, len(rows), digest)
