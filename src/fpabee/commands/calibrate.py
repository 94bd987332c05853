"""`fpabee-calibrate`: choose operating points on labelled rows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import rich_click as click

from ..calibration.calibrate import calibrate
from ..calibration.goals import DEFAULT_GOALS, DEFAULT_RULE, Bound, CalibrationOptions
from ..calibration.report import write_report
from ..calibration.result import Report, make_default
from ..calibration.scoring import METRICS
from ..runtime.artifact.folder import EnginesFolder
from ..runtime.artifact.operating_point import Goal
from ..runtime.errors import InputError
from ..runtime.files import read_rows
from ..runtime.files.destination import check_output
from ..runtime.machine import require
from ..runtime.rules.rules import RULES
from ..runtime.targets import runnable_targets
from . import options, promises
from .command import READING, command
from .console import echo, step_progress
from .points import KINDS


@command(
    examples="""
fpabee-calibrate engines/ --data dev.jsonl
fpabee-calibrate engines/ --data dev.jsonl --max-drop 1
fpabee-calibrate engines/ --data dev.jsonl --risk 1
fpabee-calibrate engines/ --data texts.jsonl --changed 1
fpabee-calibrate engines/ --data texts.jsonl --missed 2 --threshold attack=0.7
fpabee-calibrate engines/ --set-default fast
fpabee-calibrate engines/ --data dev.jsonl --test test.jsonl --report a.html
""",
    panels={
        "Guarantees": "--risk --changed --missed --false-alarms --threshold --confidence "
        "--quick-target",
        "Choice of the rule": "--rule --metric",
        "Result": "--set-default --report",
        **READING,
    },
)
@options.engines
@options.path(
    "--data",
    "Rows like those to classify, with labels unless the goal needs none. A guarantee holds only "
    "if neither the model nor its exits were trained on them.",
)
@options.path("--test", "Other rows to evaluate the result on. Default: cross-validation.")
@options.number("--max-drop", "Goal: at most this drop of the metric, in points.", min=0, max=100)
@options.number("--speedup", "Goal: at least this speed-up, such as 2 for half the time.", min=1)
@options.number("--risk drop", "At most this drop of the metric on new texts, in points.")
@options.number(
    "--changed changed_answers", "At most X % of decisions differ from full depth. Needs no labels."
)
@options.number("--missed", "Of the texts that full depth flags, at most X % are not flagged.")
@options.number("--false-alarms", "Of the texts that it does not flag, at most X % are flagged.")
@promises.thresholds
@options.target
@options.option(
    "--quick-target",
    "NAME",
    "For a guarantee: texts run in this faster target first, and those that are in doubt at its "
    "last exit again, all layers, in --target.",
)
@options.flag("--force", "Replace a guaranteed point even if the new one guarantees nothing.")
@options.flag("--all-targets", "Calibrate every target that this machine can run.")
@options.option(
    "--set-default",
    "NAME",
    "Only make this operating point, and a --target that is named, the default.",
)
@options.path("-o --report", "HTML page about the result to write.")
@options.threads
@options.quiet
@options.as_json
@promises.confidence
@options.choice(
    "--rule rules",
    "RULE",
    f"Exit rule that may be chosen. May be repeated. Default: {DEFAULT_RULE}. A guarantee takes "
    "confidence or entropy.",
    RULES,
    multiple=True,
)
@options.choice(
    "--metric",
    "METRIC",
    "Metric that may drop. Default: accuracy, or exact_match if multi-label; agreement with full "
    "depth needs no labels.",
    sorted({metric for metrics in METRICS.values() for metric in metrics}),
)
@options.columns
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
    options.not_with("report target quick_target", all_targets, "--all-targets")
    wanted = _options(**settings)
    if report is not None:
        require("plot")
        check_output(report, [str(path) for path in (data, wanted.test) if path is not None])
    names = runnable_targets(EnginesFolder.read(engines)) if all_targets else [wanted.target]
    # Standard input can be read only once.
    rows = list(read_rows(data, wanted.reading))
    test = None
    if wanted.test is not None:
        test = Report(list(read_rows(wanted.test, wanted.reading)), Path(wanted.test).name)
    shown = KINDS["predict"]  # rerankers are refused
    results = []
    try:
        for name in names:
            asked = replace(wanted, target=name, test=None)
            with step_progress(quiet) as progress:
                result = calibrate(engines, rows, asked, progress, report=test)
            results.append(result)
            if not as_json:
                shown.show([result])
                promises.say_condition(point.certificate for point in result.points)
                following = ["fpabee-run", str(engines), str(data), "--target", result.target]
                echo(f"next: {shlex.join(following)}")
    finally:  # an error loses no target that is done
        if as_json and results:
            contents = [shown.to_dict(result) for result in results]
            click.echo(msgspec.json.encode(contents if all_targets else contents[0]).decode())
    if report is not None:
        write_report(result, report)
        echo(f"report: {report}", err=as_json)
    kept = [f"{result.target} {name}" for result in results for name in result.kept]
    if kept:
        raise InputError(
            f"{', '.join(kept)} stays as it was: it has a guarantee, and the new one has none",
            "give more rows, allow more, or replace it with `force`",
        )


def _options(
    max_drop: float | None,
    speedup: float | None,
    confidence: float | None,
    rules: tuple[str, ...],
    thresholds: tuple[str, ...],
    **settings: Any,
) -> CalibrationOptions:
    """The options of the library.

    Raises:
        click.UsageError: options that do not go together.
    """
    averages = {"drop": max_drop, "speedup": speedup}
    names = [f"{kind}-{value:g}" for kind, value in averages.items() if value is not None]
    shares = promises.taken_shares(settings)
    if len(names) + bool(shares) > 1:
        raise click.UsageError(
            "give one goal at a time: --max-drop, --speedup or a guarantee such as --risk; each "
            "makes its own point"
        )
    risk, *decisions = promises.PROMISES.values()
    options.not_with("confidence", names, f"a goal on average; give {risk} or another guarantee")
    options.only_with("thresholds", shares.keys() - {"drop"}, _either(decisions))
    goals: Mapping[str, Goal | Bound] = DEFAULT_GOALS
    if shares:
        bound = promises.bound_of(shares, thresholds, confidence)
        goals = {bound.point: bound}
    elif confidence is not None:
        with options.wrong_usage():
            goals = {
                name: replace(goal, confidence=confidence / 100)
                if isinstance(goal, Bound)
                else goal
                for name, goal in DEFAULT_GOALS.items()
            }
    elif names:
        goals = {names[0]: Goal(max_drop=max_drop, speedup=speedup)}
    reading = options.read_options(settings)
    with options.wrong_usage():
        return CalibrationOptions(
            goals=goals, reading=reading, rules=rules or CalibrationOptions.rules, **settings
        )


def _either(flags: list[str]) -> str:
    """Options as words: `--a, --b or --c`."""
    return f"{', '.join(flags[:-1])} or {flags[-1]}"
