"""`fpabee-bench`: measure the speed-up of an engines folder on this machine."""

from __future__ import annotations

from pathlib import Path

import rich_click as click
from rich import box
from rich.table import Table

from ...calibration import threshold_for_depth
from ...runtime.cli import options
from ...runtime.cli.command import command
from ...runtime.cli.console import echo, step_progress, table_console
from ...runtime.engine import Engine
from ...runtime.files import read_rows
from ...runtime.machine import environment, require, usable_cores
from ...runtime.rules.rules import ExitRule
from ...runtime.rules.words import rule_in_words
from ..bench import FULL_DEPTH, FULL_GRAPH, WITH_RULE, Workload, run_bench

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
@options.quiet
@options.rule
def main(
    engines: Path,
    source: str,
    depth: float | None,
    target: str | None,
    quiet: bool,
    rule_text: str | None,
) -> None:
    """Measure how fast ENGINES is with its exits, compared with one full graph.

    Both run alternately on the same texts, at most 2,000, so that changes in the speed of the
    machine affect both.
    """
    if depth is not None and "threshold=" in (rule_text or "").replace("exit_0_threshold=", ""):
        raise click.UsageError("--depth chooses the threshold, so --rule must leave it out")
    require("graphs")
    texts = [row.content for row in read_rows(source)][:_MOST_TEXTS]
    with step_progress(quiet) as progress, Engine.load(engines, target) as engine:
        rule = engine.rule
        if depth is not None:
            progress("choose the threshold", 0, 1)
            rule = options.chosen_rule(rule, f"{rule_text or rule.name} threshold=0")
            trace, layers = engine.trace(texts), engine.manifest.exit_layers
            task, goal = engine.manifest.task, depth * layers[-1]
            thresholds, first = task.label_thresholds, trace.first_exit
            rule = threshold_for_depth(
                trace.logits, rule, task.problem_type, layers, goal, thresholds, first
            )
        elif rule_text is not None:
            rule = options.chosen_rule(rule, rule_text)
        full_target, found = run_bench(engines, engine, rule, texts, progress)
        name, layers = engine.target, engine.manifest.exit_layers
    show(found, rule, layers[-1])
    if name != full_target:
        echo(f"The full graph runs in {full_target}, not in {name}.")
    versions = ", ".join(map(" ".join, environment().items()))
    echo(f"{usable_cores()} threads; {versions}; {name}.")


def show(workloads: list[Workload], rule: ExitRule, layers: int) -> None:
    """Print a table in Markdown, with the rule below."""
    heads = ("workload", FULL_GRAPH, FULL_DEPTH, WITH_RULE, "speed-up", "theory", "share")
    table = Table(*heads, box=box.MARKDOWN)
    for workload in workloads:
        ms = 1e3 / workload.texts
        times = {name: f"{ms * sum(each):.3f}" for name, each in workload.seconds.items()}
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
    table_console().print(table)
    echo(
        "Milliseconds per text. Speed-up: full graph divided by chain + rule; "
        "theory: from layers alone; share: speed-up divided by theory."
    )
    depth = f"mean depth {workloads[-1].mean_depth:.2f} of {layers} layers on the file"
    echo(f"Rule: {rule_in_words(rule)}; {depth}.")
