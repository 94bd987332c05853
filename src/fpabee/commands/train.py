"""`fpabee-train`: an encoder and labelled rows become a multi-exit model."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import msgspec
import rich_click as click
from click import get_current_context
from rich.table import Table

from ..exporter.exit_config import Pooling
from ..exporter.training.options import TrainOptions, check_training
from ..runtime.machine import require
from ..runtime.tasks.kinds import CLASSIFICATION
from . import options
from .command import READING, command
from .console import echo, step_progress, table_console


@command(
    examples="""
fpabee-train --backbone ENCODER --train a.jsonl --dev b.jsonl -o model_dir
""",
    panels={
        "Exits": "--no-exit-0 --exits --distill --pooling",
        "Optimisation": "--epochs --lr --batch-size --max-length --seed --bf16",
        **READING,
    },
)
@options.option(
    "--backbone", "MODEL", "Encoder: a folder, a hub id, or another model_dir.", required=True
)
@options.option("--train", "FILE", "Rows to train on.", required=True)
@options.option("--dev", "FILE", "Rows that are scored after every epoch.", required=True)
@options.option("--test", "FILE", "Rows that are scored once, at the end.")
@options.path("-o --output", "Folder for the model (model_dir).", "DIR", required=True)
@options.choice(
    "--problem-type",
    "TYPE",
    "Task. Default: single-label.",
    CLASSIFICATION,
)
@options.flag("--force", "Replace an existing model.")
@options.quiet
@options.as_json
@options.numbers("--exits", "N,N,...", "Layers with an exit. Default: every layer.")
@options.number(
    "--distill",
    "How much early exits are trained on the output of the last exit instead of the labels, from "
    "0 to 1. 0 gives the loss of F-PABEE.",
    TrainOptions.distill,
)
@options.choice(
    "--pooling",
    "KIND",
    "How exits see the text.",
    Pooling,
    default=TrainOptions.pooling.value,
)
@options.number(
    "--epochs",
    "Passes over the training rows. Default: 3, but with little data as many as make 1,000 steps, "
    "up to 20.",
)
@options.number("--lr", "Learning rate of the encoder.", TrainOptions.lr)
@options.count("--batch-size", "Rows per step.", TrainOptions.batch_size)
@options.count(
    "--max-length", "Number of tokens to which longer texts are truncated.", TrainOptions.max_length
)
@options.count("--seed", "Seed of all random choices.", TrainOptions.seed, min=0)
@options.flag("--bf16", "Compute in bfloat16 where that is safe: on a GPU, or a CPU with AVX-512.")
@click.option(
    "--no-exit-0",
    "exit_0",
    is_flag=True,
    flag_value=False,
    default=True,
    show_default=False,
    help="Leave out exit 0, a bag of n-grams that can answer before layer 1.",
)
@options.columns
def main(
    output: Path,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a text classifier with an exit after every layer, or after chosen layers."""
    reading = options.read_options(settings)
    with options.wrong_usage():
        wanted = msgspec.convert(settings | {"reading": reading}, TrainOptions)
    require("train")
    check_training(output, wanted)  # before the slow imports
    from transformers.utils import logging as transformers_logging

    from ..exporter.training.workflow import train

    # Its bars and warnings are about weights that a multi-exit model does not use.
    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    program = get_current_context().find_root().info_name
    with step_progress(quiet) as progress:
        report = train(output, wanted, progress, f"{program} {shlex.join(sys.argv[1:])}")
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    for name, scores in report.scores.items():
        table = Table("exit", "layer", *scores[0], title=f"{name}: scores of every exit")
        for number, layer, row in zip(report.numbers, report.exits, scores, strict=True):
            table.add_row(str(number), str(layer), *(f"{value:.4f}" for value in row.values()))
        table_console().print(table)
    echo(f"{output}: trained in {report.train_seconds:.0f} s")
    echo(f"next: fpabee-export {shlex.quote(str(output))}")
