"""`fpabee-train`: an encoder or a classifier, and labelled rows, become a multi-exit model."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ...runtime.artifact.manifest import ProblemType
from ...runtime.cli.console import Shown, echo, table_console
from ...runtime.cli.errors import exits_with_one_line, in_terms_of_options
from ...runtime.cli.options import column_options, read_options, version_option
from ...runtime.errors import InputError
from ...runtime.optional_packages import require
from ..pooling import Pooling
from ..training.options import ExitWeights, TrainOptions
from ..training.report import TrainProgress, TrainReport


def _layers(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    try:
        return tuple(int(part) for part in value.split(",")) if value else None
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of layers such as 2,4,6") from None


@click.command(context_settings={"show_default": True})
@click.option("--backbone", help="The encoder: a folder, a hub id, or another model_dir.")
@click.option(
    "--from-classifier",
    help="Instead of --backbone: a trained classifier (a folder or a hub id) to add exits to.",
)
@click.option("--freeze-encoder", is_flag=True, help="Train only the exits.")
@click.option(
    "--train",
    required=True,
    help="Rows to train on: a file, or a Hugging Face dataset as OWNER/NAME[/CONFIG]:SPLIT.",
)
@click.option("--dev", required=True, help="Rows that are scored after every epoch.")
@click.option("--test", help="Rows that are scored once, at the end.")
@column_options
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="model_dir to write."
)
@click.option(
    "--problem-type",
    type=click.Choice([kind.value for kind in ProblemType]),
    help="Default: that of --from-classifier, otherwise single-label.",
)
@click.option("--epochs", type=float, default=TrainOptions.epochs)
@click.option("--lr", type=float, default=TrainOptions.lr, help="Learning rate of the encoder.")
@click.option(
    "--head-lr",
    type=float,
    help="Learning rate of the exits. Default: 5e-3, or 1e-3 with --pooling cls.",
)
@click.option("--batch-size", type=int, default=TrainOptions.batch_size)
@click.option("--max-length", type=int, default=TrainOptions.max_length, help="In tokens.")
@click.option(
    "--pooling",
    type=click.Choice([kind.value for kind in Pooling]),
    default=TrainOptions.pooling.value,
    help="What the exits see: the mean over all tokens, or the first token (PABEE).",
)
@click.option("--exits", callback=_layers, help="Layers with an exit. Default: every layer.")
@click.option(
    "--exit-weights",
    type=click.Choice([kind.value for kind in ExitWeights]),
    default=TrainOptions.exit_weights.value,
    help="How much the loss of an exit counts: more for later exits, or the same for all.",
)
@click.option(
    "--distill",
    type=float,
    default=TrainOptions.distill,
    help="How much early exits are trained on the output of the last exit instead of the labels, "
    "from 0 to 1. 0 gives the loss of F-PABEE.",
)
@click.option("--random-init", is_flag=True, help="Start from random weights.")
@click.option("--seed", type=int, default=TrainOptions.seed)
@click.option("--bf16", is_flag=True, help="Compute in bfloat16 where that is safe.")
@click.option("--resume", is_flag=True, help="Continue after the last finished epoch.")
@click.option("--force", is_flag=True, help="Replace an existing model.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@version_option
@exits_with_one_line
def main(
    output: Path,
    problem_type: str | None,
    pooling: str,
    exit_weights: str,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train a text classifier with an exit after every layer, or after chosen layers."""
    reading = read_options(settings)
    try:
        options = TrainOptions(
            problem_type=ProblemType(problem_type) if problem_type else None,
            pooling=Pooling(pooling),
            exit_weights=ExitWeights(exit_weights),
            reading=reading,
            **settings,
        )
    except InputError as error:
        raise click.UsageError(in_terms_of_options(error)) from error
    require("train")
    from transformers.utils import logging as transformers_logging

    from ..training.pipeline import train

    # Its bars and warnings are about weights that a multi-exit model does not use.
    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    program = click.get_current_context().find_root().info_name
    with Shown(quiet) as progress:

        def listener(state: TrainProgress) -> None:
            if state.scores:
                scores = " ".join(f"{score:.3f}" for score in state.scores)
                if not quiet:
                    echo(f"step {state.step}: dev {state.metric} by exit: {scores}", err=True)
            else:
                progress(f"train, loss {state.loss:.3f}", state.step, state.steps)

        report = train(output, options, listener, f"{program} {shlex.join(sys.argv[1:])}")
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    _print(report)
    echo(f"{output}: trained in {report.train_seconds:.0f} s")
    echo(f"next: fpabee-export {shlex.quote(str(output))}")


def _print(report: TrainReport) -> None:
    for name, scores in report.scores.items():
        table = Table("exit", "layer", *scores[0], title=f"{name}: scores of every exit")
        for number, (layer, row) in enumerate(zip(report.exits, scores, strict=True), start=1):
            table.add_row(str(number), str(layer), *(f"{value:.4f}" for value in row.values()))
        table_console().print(table)


if __name__ == "__main__":
    main()
