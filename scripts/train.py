#!/usr/bin/env python
"""Train a multi-exit classifier: every exit at once, the earlier ones also by the last.

    python scripts/train.py --backbone DIR_OR_HUB_ID --train train.jsonl --dev dev.jsonl \
        --output model_dir

Files are those of `fpabee-run`, with `text`, optionally `text_pair`, and `label` or `labels`;
a `datasets` name is written `OWNER/NAME[/CONFIG]:SPLIT`. Writes the Hugging Face layout that
`fpabee-export` reads, and `training.json` with the scores of every exit. The loss is that of
F-PABEE with half of an earlier exit's target from the last one; `--distill 0` is the paper's.

`--from-classifier DIR_OR_HUB_ID` in place of `--backbone` adds exits to a plain classifier
(`AutoModelForSequenceClassification`): it keeps its labels and its head, and the other exits
learn what it says of the training texts, which need no labels.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from train_rows import label_names, load_rows
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fpabee.calibration.trace import data_sha256
from fpabee.exporter.backbones import build_encoder, family_of
from fpabee.exporter.checkpoint import load_config, resolve_model_dir, save_checkpoint
from fpabee.exporter.model import MultiExitConfig, MultiExitModel, Pooling
from fpabee.exporter.training.from_classifier import Classifier
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.cli.console import table_console
from fpabee.runtime.cli.errors import exits_with_one_line
from fpabee.runtime.cli.options import column_options, read_options
from fpabee.runtime.errors import InputError
from fpabee.runtime.files import ReadOptions, Row
from fpabee.runtime.metrics import encode_labels, evaluate

# Options that change nothing in what is learnt.
_NOT_TRAINED_BY = ("resume", "force", "test", "output")


@dataclass(frozen=True)
class Options:
    """The settings of one training run."""

    backbone: str
    train: str
    dev: str
    test: str | None
    output: Path
    problem_type: ProblemType
    epochs: float
    lr: float
    head_lr: float
    batch_size: int
    max_length: int
    pooling: Pooling
    exits: tuple[int, ...] | None
    exit_weights: str
    random_init: bool
    seed: int
    bf16: bool
    resume: bool
    force: bool = False
    from_classifier: str | None = None
    freeze_encoder: bool = False
    distill: float = 0.5
    reading: ReadOptions = field(default_factory=ReadOptions)


class MultiExitTrainer(Trainer):
    """Trainer with the loss over all exits, and a learning rate of its own for the heads."""

    def __init__(self, *, options: Options, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.options = options

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Weighted loss over the exits; the outputs are logits `[rows, exits, labels]`."""
        labels = inputs.pop("labels")
        logits = model(**inputs)
        options = self.options
        loss = exit_loss(
            logits, labels, options.problem_type, options.exit_weights, options.distill
        )
        return (loss, {"logits": logits.transpose(0, 1)}) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with the head learning rate on the pooler and the classifiers."""
        trained = cast(torch.nn.Module, self.model)
        decayed = set(self.get_decay_parameter_names(trained))
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in trained.named_parameters():
            groups.setdefault((is_head(name), name in decayed), []).append(parameter)
        arranged = [
            {
                "params": parameters,
                "lr": self.options.head_lr if in_head else self.options.lr,
                "weight_decay": 0.01 if decays else 0.0,
            }
            for (in_head, decays), parameters in groups.items()
        ]
        # Fused, it goes over the weights once; most are embeddings, which a batch hardly uses.
        self.optimizer = torch.optim.AdamW(arranged, fused=True)
        return self.optimizer


def is_head(name: str) -> bool:
    """Whether a weight belongs to the exits and not to the encoder."""
    return name.startswith(("classifiers.", "pooler.", "last_head.")) or ".pooler." in name


def exit_loss(
    logits: Tensor, labels: Tensor, problem_type: ProblemType, weights: str, distill: float = 0.0
) -> Tensor:
    """Weighted mean of the exits' losses (F-PABEE, eq. 13: weight j for exit j).

    Args:
        logits: `[exits, rows, labels]`.
        labels: `[rows]` int64, or `[rows, labels]` of 0 and 1 for multi-label; for either also
            probabilities `[rows, labels]`.
        problem_type: cross-entropy, or binary cross-entropy with logits.
        weights: `linear` as in the paper, or `uniform`.
        distill: share of the earlier exits' loss whose target is what the last exit says
            instead of the label (self-distillation as in FastBERT, 2004.02178).
    """
    exits = logits.shape[0]
    weight = torch.arange(1, exits + 1) if weights == "linear" else torch.ones(exits)
    if problem_type is ProblemType.SINGLE_LABEL:
        soft_labels = labels.dtype.is_floating_point
        hard = labels if soft_labels else functional.one_hot(labels, logits.shape[-1])
        hard = hard.to(logits.dtype)
        soft = logits[-1].detach().softmax(dim=-1)
        loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    else:
        hard, soft = labels.to(logits.dtype), logits[-1].detach().sigmoid()
        loss = functional.binary_cross_entropy_with_logits
    # Both losses are linear in their target.
    taught = (1 - distill) * hard + distill * soft
    losses = [loss(exit_logits, taught) for exit_logits in logits[:-1]]
    losses.append(loss(logits[-1], hard))
    return (torch.stack(losses) * weight.to(logits.device)).sum() / weight.sum()


def features(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    labels: tuple[str, ...],
    options: Options,
    teacher: Classifier | None = None,
) -> list[dict[str, Any]]:
    """Tokenized rows with encoded labels, or with the probabilities that a teacher gives them."""
    # Row by row as the engine does: a text alone is not a pair with an empty text.
    encoded = tokenizer(
        [row.text if row.text_pair is None else (row.text, row.text_pair) for row in rows],
        truncation=True,
        max_length=options.max_length,
    )
    inputs = [{name: encoded[name][index] for name in encoded} for index in range(len(rows))]
    if teacher:
        targets = teacher.soft_labels(inputs, DataCollatorWithPadding(tokenizer))
    else:
        given = [row.labels or () for row in rows]
        places = [row.place for row in rows]
        targets = encode_labels(given, labels, options.problem_type, places).tolist()
    return [row | {"labels": target} for row, target in zip(inputs, targets, strict=True)]


def exit_scores(
    logits: np.ndarray[Any, Any], labels: Any, options: Options
) -> list[dict[str, float]]:
    """Scores of every exit.

    Args:
        logits: `[rows, exits, labels]`.
        labels: `[rows]`, or `[rows, labels]` of 0 and 1.
        options: names the task.
    """
    count = logits.shape[-1]
    scores = []
    for exit_logits in logits.transpose(1, 0, 2):
        if options.problem_type is ProblemType.SINGLE_LABEL:
            predicted = exit_logits.argmax(axis=-1)
        else:
            predicted = (exit_logits > 0).astype(np.int64)
        scores.append(evaluate(predicted, np.asarray(labels), count))
    return scores


def build_model(options: Options, labels: tuple[str, ...]) -> tuple[MultiExitModel, Any]:
    """The model to train, and its tokenizer."""
    folder = resolve_model_dir(options.backbone)
    config = load_config(folder)
    family_of(config.model_type)
    if options.random_init:
        encoder = build_encoder(config, attention=None)
    else:
        encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
    exits = options.exits or tuple(range(1, encoder.config.num_hidden_layers + 1))
    exit_config = MultiExitConfig(exits, labels, options.problem_type, options.pooling)
    return MultiExitModel(encoder, exit_config), AutoTokenizer.from_pretrained(folder)


def teacher_of(options: Options) -> Classifier | None:
    """The classifier that gets exits, if there is one."""
    if options.from_classifier is None:
        return None
    # Single-label is the default, and so not asked for.
    multi = options.problem_type is ProblemType.MULTI_LABEL
    return Classifier(options.from_classifier, options.problem_type if multi else None)


def train(options: Options, console: Console) -> dict[str, Any]:
    """Train, evaluate and save; returns what stands in `training.json`.

    Raises:
        InputError: rows or options that cannot be used, a model that is there already, or
            nothing to resume from.
        ModelError: a backbone or classifier that cannot be used.
    """
    checkpoints = options.output / "checkpoints"
    last = _last_checkpoint(checkpoints)
    _check_output(options, last)
    set_seed(options.seed)
    teacher = teacher_of(options)
    files = {"train": options.train, "dev": options.dev, "test": options.test}
    rows = {}
    for name, source in files.items():
        if source:
            labelled = teacher is None or name != "train"
            rows[name] = load_rows(source, labelled, options.reading)
    if teacher:
        options = replace(options, problem_type=teacher.problem_type)
        model = teacher.multi_exit(options.exits, options.pooling)
        tokenizer = AutoTokenizer.from_pretrained(teacher.folder)
    else:
        model, tokenizer = build_model(options, label_names(rows["train"], options.train))
    if options.freeze_encoder:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and is_head(name))
    labels = model.exit_config.labels
    data = {
        name: features(part, tokenizer, labels, options, teacher if name == "train" else None)
        for name, part in rows.items()
    }
    steps = -(-len(data["train"]) // options.batch_size) * options.epochs
    _begin(checkpoints, options, data_sha256(rows["train"]))
    trainer = MultiExitTrainer(
        options=options,
        model=model,
        args=_arguments(options, checkpoints, int(0.06 * steps)),
        train_dataset=cast(Any, data["train"]),
        eval_dataset=cast(Any, data["dev"]),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda prediction: _metrics(prediction, options),
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last if options.resume else None)
    seconds = time.perf_counter() - started

    save_checkpoint(model, options.output)
    tokenizer.save_pretrained(options.output)
    scores = {}
    for name in [part for part in ("dev", "test") if part in data]:
        prediction = trainer.predict(cast(Any, data[name]))
        scores[name] = exit_scores(cast(Any, prediction.predictions), prediction.label_ids, options)
        _print_scores(console, name, scores[name], model.exit_config.exits)
    report = {
        "options": _plain(options),
        "rows": {name: len(part) for name, part in rows.items()},
        "labels": labels,
        "exits": model.exit_config.exits,
        "train_seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "scores": scores,
    }
    (options.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(checkpoints, ignore_errors=True)
    return report


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written whole: its state comes last."""
    whole = [path for path in folder.glob("checkpoint-*") if _is_json(path / "trainer_state.json")]
    steps = {int(path.name.rpartition("-")[2]): str(path) for path in whole}
    return steps[max(steps)] if steps else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _check_output(options: Options, last: str | None) -> None:
    """Refuse to train what is there already, and to resume what is not."""
    is_finished = (options.output / "training.json").is_file()
    if options.resume and last is None:
        raise InputError(
            f"{options.output} holds a finished model"
            if is_finished
            else f"{options.output / 'checkpoints'} holds no finished epoch to resume from",
            "leave out --resume" + (", and give --force to train it anew" if is_finished else ""),
        )
    if is_finished and not options.resume and not options.force:
        raise InputError(
            f"{options.output} holds a model", "replace it with --force, or name another --output"
        )


def _plain(options: Options) -> dict[str, Any]:
    """The options as JSON has them."""
    return cast("dict[str, Any]", json.loads(json.dumps(asdict(options), default=str)))


def _begin(checkpoints: Path, options: Options, rows: str) -> None:
    """Make room for checkpoints, or see that those to resume from are of the same training.

    Args:
        checkpoints: their folder.
        options: of this training.
        rows: hash of the training rows.
    """
    settings, file = _plain(options) | {"rows": rows}, checkpoints / "options.json"
    if not options.resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.mkdir(parents=True)
        file.write_text(json.dumps(settings))
    elif file.is_file():
        begun = json.loads(file.read_text())
        for name in [name for name in settings if name not in _NOT_TRAINED_BY]:
            if begun.get(name) != settings[name]:
                what = f"with {name} {begun.get(name)}, not {settings[name]}"
                raise InputError(
                    f"{checkpoints} was begun {'with other rows' if name == 'rows' else what}",
                    "give what it was begun with, or leave out --resume",
                )


def _arguments(options: Options, checkpoints: Path, warmup_steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=options.lr,
        warmup_steps=warmup_steps,
        lr_scheduler_type="linear",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        seed=options.seed,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        remove_unused_columns=False,
    )


def _metrics(prediction: EvalPrediction, options: Options) -> dict[str, float]:
    scores = exit_scores(cast(Any, prediction.predictions), prediction.label_ids, options)
    main = next(iter(scores[-1]))
    return {f"{main}_exit_{number}": row[main] for number, row in enumerate(scores, start=1)}


def _print_scores(
    console: Console, name: str, scores: list[dict[str, float]], layers: tuple[int, ...]
) -> None:
    table = Table("exit", "layer", *scores[0], title=f"{name}: scores of every exit")
    for number, (layer, row) in enumerate(zip(layers, scores, strict=True), start=1):
        table.add_row(str(number), str(layer), *(f"{value:.4f}" for value in row.values()))
    console.print(table)


def _layers(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in value.split(",")) if value else None
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of layers such as 2,4,6") from None


@click.command(context_settings={"show_default": True})
@click.option("--backbone", help="Folder, hub id, or another model_dir.")
@click.option(
    "--from-classifier",
    help="In place of --backbone: a plain classifier (folder or hub id) that gets exits.",
)
@click.option("--freeze-encoder", is_flag=True, help="Train the exits alone.")
@click.option("--train", required=True, help="Training rows.")
@click.option("--dev", required=True, help="Rows that are scored after every epoch.")
@click.option("--test", help="Rows that are scored once, at the end.")
@column_options
@click.option("--output", required=True, type=click.Path(path_type=Path), help="model_dir.")
@click.option(
    "--problem-type",
    type=click.Choice([kind.value for kind in ProblemType]),
    default=ProblemType.SINGLE_LABEL.value,
)
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), default=3.0)
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    default=5e-5,
    help="Learning rate of the encoder.",
)
@click.option(
    "--head-lr",
    type=click.FloatRange(min=0, min_open=True),
    help="Learning rate of the heads; default: 5e-3, or 1e-3 with --pooling cls, whose dense "
    "layer is more than a linear classifier.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32)
@click.option("--max-length", type=click.IntRange(min=4), default=128, help="In tokens.")
@click.option("--pooling", type=click.Choice([kind.value for kind in Pooling]), default="mean")
@click.option("--exits", callback=_layers, help="Layers with an exit; default: every layer.")
@click.option("--exit-weights", type=click.Choice(["linear", "uniform"]), default="linear")
@click.option(
    "--distill",
    type=click.FloatRange(0, 1),
    default=Options.distill,
    help="Share of the earlier exits' loss that is to agree with the last exit; 0: the paper's.",
)
@click.option("--random-init", is_flag=True, help="Ignore the backbone's weights.")
@click.option("--seed", type=int, default=42)
@click.option("--bf16", is_flag=True, help="bfloat16 autocast.")
@click.option("--resume", is_flag=True, help="Go on from the last finished epoch.")
@click.option("--force", is_flag=True, help="Replace a model that is there.")
@exits_with_one_line
def main(problem_type: str, pooling: str, head_lr: float | None, **settings: Any) -> None:
    """Train a classifier with an exit after every layer (or after chosen ones)."""
    console = table_console()
    if bool(settings["backbone"]) is bool(settings["from_classifier"]):
        raise click.UsageError("give either --backbone or --from-classifier")
    if settings["from_classifier"] and settings["random_init"]:
        raise click.UsageError("--from-classifier keeps weights that --random-init would ignore")
    settings["backbone"] = settings["backbone"] or settings["from_classifier"]
    options = Options(
        problem_type=ProblemType(problem_type),
        pooling=Pooling(pooling),
        head_lr=head_lr or (5e-3 if pooling == Pooling.MEAN.value else 1e-3),
        reading=read_options(settings),
        **settings,
    )
    report = train(options, console)
    click.echo(f"{options.output}: trained in {report['train_seconds']:.0f} s")


if __name__ == "__main__":
    main()
