"""`fpabee-bench`: measure the speed-up of an engines folder on this machine."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
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
from ...runtime.environment import cpu_name
from ...runtime.files import read_rows
from ...runtime.optional_packages import require
from ...runtime.rule_words import rule_in_words
from ...runtime.rules.base import ExitRule, ThresholdRule
from ...runtime.rules.rules import RULES
from ..bench import FULL_DEPTH, FULL_GRAPH, WITH_RULE, BenchOptions, BenchReport, run_bench
from ..load_test import Load, run_load_test

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


def _loads(_: click.Context, __: click.Parameter, value: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0 < load < math.inf for load in value):
        raise click.BadParameter(f"{value} has a load that is not above 0 and finite")
    return value


@command(
    examples="""
fpabee-bench engines/ --input texts.txt
fpabee-bench engines/ --input texts.txt --depth 0.5 --model-dir model_dir
fpabee-bench engines/ --input texts.txt --serve --seconds 300
""",
    panels={
        **RULE,
        "Load test of the server": "--serve --loads --seconds",
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
@options.flag("--serve", "Send requests at random times to the HTTP server on this machine.")
@options.option(
    "--loads",
    "X,X,...",
    "Rates of requests, as multiples of the capacity at full depth.",
    type=options.Numbers(float, "0.5,0.9"),
    callback=_loads,
    default="0.5,0.9,1.3,1.6",
)
@options.number("--seconds", "Duration of each load.", 60.0, min=0, min_open=True)
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
    serve: bool,
    loads: tuple[float, ...],
    seconds: float,
    **settings: Any,
) -> None:
    """Measure how fast ENGINES is with its exits, compared with one full graph.

    Both run alternately on the same texts, so that changes in the speed of the machine affect
    both.
    """
    options.not_with("threshold", depth is not None, "--depth, which chooses the threshold")
    options.only_with("loads seconds", serve, "--serve")
    options.not_with("model_dir repeats max_seconds shapes", serve, "--serve")
    require("serve" if serve else "bench")
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
        if serve:
            with Engine.load(engines, target, threads=threads, rule=rule) as engine:
                found = run_load_test(engine, texts[:max_rows], loads, seconds, progress=progress)
                report_loads(engine, *found, as_json)
            return
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


def report_loads(engine: Engine, capacity: float, loads: Sequence[Load], as_json: bool) -> None:
    """Print what the servers did under load, as a table or as JSON."""
    machine = {"target": engine.target, "hardware": cpu_name(), "rule": engine.rule.to_dict()}
    if as_json:
        entries = [dataclasses.asdict(load) | {"sustainable": load.sustainable} for load in loads]
        # In JSON, times without an answer are null.
        click.echo(msgspec.json.encode(machine | {"rows_per_second": capacity, "loads": entries}))
        return
    heads = "load,server,requests,answered,answers/s,mean ms,p50 ms,p99 ms,layers,sustainable"
    table = Table(*heads.split(","))
    for load in loads:
        times = (load.per_second, load.mean_ms, load.p50_ms, load.p99_ms, load.mean_layer)
        table.add_row(
            f"{load.share:g}",
            load.server,
            str(load.requests),
            str(load.answered),
            *(f"{value:.1f}" for value in times),
            {True: "yes", False: "no", None: f"held for {load.seconds:g} s"}[load.sustainable],
        )
    console = table_console()
    console.print(table)
    console.print(f"capacity at full depth: {capacity:.1f} rows/s")
    console.print(f"{engine.target}, rule {rule_in_words(engine.rule)}; {cpu_name()}")


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
