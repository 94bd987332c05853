"""`fpabee-bench`: measure the speed-up of an engines folder on this machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import rich_click as click
from rich import box
from rich.table import Table

from ...calibration import threshold_for_depth
from ...runtime.cli import options
from ...runtime.cli.command import command
from ...runtime.cli.console import step_progress, table_console
from ...runtime.engine import Engine
from ...runtime.files import read_rows
from ...runtime.machine import require
from ...runtime.rules.rules import ExitRule
from ...runtime.rules.words import rule_in_words
from ..bench import FULL_DEPTH, FULL_GRAPH, PADDED_32, WITH_RULE, BenchReport, run_bench

_MOST_TEXTS = 2000


@command(
    examples="""
fpabee-bench engines/ --input texts.txt
fpabee-bench engines/ --input texts.txt --depth 0.5
""",
    panels={},
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
@options.target
@options.threads
@options.quiet
@options.as_json
@options.rule
@options.columns
def main(
    engines: Path,
    source: str,
    depth: float | None,
    target: str | None,
    threads: int | None,
    quiet: bool,
    as_json: bool,
    rule_text: str | None,
    **settings: Any,
) -> None:
    """Measure how fast ENGINES is with its exits, compared with one full graph.

    Both run alternately on the same texts, so that changes in the speed of the machine affect
    both.
    """
    if depth is not None and "threshold=" in (rule_text or "").replace("exit_0_threshold=", ""):
        raise click.UsageError("--depth chooses the threshold, so --rule must leave it out")
    require("graphs")
    texts = [row.content for row in read_rows(source, options.read_options(settings))][:_MOST_TEXTS]
    with (
        step_progress(quiet) as progress,
        Engine.load(engines, target, threads=threads) as engine,
    ):
        engine.warm_up(tokens=1)
        if depth is None:
            rule = engine.rule
            if rule_text is not None:
                rule = options.chosen_rule(rule, rule_text)
        else:
            progress("choose the threshold", 0, 1)
            rule = options.chosen_rule(engine.rule, f"{rule_text or engine.rule.name} threshold=0")
            trace, layers = engine.trace(texts), engine.manifest.exit_layers
            task, goal = engine.manifest.task, depth * layers[-1]
            thresholds, first = task.label_thresholds, trace.first_exit
            rule = threshold_for_depth(
                trace.logits, rule, task.problem_type, layers, goal, thresholds, first
            )
        report = run_bench(engines, engine, rule, texts, threads, progress)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        print_report(report)


def print_report(report: BenchReport) -> None:
    """Print the report as a table in Markdown, with the settings and the hardware below."""
    heads = ("workload", FULL_GRAPH, FULL_DEPTH, "chain + rule", "speed-up", "theory", "share")
    table = Table(*heads, box=box.MARKDOWN)
    for workload in report.workloads:
        times = {name: f"{1e3 * fmean(each):.1f}" for name, each in workload.seconds.items()}
        speedup, theory, share = workload.speedup(WITH_RULE), "no layers", ""
        if workload.mean_depth:  # otherwise layers have no ratio
            theory, share = f"{workload.theoretical:.2f}x", f"{speedup / workload.theoretical:.3f}"
        table.add_row(
            workload.name,
            times[FULL_GRAPH],
            f"{times[FULL_DEPTH]} ({1 / workload.speedup(FULL_DEPTH):.2f}x)",
            times[WITH_RULE],
            f"{speedup:.2f}x",
            theory,
            share,
        )
    console = table_console()
    console.print(table)
    whole = report.workloads[-1]
    console.print(
        "Mean milliseconds per unit (a batch, a text, or 256 texts). Speed-up: full graph divided "
        "by chain + rule; theory: from layers alone; share: speed-up divided by theory."
    )
    console.print(
        f"Rule: {rule_in_words(ExitRule.from_dict(report.rule))}; mean depth "
        f"{whole.mean_depth:.2f} of {report.layers} layers on the file."
    )
    console.print(
        "The full graph over padded batches of 32 in file order takes "
        f"{1e3 * fmean(whole.seconds[PADDED_32]):.1f} ms per 256 texts, "
        f"{whole.speedup(WITH_RULE, PADDED_32):.1f}x as long as the chain with the rule."
    )
    if report.target != report.full_target:
        console.print(f"The full graph runs in {report.full_target}, not in {report.target}.")
    console.print(f"{report.machine}; {report.target}.")
