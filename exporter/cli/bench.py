"""`fpabee-bench`: measure the speed-up of an engines folder on this machine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich_click as click
from rich.console import Console
from rich.table import Table

from ...calibration import threshold_for_depth
from ...runtime.cli import options
from ...runtime.cli.command import RULE, command
from ...runtime.cli.console import table_console
from ...runtime.cli.progress import step_progress
from ...runtime.encoding import Text
from ...runtime.engine import Engine
from ...runtime.files import read_rows
from ...runtime.optional_packages import require
from ...runtime.rule_words import rule_in_words
from ...runtime.rules.base import ExitRule, ThresholdRule
from ...runtime.rules.rules import RULES
from ..bench import FULL_DEPTH, FULL_GRAPH, WITH_RULE, BenchOptions, BenchReport, run_bench

_MOST_TOKENS = 2**20


def _shapes(_: click.Context, __: click.Parameter, value: str) -> tuple[tuple[int, int], ...]:
    try:
        shapes = [part.split("x") for part in value.split(",") if part]
        pairs = tuple((int(rows), int(tokens)) for rows, tokens in shapes)
    except ValueError:
        pairs = ((0, 0),)
    if any(rows < 1 or tokens < 1 for rows, tokens in pairs):
        raise click.BadParameter(f"{value!r} is not a list of ROWSxTOKENS such as 1x32,32x128")
    if any(rows * tokens > _MOST_TOKENS for rows, tokens in pairs):
        raise click.BadParameter(f"{value!r} has a batch of more than {_MOST_TOKENS} tokens")
    return pairs


@command(
    examples="""
fpabee-bench engines/ --input texts.txt
fpabee-bench engines/ --input texts.txt --depth 0.5 --model-dir model_dir
""",
    panels={
        **RULE,
        "Reading files": "--input-format --text-column --text-pair-column --no-quotes",
    },
)
@options.engines
@options.option("--input source", "FILE", "Texts, in any format of fpabee-run.", required=True)
@options.number(
    "--depth",
    "Choose the threshold at which the mean depth is this share of the layers.",
    min=0,
    max=1,
    min_open=True,
)
@options.option("--model-dir", "DIR", "PyTorch model on which the same rule is timed as well.")
@options.count("--repeats", "Repetitions of each batch.", 5)
@options.number("--max-seconds", "Time after which batches run only once.", 120.0, min=0)
@options.option(
    "--shapes",
    "ROWSxTOKENS,...",
    "Synthetic batches. '' for none.",
    callback=_shapes,
    default="1x32,1x128,32x32,32x128",
)
@options.count("--max-rows", "Largest number of texts.", 2000)
@options.target
@options.threads
@options.quiet
@options.as_json
@options.rule
@options.texts
def main(
    engines: Path,
    source: str,
    depth: float | None,
    target: str | None,
    threads: int | None,
    max_rows: int,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Measure how fast ENGINES is with its exits, compared with one full graph.

    Both run alternately on the same texts, so that changes in the speed of the machine affect
    both.
    """
    options.not_with("threshold", depth is not None, "--depth, which chooses the threshold")
    require("bench")
    texts = [row.content for row in read_rows(source, options.read_options(settings))]
    with step_progress(quiet) as progress:
        with Engine.load(engines, target, threads=threads) as engine:
            kind = RULES[settings["rule"] or engine.rule.name]
            if depth is not None and issubclass(kind, ThresholdRule):
                settings["threshold"] = 0.0  # replaced below
            rule = options.chosen_rule(engine.rule, settings)
            if depth is not None:
                progress("choose the threshold", 0, 1)
                rule = _of_depth(engine, rule, texts[:max_rows], depth)
        wanted = BenchOptions(rule, max_rows=max_rows, threads=threads, target=target, **settings)
        report = run_bench(engines, texts, wanted, progress)
    if as_json:
        click.echo(json.dumps(to_dict(report)))
    else:
        print_report(report, table_console())


def _of_depth(engine: Engine, rule: ExitRule, texts: Sequence[Text], depth: float) -> ExitRule:
    """The rule with the threshold that makes the mean depth this share of the layers."""
    trace = engine.trace(texts)
    layers, task = engine.manifest.exit_layers, engine.manifest.task
    goal = depth * layers[-1]
    thresholds, first = task.label_thresholds, trace.first_exit
    return threshold_for_depth(
        trace.logits, rule, task.problem_type, layers, goal, thresholds, first
    )


def to_dict(report: BenchReport) -> dict[str, Any]:
    """The report and the ratios that follow from it, for JSON."""
    content = dataclasses.asdict(report)
    for entry, workload in zip(content["workloads"], report.workloads, strict=True):
        entry["full_depth_over_full_graph"] = 1 / workload.speedup(FULL_DEPTH)
        entry["realised"] = workload.speedup(WITH_RULE)
        entry["realised_over_theoretical"] = workload.realised_share
    return content


def print_report(report: BenchReport, console: Console) -> None:
    """Print the report as a table with one line for each workload and variant."""
    table = Table("workload", "variant", "median ms", "p95 ms", "x full graph", "theory", "share")
    for workload in report.workloads:
        for variant, timing in workload.timings.items():
            theory = share = ""
            if variant == WITH_RULE:
                theory, share = f"{workload.theoretical:.2f}", f"{workload.realised_share:.3f}"
                if not workload.mean_depth:  # layers have no ratio
                    theory, share = "no layers", ""
            table.add_row(
                workload.name if variant == FULL_GRAPH else "",
                variant,
                f"{timing.median_ms:.1f}",
                f"{timing.p95_ms:.1f}",
                f"{workload.speedup(variant):.2f}",
                theory,
                share,
            )
        table.add_section()
    console.print(table)
    versions = ", ".join(f"{name} {value}" for name, value in report.versions.items())
    if report.target != report.full_target:
        console.print(f"The full graph runs in {report.full_target}, not in {report.target}.")
    console.print(f"{report.target}, rule {rule_in_words(ExitRule.from_dict(report.rule))}")
    console.print(f"{report.hardware}; {versions}")
