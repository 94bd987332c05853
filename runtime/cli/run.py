"""`fpabee-run`: classify files with an engines folder. Results out, all else on stderr."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from ... import __version__
from ..artifact.folder import read_manifest, sha256_of
from ..artifact.manifest import MANIFEST_NAME
from ..chain import Regroup
from ..engine import Engine
from ..errors import InputError
from ..files import LABEL_SEPARATOR, STANDARD_INPUT, Inputs, ReadOptions
from ..files.destination import Destination, open_sink
from ..files.job import Job, run
from ..files.records import RecordSchema
from ..files.summary import Summary
from ..files.writers import OutputFormat
from ..files.writers import output_format as format_of
from ..rules.rules import ExitRule
from .console import PlainConsole, echo
from .errors import exits_with_one_line
from .options import (
    RULE_OPTIONS,
    check_option,
    chosen_rule,
    chosen_sources,
    input_options,
    output_options,
    read_options,
    rule_options,
    version_option,
)
from .run_progress import progress

__all__ = ["chosen_rule", "exits_with_one_line", "main", "rule_options", "version_option"]


@click.command(context_settings={"show_default": True})
@click.argument("engines", type=click.Path(path_type=Path))
@input_options
@output_options
@click.option("--target", help="A built target. Default: the folder's.")
@click.option(
    "--operating-point", help="A calibrated rule of the target, by name. Default: the target's."
)
@rule_options
@click.option("--full-depth", is_flag=True, help="Run every layer for every row.")
@click.option("--max-length", type=click.IntRange(min=1), help="Truncate to fewer tokens.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all cores.")
@check_option
@click.option("--with-text", is_flag=True, help="Repeat the text in the output.")
@click.option("--all-scores", is_flag=True, help="Give the probabilities of all labels.")
@click.option("--metrics", is_flag=True, help="Score against the labels in the input.")
@click.option(
    "--unbuffered",
    is_flag=True,
    help="Write each row's result before the next row is read, as is done with stdin when it is "
    "a terminal. Slower.",
)
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="The summary as one JSON object on stderr, and no progress.",
)
@version_option
@exits_with_one_line
def main(
    engines: Path,
    files: tuple[str, ...],
    sources: tuple[str, ...],
    output: Path | None,
    output_format: str | None,
    resume: bool,
    on_error: str,
    target: str | None,
    operating_point: str | None,
    rule: str | None,
    full_depth: bool,
    max_length: int | None,
    threads: int | None,
    check: bool,
    with_text: bool,
    all_scores: bool,
    metrics: bool,
    unbuffered: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Classify the texts of FILES with ENGINES, a folder that fpabee-export wrote.

    A file is .txt (a text a line), or .jsonl, .csv, .tsv or .parquet with text, text_pair and
    label; all but Parquet also as .gz. - is standard input.
    """
    sources = chosen_sources(files, sources)
    reading = read_options(settings)
    overrides = rule is not None or any(settings[name] is not None for name in RULE_OPTIONS)
    if operating_point and overrides:
        raise click.UsageError("--operating-point names a whole rule: give no rule options with it")
    if full_depth and (operating_point or overrides):
        raise click.UsageError("--full-depth runs every layer: give no rule with it")
    is_typed = STANDARD_INPUT in sources and sys.stdin is not None and sys.stdin.isatty()
    destination = _destination(output, output_format, resume, unbuffered)
    if is_typed and not destination.is_file:
        destination = replace(destination, unbuffered=True)
    inputs = Inputs(sources, reading)
    destination.check_inputs(sources)
    regroup = _regroup(engines, target)
    with Engine.load(
        engines,
        target,
        operating_point,
        threads,
        regroup=regroup,
        max_length=max_length,
    ) as engine:
        checked = engine.check() if check else None
        if checked is not None and not (quiet or as_json):
            echo(
                f"{engine.target} reproduces the exported model: {checked.rows} reference texts, "
                f"largest difference of a logit {checked.max_logit_difference:.1e}",
                err=True,
            )
        chosen = chosen_rule(engine.rule, rule, settings) if overrides else engine.rule
        summary = Summary(engine, None if full_depth else chosen, metrics)
        schema = RecordSchema(
            engine.labels,
            engine.multi_label,
            with_text,
            all_scores,
            errors=on_error == "skip",
            separator=reading.label_separator or LABEL_SEPARATOR,
        )
        if destination.chosen in (OutputFormat.CSV, OutputFormat.TSV):
            schema.check_separator()
        job = Job(engine, chosen, full_depth, schema, on_error == "skip", destination.unbuffered)

        def record_of_run() -> dict[str, Any]:
            given = {
                "max_length": max_length,
                "threads": threads,
                "metrics": metrics,
            }
            return _run_settings(engines, job, inputs, reading, resume) | given

        if is_typed and not (quiet or as_json):
            echo("reading rows from the terminal; Ctrl-D ends the input", err=True)
        no_progress = quiet or as_json or destination.unbuffered
        with (
            open_sink(destination, schema, record_of_run) as sink,
            progress(no_progress, lambda: inputs.share) as advance,
        ):
            first_error = run(job, inputs, sink, summary, advance)
        point = None if overrides or full_depth else engine.operating_point
        if as_json:
            found = {} if checked is None else {"check": checked.to_dict()}
            click.echo(json.dumps(summary.to_dict(point) | found), err=True)
        elif not quiet:
            summary.print(PlainConsole(stderr=True), point)
        elif metrics:
            summary.print_metrics(PlainConsole(stderr=True))
    if first_error is not None and summary.errors == summary.rows:
        raise InputError(
            f"none of {summary.rows} rows could be read; the first: {first_error.message}",
            first_error.remedy,
        )


def _destination(
    output: Path | None, said: str | None, resume: bool, unbuffered: bool
) -> Destination:
    if unbuffered and resume:
        raise click.UsageError("--resume goes on with a file, which --unbuffered does not write")
    stop_now = "--unbuffered writes each result at once, to standard output or a pipe: "
    if unbuffered and said == OutputFormat.PARQUET.value:
        raise click.UsageError(f"{stop_now}Parquet is written as a whole")
    output = None if output == Path("-") else output
    chosen = format_of(output, OutputFormat(said) if said else None)
    destination = Destination(output, chosen, resume, unbuffered)
    if unbuffered and destination.is_file:
        raise click.UsageError(f"{stop_now}a file appears when all rows are done")
    if resume and not destination.is_file:
        raise click.UsageError("--resume goes on with a file: give one with --output")
    return destination


def _regroup(engines: Path, target: str | None) -> Regroup:
    """How groups are joined: not by measured times, so that the same input gives the same bytes.

    Joining by measurement is worth less than 1 % on a CPU; on a GPU full groups win.
    """
    manifest = read_manifest(engines)
    built = manifest.targets.get(target or manifest.default_target)
    is_cpu = built is None or (built.backend == "onnxruntime" and built.device != "cuda")
    return Regroup.NEVER if is_cpu else Regroup.ALWAYS


def _run_settings(
    engines: Path, job: Job, inputs: Inputs, reading: ReadOptions, resume: bool
) -> dict[str, Any]:
    """All that the bytes of the output depend on, beside what the command was given."""
    identity = inputs.identity()
    pipes = [item["name"] for item in identity if item["sha256"] is None]
    if resume and pipes:
        raise InputError(
            f"{pipes[0]} is read only once: it cannot be told whether it is still the same",
            "save it to a file, and run that",
        )
    rule: ExitRule | None = None if job.full_depth else job.rule
    return {
        "fpabee": __version__,
        "engines": sha256_of(engines / MANIFEST_NAME),
        "target": job.engine.target,
        "rule": "full depth" if rule is None else rule.to_dict(),
        "inputs": identity,
        **asdict(reading),
        "with_text": job.schema.with_text,
        "all_scores": job.schema.all_scores,
    }
