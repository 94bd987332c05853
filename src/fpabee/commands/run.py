"""`fpabee-run`: classify the texts of files, or rank the documents of queries."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import rich_click as click
from rich.table import Table

from .. import __version__
from ..runtime.chain.route import Route
from ..runtime.engine import Engine
from ..runtime.errors import InputError, RowError
from ..runtime.files import STANDARD_INPUT, Inputs, ReadOptions, Row, TextFormat, queries
from ..runtime.files.destination import Convert, check_output, open_output
from ..runtime.files.formats import is_plain_file, output_format
from ..runtime.files.jobs import JOBS, JobOptions
from ..runtime.files.run import Run
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
def main(engines: Path, **settings: Any) -> None:
    """Classify texts, or rank the documents of queries, as the model does.

    Results go to standard output or --output, all else to standard error.
    """
    asked = _asked(settings)
    hide_bars_of_hub(quiet=not asked.shows)
    with Engine.load(engines, asked.target, asked.operating_point, **asked.loading) as engine:
        task = engine.core.task
        kind = _KINDS[task.method]
        options.not_with(kind.without, True, f"a model that {task.does}")
        job = JOBS[task.method](engine, _route(engine, asked), asked.job)
        table = job.table(asked.output, asked.chosen)
        reading = kind.reading(asked.reading)
        run = Run(job)
        _answer(run, asked, reading, table)
        _print_results(run, asked)
    if run.first_error is not None and run.errors == run.rows:
        raise InputError(
            f"none of {run.rows} rows could be used; the first: {run.first_error.message}",
            run.first_error.hint,
        )


@dataclass(frozen=True)
class _Asked:
    """The settings of the command line.

    Attributes:
        files: the inputs.
        output: the file to write; None for standard output.
        chosen: its format.
        reading: how texts are read.
        target: the target; None for the default.
        operating_point: the calibrated rule; None for the default.
        rule_text: the rule itself, if it is given.
        full_depth: whether all layers run.
        job: what is written.
        loading: arguments of `Engine.load`.
        resume: whether an interrupted run is continued.
        unbuffered: whether each result is written before the next row is read.
        is_typed: whether somebody types the rows.
        quiet: show nothing.
        as_json: print the summary as JSON.
    """

    files: tuple[str, ...]
    output: Path | None
    chosen: TextFormat
    reading: ReadOptions
    target: str | None
    operating_point: str | None
    rule_text: str | None
    full_depth: bool
    job: JobOptions
    loading: dict[str, Any]
    resume: bool
    unbuffered: bool
    is_typed: bool
    quiet: bool
    as_json: bool

    @property
    def shows(self) -> bool:
        """Whether progress and a summary for people are shown."""
        return not (self.quiet or self.as_json)


def _asked(settings: dict[str, Any]) -> _Asked:
    """The settings of the command line, checked as far as it can be without the model.

    Raises:
        click.UsageError: options contradict each other.
        InputError: an input or the output cannot be used.
    """
    files = settings.pop("files") + settings.pop("more")
    if not files:
        raise click.UsageError("no input: give files such as texts.txt, or - for standard input")
    reading = options.read_options(settings)
    options.not_with("operating_point", settings["rule_text"], "--rule, which sets the rule itself")
    options.not_with(
        "full_depth", settings["operating_point"] or settings["rule_text"], "an exit rule"
    )
    output = settings.pop("output")
    output = None if output == Path("-") else output
    is_file = is_plain_file(output)
    options.not_with(
        "unbuffered",
        is_file,
        "--output FILE, which is complete or does not exist; use standard output or a pipe",
    )
    options.only_with("resume", is_file, "--output FILE")
    chosen = output_format(output)
    is_typed = STANDARD_INPUT in files and sys.stdin is not None and sys.stdin.isatty()
    unbuffered = settings.pop("unbuffered") or (is_typed and not is_file)
    Inputs(files, reading)
    if output is not None:
        check_output(output, files)
    return _Asked(
        files=files,
        output=output,
        chosen=chosen,
        reading=reading,
        job=JobOptions(
            with_text=settings.pop("with_text"),
            probabilities=settings.pop("probabilities"),
            metrics=settings.pop("metrics"),
            skips_errors=settings.pop("on_error") == "skip",
        ),
        loading={name: settings.pop(name) for name in ("max_length", "threads")},
        unbuffered=unbuffered,
        is_typed=is_typed,
        **settings,
    )


def _route(engine: Engine, asked: _Asked) -> Route:
    """How the rows run: as the engine does, unless a rule or full depth is asked for.

    Raises:
        click.UsageError: the value of `--rule` is no rule.
        RuleError: it does not fit the model.
    """
    rule = None
    if asked.rule_text is not None:
        rule = options.chosen_rule(engine.rule, asked.rule_text)
    return engine.core.route(rule=rule, full_depth=asked.full_depth)


def _answer(run: Run, asked: _Asked, reading: ReadOptions, table: Convert | None) -> None:
    """Answer the rows, and write their records.

    Args:
        run: the run.
        asked: what the command line says.
        reading: how the rows are read.
        table: what converts the records to the output, see `Job.table`.
    """
    engine = run.job.engine
    written = {name: getattr(asked.job, name) for name in ("with_text", "probabilities")}
    # All that a run and the run that resumes it must share, besides the inputs.
    shared = {
        "fpabee": __version__,
        "target": engine.target,
        "rule": "full depth" if run.is_full_depth else run.job.route.rule.to_dict(),
        "engines": engine.revision,
        "metrics": asked.job.metrics,
        **(asdict(reading) | written | asked.loading),
    }
    inputs = Inputs(asked.files, reading)
    if asked.is_typed and asked.shows:
        echo("reading rows from the terminal; Ctrl-D ends the input", err=True)
    with (
        closing(iter(inputs)) as rows,
        open_output(asked.output, table, inputs, shared, asked.resume) as (write, completed),
        row_progress(run, not asked.shows or asked.unbuffered),
    ):
        run.answer(map(_in_options, rows), write, completed, asked.unbuffered)


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


def _as_texts(reading: ReadOptions) -> ReadOptions:
    """How texts are read: as the options say."""
    return reading


@dataclass(frozen=True)
class _Kind:
    """The differences of the command between kinds of models.

    Attributes:
        reading: how the rows are read, with what the options say about texts.
        without: the options that mean nothing, separated by spaces.
        calibration: what to do for a rule that is calibrated.
    """

    reading: Callable[[ReadOptions], ReadOptions]
    without: str
    calibration: str


# By the method of `Engine` that answers.
_KINDS = {
    "predict": _Kind(_as_texts, "", "run fpabee-calibrate on labelled rows."),
    "rank": _Kind(
        _of_queries,
        "metrics rule_text probabilities",
        "convert the model again with queries of yours.",
    ),
}


def _print_results(run: Run, asked: _Asked) -> None:
    """Print to standard error what the command line asks for.

    Args:
        run: the run.
        asked: what the command line says.
    """
    if asked.as_json:
        click.echo(json.dumps(run.to_dict()), err=True)
    elif not asked.quiet:
        _print_summary(run)
    else:
        _print_scores(run)


def _print_summary(run: Run) -> None:
    """Print the tally of a run to standard error."""
    console = PlainConsole(stderr=True)
    tally = run.to_dict()
    job = run.job
    route = job.route
    rule = "full depth" if run.is_full_depth else f"rule {rule_in_words(route.rule)}"
    if route.point:
        rule = f"operating point {route.point}: {rule}"
    answered = run.exits.total()
    parts = "" if job.part == job.unit else f" with {answered} {job.part}"
    lines = [
        f"{run.rows} {job.unit}{parts} in {tally['seconds']:.1f} s ({run.rate:.0f} {job.part}/s) "
        f"on {tally['target']}, {rule}"
    ]
    if tally["mean_depth"] is not None:
        cost = f"mean depth {tally['mean_depth']:.2f} of {tally['layers']} layers"
        if tally["saving"] is not None:
            cost += f", saving {tally['saving']:.1%}"
        else:
            cost = (
                f"first in {tally['quick_target']}; {tally['doubt_share']:.1%} were in doubt and "
                f"ran all layers of {tally['target']} as well"
            )
        lines.append(f"{cost}; {run.truncated} truncated, {run.empty} empty")
    if run.rows_before:
        lines.append(f"{run.rows_before} {job.unit} were done by an earlier run")
    if run.errors:
        lines.append(f"{run.errors} {job.unit} could not be used: their records are errors")
    for line in lines:
        console.print(line, soft_wrap=True)
    table = Table("exit", "layer", job.part, "share", "", box=None, pad_edge=False)
    for part in tally["exits"]:
        share = part[job.part] / max(1, answered)
        bar = "█" * round(_BAR_WIDTH * share)
        number, layer, rows = map(str, part.values())
        is_exact = "quick_target" in tally and part is tally["exits"][-1]
        table.add_row(number, layer + " (exact pass)" * is_exact, rows, f"{share:.1%}", bar)
    console.print(table)
    _print_scores(run)
    if route.point is None and not run.is_full_depth:
        uncalibrated = _KINDS[job.engine.core.task.method].calibration
        points = ", ".join(job.engine.manifest.targets[tally["target"]].operating_points)
        console.print(
            f"The rule is not one of the operating points of {tally['target']}: {points}."
            if points
            else f"The rule is not calibrated for your data on {tally['target']}: {uncalibrated}",
            soft_wrap=True,
        )


def _print_scores(run: Run) -> None:
    """Print the scores of a run, if there are any, to standard error."""
    if scores := run.job.scores():
        words = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        PlainConsole(stderr=True).print(words)
