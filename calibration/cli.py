"""`fpabee-calibrate`: choose operating points on labelled rows."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import rich_click as click
from rich import box
from rich.console import Console
from rich.table import Table

from ..runtime.artifact.folder import check_outside
from ..runtime.artifact.operating_point import Goal
from ..runtime.cli import options
from ..runtime.cli.command import READING, command
from ..runtime.cli.console import echo, step_progress, table_console
from ..runtime.optional_packages import require
from ..runtime.rules.rules import RULES, Budget
from ..runtime.targets import runnable_targets
from .calibrate import calibrate
from .descriptions import drop_in_words, exit_0_in_words, promise_in_words, rule_in_words
from .families import DEFAULT_RULES
from .goals import DEFAULT_GOALS, CalibrationOptions, is_name
from .report import write_report
from .result import Calibration, Point, RuleComparison, make_default
from .risk import Bound, RiskOf
from .scoring import METRICS


@command(
    examples="""
fpabee-calibrate engines/ --data dev.jsonl
fpabee-calibrate engines/ --data dev.jsonl --max-drop 1
fpabee-calibrate engines/ --data dev.jsonl --risk 1 --confidence 95
fpabee-calibrate engines/ --data dev.jsonl --all-targets
fpabee-calibrate engines/ --set-default fast
fpabee-calibrate engines/ --data dev.jsonl --test test.jsonl --report a.html
""",
    panels={
        "With --risk": "--confidence --risk-of",
        "Choice of the rule": "--rule --metric --unlabelled --batch-size",
        "Result": "--name --set-default --report",
        **READING,
    },
)
@options.engines
@options.path("--data", "Labelled rows like those to classify.")
@options.path("--test", "Other rows to evaluate the points on. Default: cross-validation.")
@options.number("--max-drop", "Goal: at most this drop of the metric, in points.", min=0, max=100)
@options.number("--speedup", "Goal: at least this speed-up, such as 2 for half the time.", min=1)
@options.number("--risk", "Goal: a guarantee of at most this loss on new rows, in points.")
@options.target
@options.flag("--all-targets", "Calibrate every target that this machine can run.")
@options.flag("--compare", "Also show the best setting of up to six kinds of rules.")
@options.option("--set-default", "NAME", "Only make this operating point the default.")
@options.path("--report", "HTML page about the result to write.")
@options.threads
@options.quiet
@options.as_json
@options.number("--confidence", "Confidence of the guarantee in percent. Default: 95.")
@options.choice(
    "--risk-of",
    "LOSS",
    "Loss to bound: drop of the metric, or disagreement with full depth. Default: drop.",
    RiskOf,
)
@options.choice(
    "--rule rules",
    "RULE",
    f"Exit rule that may be chosen. May be repeated. Default: {', '.join(DEFAULT_RULES)}; "
    "for guaranteed points, entropy. Full depth competes as well, and the cascade if the model has "
    "exit 0.",
    RULES,
    multiple=True,
)
@options.choice(
    "--metric",
    "METRIC",
    "Metric that may drop. Default: accuracy, or exact_match if multi-label.",
    sorted({metric for metrics in METRICS.values() for metric in metrics}),
)
@options.flag("--unlabelled", "Compare with the answers at full depth. Needs no labels.")
@options.count("--batch-size", "Batch size at which the segments are timed.", 32)
@options.option("--name", "NAME", "Name of the point. Default: from its goal, such as drop-0.5.")
@options.labelled_texts
def main(
    engines: Path,
    data: Path | None,
    set_default: str | None,
    report: Path | None,
    all_targets: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Choose operating points of ENGINES on the rows of --data, and write them into the folder.

    With no goal given there are three: safe (the drop is at most 0.5 points with 95 % confidence),
    balanced (the estimated drop is at most 0.5 points; the default) and fast (at most 2).
    """
    if (data is None) == (set_default is None):
        raise click.UsageError("give either --data or --set-default")
    others = {*settings, "report", "all_targets", "as_json"} - {"target", "threads"}
    options.not_with(" ".join(sorted(others)), set_default, "--set-default")
    if set_default is not None:
        target = make_default(engines, set_default, settings["target"])
        echo(f"{set_default} is now the default operating point of {target}")
        return
    assert data is not None
    options.not_with("report target", all_targets, "--all-targets")
    wanted = _options(**settings)
    if report is not None:
        require("plot")
        check_outside(report)
    names = runnable_targets(engines) if all_targets else [wanted.target]
    results = []
    for name in names:
        with step_progress(quiet) as progress:
            result = calibrate(engines, data, replace(wanted, target=name), progress)
        results.append(result)
        if not as_json:
            _print(result, table_console())
    # The report comes last, because an error in it should not lose the calibration.
    if as_json:
        found = [to_dict(result) for result in results]
        click.echo(json.dumps(found if all_targets else found[0]))
    else:
        echo(f"next: fpabee-run {engines} texts.txt")
    if report is not None:
        write_report(result, report)
        echo(f"report: {report}", err=as_json)


def _options(
    name: str | None,
    max_drop: float | None,
    speedup: float | None,
    risk: float | None,
    confidence: float | None,
    risk_of: str | None,
    rules: tuple[str, ...],
    **settings: Any,
) -> CalibrationOptions:
    """The options of the library.

    Raises:
        click.UsageError: options that do not go together.
    """
    given = {"drop": max_drop, "speedup": speedup, "risk": risk}
    goals = [f"{goal}-{value:g}" for goal, value in given.items() if value is not None]
    if len(goals) > 1:
        raise click.UsageError(
            "give one goal at a time: --max-drop, --speedup or --risk; each makes its own point"
        )
    options.only_with("name", goals, "--max-drop, --speedup or --risk")
    options.only_with("confidence risk_of", risk is not None, "--risk")
    if name is not None and not is_name(name):
        raise click.UsageError(f"--name {name!a} cannot be read and typed: give another name")
    point = name or (goals[0] if goals else "balanced")
    bound = None
    if risk is not None:
        percent = 95.0 if confidence is None else confidence
        bound = Bound(risk / 100, percent / 100, RiskOf(risk_of or RiskOf.DROP))
    goal = {point: Goal(max_drop=max_drop, speedup=speedup)}
    return CalibrationOptions(
        goals=goal if goals and bound is None else DEFAULT_GOALS,
        bound=bound,
        name=point,
        default=point,
        reading=options.read_options(settings),
        rules=rules,
        **settings,
    )


def to_dict(result: Calibration) -> dict[str, Any]:
    """The result for JSON."""
    return {
        "target": result.target,
        "rows": len(result.rows),
        "held_out": result.held_out,
        "default": result.default,
        "points": [
            {**_point(point), "promise": promise_in_words(point, result)} for point in result.points
        ],
        "contenders": [_judged(comparison) for comparison in result.comparisons],
        "warnings": result.warnings,
    }


def _point(point: Point) -> dict[str, Any]:
    return {
        "name": point.name,
        "goal": str(point.goal),
        **_judged(point),
        "measured_speedup": point.measured,
        "certificate": msgspec.to_builtins(point.certificate),
    }


def _judged(found: Point | RuleComparison) -> dict[str, Any]:
    return {
        "kind": found.kind,
        "rule": found.rule.to_dict(),
        "chosen_on": asdict(found.chosen_on),
        "held_out": asdict(found.held_out),
    }


def _print(result: Calibration, console: Console) -> None:
    first = result.points[0]
    console.print(
        f"{result.target}: {len(result.rows)} rows, "
        f"{first.held_out.metric} {result.full_depth_score:.4f} at full depth"
    )
    sizes = list(first.measured)
    speeds = [f"time saved, batch {size}" for size in sizes]
    depth = f"depth of {result.layers[-1]}"
    points = Table("point", "rule", depth, *speeds, "promise", box=box.SIMPLE_HEAD, pad_edge=False)
    for point in result.points:
        points.add_row(
            point.name + " (default)" * (point.name == result.default),
            rule_in_words(point.rule),
            f"{point.chosen_on.mean_depth:.2f}",
            *(f"{round(100 * (1 - 1 / point.measured[size]))} %" for size in sizes),
            promise_in_words(point, result),
        )
    console.print(points)
    if result.rows.first_exit == 0:
        default = next(point for point in result.points if point.name == result.default)
        console.print(f"exit 0 answers at {default.name}: {exit_0_in_words(default)}")
    for warning in result.warnings:
        console.print(f"warning: {warning}")
    if result.comparisons:
        console.print(f"best setting of each kind of rule; goal: {result.comparisons_goal}")
        console.print(_comparisons(result))


def _comparisons(result: Calibration) -> Table:
    where = "cross-validated" if result.test is None else "on the test rows"
    columns = ["rule", f"points lost, {where} (95 %)", "mean depth", "estimated speed-up"]
    has_exit_0 = result.rows.first_exit == 0
    table = Table(*columns, *["exit 0 answers"] * has_exit_0, box=box.SIMPLE_HEAD, pad_edge=False)
    for comparison in result.comparisons:
        runs = comparison.chosen_on
        table.add_row(
            f"{comparison.kind}: full depth"
            if comparison.rule == Budget(exit=result.rows.exits[-1])
            else rule_in_words(comparison.rule),
            drop_in_words(comparison.held_out),
            f"{runs.mean_depth:.2f}",
            f"{runs.estimated:.2f}x",
            *[exit_0_in_words(comparison)] * has_exit_0,
        )
    return table
