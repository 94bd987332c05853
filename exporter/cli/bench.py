"""`fpabee-bench`: is the chain as fast as its layer counts promise, on this machine?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ...calibration import threshold_for_depth
from ...calibration.descriptions import rule_in_words
from ...runtime.cli.console import Shown, table_console
from ...runtime.cli.errors import exits_with_one_line
from ...runtime.cli.options import (
    FiniteRange,
    chosen_rule,
    read_options,
    rule_options,
    text_options,
    version_option,
)
from ...runtime.encoding import Text
from ...runtime.engine import Engine
from ...runtime.files import read_rows
from ...runtime.optional_packages import require
from ...runtime.rules.rules import ExitRule, takes_threshold
from ..bench import FULL_DEPTH, FULL_GRAPH, WITH_RULE, BenchOptions, BenchReport, run_bench

_MOST_TOKENS = 2**20


def _shapes(_: click.Context, __: click.Parameter, value: str) -> tuple[tuple[int, int], ...]:
    try:
        shapes = [part.split("x") for part in value.split(",") if part]
        pairs = tuple((int(rows), int(tokens)) for rows, tokens in shapes)
    except ValueError:
        pairs = ((0, 0),)
    if any(rows < 1 or tokens < 1 for rows, tokens in pairs):
        raise click.BadParameter(f"{value!r} is not a list such as 1x32,32x128")
    if any(rows * tokens > _MOST_TOKENS for rows, tokens in pairs):
        raise click.BadParameter(f"{value!r} has a batch of more than {_MOST_TOKENS} tokens")
    return pairs


@click.command(context_settings={"show_default": True})
@click.argument("engines", type=click.Path(path_type=Path))
@click.option("--input", "source", required=True, help="Texts, in any format of fpabee-run.")
@text_options
@rule_options
@click.option(
    "--depth",
    type=FiniteRange(min=0, max=1, min_open=True),
    help="Choose the threshold whose mean depth is this share of the layers.",
)
@click.option("--model-dir", help="The PyTorch model: time the same rule there too.")
@click.option("--repeats", type=click.IntRange(min=1), default=5)
@click.option(
    "--max-seconds",
    type=FiniteRange(min=0),
    default=120.0,
    help="Per workload; after it the rest is run only once.",
)
@click.option(
    "--shapes",
    callback=_shapes,
    default="1x32,1x128,32x32,32x128",
    help="Synthetic batches, ROWSxTOKENS; none: ''.",
)
@click.option("--max-rows", type=click.IntRange(min=1), default=2000)
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@version_option
@exits_with_one_line
def main(
    engines: Path,
    source: str,
    rule: str | None,
    depth: float | None,
    quiet: bool,
    as_json: bool,
    model_dir: str | None,
    repeats: int,
    max_seconds: float,
    shapes: tuple[tuple[int, int], ...],
    max_rows: int,
    threads: int | None,
    **settings: Any,
) -> None:
    """Time ENGINES on the texts of --input against one full graph, interleaved."""
    if depth is not None and settings["threshold"] is not None:
        raise click.UsageError("--depth chooses the threshold: give no --threshold with it")
    require("bench")
    texts = [row.content for row in read_rows(source, read_options(settings))]
    with Shown(quiet) as progress:
        with Engine.load(engines, threads=threads) as engine:
            if depth is not None and takes_threshold(rule or engine.rule.name):
                settings["threshold"] = 0.0  # replaced below
            chosen = chosen_rule(engine.rule, rule, settings)
            if depth is not None:
                progress("choose the threshold", 0, 1)
                chosen = _of_depth(engine, chosen, texts[:max_rows], depth)
        options = BenchOptions(
            chosen, repeats, max_seconds, shapes, max_rows, model_dir=model_dir, threads=threads
        )
        report = run_bench(engines, texts, options, progress)
    if as_json:
        click.echo(json.dumps(to_dict(report)))
    else:
        print_report(report, table_console())


def _of_depth(engine: Engine, rule: ExitRule, texts: Sequence[Text], depth: float) -> ExitRule:
    """The rule with the threshold whose mean depth on the texts is a share of the layers."""
    logits = engine.trace(texts).logits
    layers, task = engine.manifest.exit_layers, engine.manifest.task
    goal = depth * layers[-1]
    return threshold_for_depth(logits, rule, task.problem_type, layers, goal, task.label_thresholds)


def to_dict(report: BenchReport) -> dict[str, Any]:
    """The report with its derived figures, for JSON."""
    content = dataclasses.asdict(report)
    for entry, workload in zip(content["workloads"], report.workloads, strict=True):
        entry["full_depth_over_full_graph"] = 1 / workload.speedup(FULL_DEPTH)
        entry["realised"] = workload.speedup(WITH_RULE)
        entry["realised_over_theoretical"] = workload.realised_share
    return content


def print_report(report: BenchReport, console: Console) -> None:
    """The report as a table: one line for each workload and variant."""
    table = Table("workload", "variant", "median ms", "p95 ms", "x full graph", "theory", "share")
    for workload in report.workloads:
        for variant, timing in workload.timings.items():
            is_rule = variant == WITH_RULE
            table.add_row(
                workload.name if variant == FULL_GRAPH else "",
                variant,
                f"{timing.median_ms:.1f}",
                f"{timing.p95_ms:.1f}",
                f"{workload.speedup(variant):.2f}",
                f"{workload.theoretical:.2f}" if is_rule else "",
                f"{workload.realised_share:.3f}" if is_rule else "",
            )
        table.add_section()
    console.print(table)
    versions = ", ".join(f"{name} {value}" for name, value in report.versions.items())
    console.print(f"{report.target}, rule {rule_in_words(ExitRule.from_dict(report.rule))}")
    console.print(f"{report.hardware}; {versions}")


if __name__ == "__main__":
    main()
