"""`fpabee-run`: classify the texts of files, or rank the documents of queries."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import rich_click as click
from rich.table import Table

from .. import __version__
from ..runtime.engine import Engine
from ..runtime.errors import InputError, RowError
from ..runtime.files import STANDARD_INPUT, Inputs, ReadOptions, Row, TextFormat, queries
from ..runtime.files.destination import check_output, open_output
from ..runtime.files.formats import is_plain_file, output_format
from ..runtime.files.job import Job
from ..runtime.files.records import RecordSchema, convert
from ..runtime.files.tasks import Classification, Ranking, Task
from ..runtime.rules.words import rule_in_words
from . import options
from .command import READING, command, hint_of
from .console import PlainConsole, echo, hide_bars_of_hub, row_progress

_BAR_WIDTH = 30


@command(
    examples="""
fpabee-run engines/ texts.txt
fpabee-run engines/ a.csv b.parquet --column text=body --output out.parquet
fpabee-run engines/ dev.jsonl --metrics --rule "fpabee threshold=0.2"
cat texts.txt | fpabee-run engines/ - --quiet > predictions.jsonl
fpabee-run reranker-engines/ queries.jsonl --output rankings.jsonl
""",
    panels={
        "Reading files": f"{READING['Reading files']} --input-format --on-error",
        "Writing results": "--with-text --scores --resume --unbuffered",
    },
)
@options.engines_or_hub()
@click.argument(
    "files",
    nargs=-1,
    type=click.Path(allow_dash=True),
    help="Texts to classify: .txt (one text per line), .jsonl, .csv, .tsv or .parquet. Queries to "
    "rank documents for: .jsonl or .parquet. All but .parquet may end in .gz. - is standard input.",
)
@click.option("--input", "more", multiple=True, metavar="FILE", help="Another file to read.")
@options.path(
    "-o --output",
    "File to write: .jsonl, .csv or .parquet; rankings .jsonl. An existing file is replaced. "
    "Default: JSON lines on standard output.",
)
@options.option(
    "--operating-point",
    "NAME",
    "Calibrated rule to use. Default: the default operating point of the target.",
)
@options.target
@options.flag("--full-depth", "Run all layers for every row.")
@options.flag("--metrics", "Score the results against the labels in the input.")
@options.choice(
    "--on-error",
    "ACTION",
    "What to do about a row that cannot be read: stop, or skip it and write its error.",
    ["stop", "skip"],
    default="stop",
)
@options.count("--max-length", "Truncate texts to this many tokens.")
@options.threads
@options.flag("--quiet", "Show no progress and no summary.")
@options.flag("--json as_json", "Print the summary as one JSON object on standard error.")
@options.rule
@options.columns
@options.choice("--input-format", "FORMAT", "Input format. Default: by file name.", TextFormat)
@options.flag("--with-text", "Repeat the text, or the query, in each result.")
@options.flag("--scores probabilities", "Write the probabilities of all labels.")
@options.flag("--resume", "Continue an interrupted run from OUTPUT.partial.")
@options.flag(
    "--unbuffered",
    "Write the result of each row before reading the next one. Slower; always done when standard "
    "input is a terminal.",
)
def main(
    engines: Path,
    files: tuple[str, ...],
    more: tuple[str, ...],
    output: Path | None,
    resume: bool,
    on_error: str,
    target: str | None,
    operating_point: str | None,
    full_depth: bool,
    metrics: bool,
    unbuffered: bool,
    quiet: bool,
    as_json: bool,
    rule_text: str | None,
    **settings: Any,
) -> None:
    """Classify texts, or rank the documents of queries, as the model does.

    Results go to standard output or --output, all else to standard error.
    """
    files += more
    if not files:
        raise click.UsageError("no input: give files such as texts.txt, or - for standard input")
    reading = options.read_options(settings)
    loading = {name: settings.pop(name) for name in ("max_length", "threads")}
    written = {name: settings.pop(name) for name in ("with_text", "probabilities")}
    options.not_with("operating_point", rule_text, "--rule, which sets the rule itself")
    options.not_with("full_depth", operating_point or rule_text, "an exit rule")
    is_typed = STANDARD_INPUT in files and sys.stdin is not None and sys.stdin.isatty()
    output = None if output == Path("-") else output
    is_file = is_plain_file(output)
    options.not_with(
        "unbuffered",
        is_file,
        "--output FILE, which is complete or does not exist; use standard output or a pipe",
    )
    options.only_with("resume", is_file, "--output FILE")
    chosen = output_format(output)
    unbuffered = unbuffered or (is_typed and not is_file)
    inputs = Inputs(files, reading)
    if output is not None:
        check_output(output, files)
    shows = not (quiet or as_json)
    hide_bars_of_hub(quiet=not shows)
    with Engine.load(engines, target, operating_point, **loading) as engine:
        ranks = engine.manifest.task.ranks
        options.not_with("metrics rule_text probabilities", ranks, "a model that ranks documents")
        rule = options.chosen_rule(engine.rule, rule_text) if rule_text is not None else engine.rule
        applied = None if full_depth else rule
        skips = on_error == "skip"
        task: Task[Any, Any]
        table = None
        if ranks:
            if chosen is not TextFormat.JSON_LINES:
                raise InputError(
                    f"{output} cannot hold rankings, which are lists", "write .jsonl instead"
                )
            reading = _of_queries(reading)
            inputs = Inputs(files, reading)
            task = Ranking(engine, applied, written["with_text"])
        else:
            schema = RecordSchema(engine.labels, engine.multi_label, errors=skips, **written)
            task = Classification(engine, applied, schema, metrics)
            if chosen is TextFormat.CSV:
                schema.check_separator()
            if chosen is not TextFormat.JSON_LINES:
                table = partial(convert, chosen=chosen, schema=schema)
        job = Job(task, skips)
        # All that a run and the run that resumes it must share, besides the inputs.
        shared = {
            "fpabee": __version__,
            "target": engine.target,
            "rule": "full depth" if full_depth else rule.to_dict(),
            "engines": engine.revision,
            "metrics": metrics,
            **(asdict(reading) | written | loading),
        }
        if is_typed and shows:
            echo("reading rows from the terminal; Ctrl-D ends the input", err=True)
        with (
            closing(iter(inputs)) as rows,
            open_output(output, table, inputs, shared, resume) as (write, completed),
            row_progress(job, not shows or unbuffered),
        ):
            job.run(map(_in_options, rows), write, completed, unbuffered)
        point = None if rule_text or full_depth else engine.operating_point
        if as_json:
            click.echo(json.dumps(job.to_dict(point)), err=True)
        elif not quiet:
            _print_summary(job, point)
        else:
            _print_scores(job)
    if job.first_error is not None and job.errors == job.rows:
        raise InputError(
            f"none of {job.rows} rows could be used; the first: {job.first_error.message}",
            job.first_error.hint,
        )


def _in_options(row: Row | RowError) -> Row | RowError:
    """A row; the hint of one that cannot be read names options, because it is also written."""
    return RowError(row.message, hint_of(row)) if isinstance(row, RowError) else row


def _of_queries(reading: ReadOptions) -> ReadOptions:
    """How queries are read, with what the options say about texts.

    Raises:
        click.UsageError: they name a column that queries do not have.
    """
    if reading.text_pair_column or reading.label_column:
        raise click.UsageError(
            "--column can be given only for text, which is the query, with a model that ranks "
            "documents"
        )
    query = reading.text_column if options.typed("columns") else queries.READING.text_column
    return replace(queries.READING, text_column=query, input_format=reading.input_format)


def _print_summary(job: Job, operating_point: str | None) -> None:
    """Print the tally of a run to standard error.

    Args:
        job: the run.
        operating_point: the name of the calibrated rule that was run, if it was one.
    """
    console = PlainConsole(stderr=True)
    tally = job.to_dict(operating_point)
    task = job.task
    rule = "full depth" if task.rule is None else f"rule {rule_in_words(task.rule)}"
    if operating_point:
        rule = f"operating point {operating_point}: {rule}"
    answered = job.exits.total()
    parts = "" if task.part == task.unit else f" with {answered} {task.part}"
    lines = [
        f"{job.rows} {task.unit}{parts} in {tally['seconds']:.1f} s ({job.rate:.0f} {task.part}/s) "
        f"on {tally['target']}, {rule}"
    ]
    if tally["mean_depth"] is not None:
        lines.append(
            f"mean depth {tally['mean_depth']:.2f} of {tally['layers']} layers, saving "
            f"{tally['saving']:.1%}; {job.truncated} truncated, {job.empty} empty"
        )
    if job.rows_before:
        lines.append(f"{job.rows_before} {task.unit} were done by an earlier run")
    if job.errors:
        lines.append(f"{job.errors} {task.unit} could not be used: their records are errors")
    for line in lines:
        console.print(line, soft_wrap=True)
    table = Table("exit", "layer", task.part, "share", "", box=None, pad_edge=False)
    for part in tally["exits"]:
        share = part[task.part] / max(1, answered)
        bar = "█" * round(_BAR_WIDTH * share)
        table.add_row(*map(str, part.values()), f"{share:.1%}", bar)
    console.print(table)
    _print_scores(job)
    if operating_point is None and task.rule is not None:
        uncalibrated = (
            "convert the model again with queries of yours."
            if task.engine.manifest.task.ranks
            else "run fpabee-calibrate on labelled rows."
        )
        points = ", ".join(task.engine.manifest.targets[tally["target"]].operating_points)
        console.print(
            f"The rule is not one of the operating points of {tally['target']}: {points}."
            if points
            else f"The rule is not calibrated for your data on {tally['target']}: {uncalibrated}",
            soft_wrap=True,
        )


def _print_scores(job: Job) -> None:
    """Print the scores of a run, if there are any, to standard error."""
    if scores := job.task.scores():
        words = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        PlainConsole(stderr=True).print(words)
