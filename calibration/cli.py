"""`fpabee-calibrate`: from what a user can afford to an operating point."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..runtime.artifact.operating_point import Goal
from ..runtime.cli.console import Shown, echo, table_console
from ..runtime.cli.errors import exits_with_one_line
from ..runtime.cli.options import (
    FiniteRange,
    column_options,
    read_options,
    version_option,
)
from ..runtime.optional_packages import require
from ..runtime.rules.measures import Measure
from ..runtime.rules.rules import RULES
from .calibrate import CROSS_FITTED, calibrate
from .descriptions import drop_in_words, rule_in_words
from .goals import DEFAULT_GOALS, CalibrationOptions, is_name
from .report import check_place, write_report
from .result import Calibration, Point
from .risk import Bound, RiskOf
from .scoring import METRICS

_METRICS = sorted({metric for metrics in METRICS.values() for metric in metrics})


@click.command(context_settings={"show_default": True})
@click.argument("engines", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Labelled rows like those to come: .jsonl, .csv, .tsv or .parquet, also .gz.",
)
@click.option(
    "--test",
    type=click.Path(path_type=Path),
    help="Labelled rows to report on. Default: parts of --data, cross-fitted.",
)
@click.option(
    "--max-drop",
    type=FiniteRange(0, 100),
    help="Largest drop of the metric in points. Default: three points, see below.",
)
@click.option("--speedup", type=FiniteRange(min=1), help="Least speed-up.")
@click.option("--risk", type=FiniteRange(), help="Bound the loss on new rows, in points.")
@click.option("--confidence", type=FiniteRange(), help="Of --risk, in percent. Default: 95.")
@click.option(
    "--risk-of",
    type=click.Choice([kind.value for kind in RiskOf]),
    help="Drop of the metric (default), or disagreement with full depth.",
)
@click.option("--metric", type=click.Choice(_METRICS), help="Default: accuracy or exact_match.")
@click.option(
    "--rule",
    "rules",
    multiple=True,
    type=click.Choice(["auto", *RULES]),
    help="Choose among these. Default: auto, whatever wins.",
)
@click.option(
    "--measure",
    "measures",
    multiple=True,
    type=click.Choice(["all", *(measure.value for measure in Measure)]),
    help="Similarity measures to try. Default: all.",
)
@column_options
@click.option("--target", help="A built target. Default: the folder's.")
@click.option("--name", help="Of the point. Default: after the wish, such as drop-0.5.")
@click.option("--unlabelled", is_flag=True, help="Hold the rule against full depth; no labels.")
@click.option(
    "--tune-label-thresholds", is_flag=True, help="Also choose each label's cut (multi-label)."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, help="Rows at a time in use.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for the trace.")
@click.option(
    "--report", type=click.Path(path_type=Path), help="Folder for a page about it all, with texts."
)
@click.option("--no-texts", is_flag=True, help="Leave the rows' texts out of the report.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all cores.")
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@version_option
@exits_with_one_line
def main(
    engines: Path,
    data: Path,
    name: str | None,
    report: Path | None,
    no_texts: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Choose operating points of ENGINES on the rows of --data, and write them into it.

    Without a wish there will be three: safe (the upper 95 % bound of the drop is at most 0.5
    points), balanced (the estimated drop is at most 0.5, the default) and fast (at most 2).
    """
    options = _options(name, settings)
    if no_texts and report is None:
        raise click.UsageError("--no-texts is about a report: give --report")
    if report is not None:
        require("plot")
        check_place(report)
    with Shown(quiet) as progress:
        result = calibrate(engines, data, options, progress)
    # The report comes last: what it may fail at is no matter for the calibration.
    if as_json:
        click.echo(json.dumps(to_dict(result)))
    else:
        _print(result, table_console())
        echo(f"next: fpabee-run {engines} --input texts.txt --operating-point {result.default}")
    if report is not None:
        with Shown(quiet) as progress:
            page = write_report(result, report, texts=not no_texts, progress=progress)
        echo(f"report: {page}", err=as_json)


def _options(name: str | None, settings: dict[str, Any]) -> CalibrationOptions:
    """What the flags ask for.

    Raises:
        click.UsageError: flags that do not go together.
    """
    asked = [flag for flag in ("max_drop", "speedup", "risk") if settings[flag] is not None]
    if len(asked) > 1:
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in asked)
        raise click.UsageError(f"{flags}: give one wish at a time; each makes a point of its own")
    if name is not None and not asked:
        raise click.UsageError("--name names one point: give --max-drop, --speedup or --risk")
    if name is not None and not is_name(name):
        raise click.UsageError(f"--name {name!a}: give a name that can be read and typed")
    of_risk = (settings["confidence"], settings["risk_of"])
    if settings["risk"] is None and of_risk != (None, None):
        raise click.UsageError("--confidence and --risk-of are about --risk: give it too")
    if "auto" in settings["rules"] and len(settings["rules"]) > 1:
        raise click.UsageError("--rule auto takes whatever wins: give no other rule with it")
    bound, goals = None, dict(DEFAULT_GOALS)
    default = "balanced"
    if settings["risk"] is not None:
        confidence = 95.0 if settings["confidence"] is None else settings["confidence"]
        risk_of = RiskOf(settings["risk_of"] or RiskOf.DROP)
        bound = Bound(settings["risk"] / 100, confidence / 100, risk_of)
        default = name or f"risk-{settings['risk']:g}"
    elif asked:
        short = {"max_drop": "drop", "speedup": "speedup"}[asked[0]]
        default = name or f"{short}-{settings[asked[0]]:g}"
        goals = {default: Goal(max_drop=settings["max_drop"], speedup=settings["speedup"])}
    rules = () if "auto" in settings["rules"] else tuple(settings["rules"])
    measures = tuple(Measure(m) for m in settings["measures"] if m != "all")
    return CalibrationOptions(
        goals=goals,
        bound=bound,
        name=default,
        default=default,
        reading=read_options(settings),
        metric=settings["metric"],
        rules=rules,
        measures=tuple(Measure) if "all" in settings["measures"] or not measures else measures,
        target=settings["target"],
        test=settings["test"],
        unlabelled=settings["unlabelled"],
        tune_label_thresholds=settings["tune_label_thresholds"],
        batch_size=settings["batch_size"],
        output=settings["output"],
        threads=settings["threads"],
        seed=settings["seed"],
    )


def to_dict(result: Calibration) -> dict[str, Any]:
    """The result for JSON."""
    return {
        "target": result.target,
        "rows": len(result.rows),
        "held_out": result.held_out,
        "default": result.default,
        "points": [_point(point) for point in result.points],
        "contenders": [
            {"kind": c.kind, "rule": c.rule.to_dict(), "held_out": asdict(c.held_out)}
            for c in result.comparisons
        ],
        "segment_seconds": [asdict(model) for model in result.costs],
        "cuts": None if result.label_thresholds is None else result.label_thresholds.to_dict(),
    }


def _point(point: Point) -> dict[str, Any]:
    certificate = point.certificate
    return {
        "name": point.name,
        "wish": str(point.goal),
        "kind": point.kind,
        "rule": point.rule.to_dict(),
        "chosen_on": asdict(point.chosen_on),
        "held_out": asdict(point.held_out),
        "optimism": point.optimism,
        "measured_speedup": point.measured,
        "certificate": None
        if certificate is None
        else {
            name: getattr(certificate, name) for name in ("risk_of", "risk", "confidence", "rows")
        },
    }


def _print(result: Calibration, console: Console) -> None:
    metric = result.points[0].held_out.metric
    layers = result.layers[-1]
    full = result.points[0].held_out.full_depth_score
    console.print(
        f"{result.target}: chosen on {len(result.rows)} rows, judged on {result.held_out}; "
        f"{metric} {full:.4f} at full depth"
    )
    sizes = list(result.points[0].measured)
    table = Table("point", "rule", metric, "drop (95 %)", "optimism", "depth", "layers", "times")
    for size in sizes:
        table.add_column(f"measured, batch {size}")
    for point in result.points:
        held = point.held_out
        table.add_row(
            point.name + (" (default)" if point.name == result.default else ""),
            rule_in_words(point.rule),
            f"{held.score:.4f}",
            drop_in_words(held),
            f"{point.optimism:+.2f}",
            f"{held.mean_depth:.2f} of {layers}",
            f"{held.theoretical:.2f}x",
            f"{held.estimated:.2f}x",
            *(f"{point.measured[size]:.2f}x" for size in sizes),
        )
    console.print(table)
    if result.held_out == CROSS_FITTED:
        console.print(
            f"{metric} to times are of each fifth of the rows, by what the other four choose: "
            "points with the same rule may differ"
        )
    for point in result.points:
        if point.certificate is not None:
            console.print(f"{point.name}: {point.goal}, tested on {point.certificate.rows} rows")
    for point in result.at_full_depth:
        console.print(
            f"{point.name}: {len(result.rows)} rows show of no other setting that it keeps to "
            f'"{point.goal}" -> give more rows, or wish for a larger drop'
        )
    title = f"best of each rule, {result.contenders_wish}:"
    table = Table("rule", metric, "drop (95 %)", "depth", "layers", "times", title=title)
    for comparison in result.comparisons:
        held = comparison.held_out
        table.add_row(
            rule_in_words(comparison.rule),
            f"{held.score:.4f}",
            drop_in_words(held),
            f"{held.mean_depth:.2f} of {layers}",
            f"{held.theoretical:.2f}x",
            f"{held.estimated:.2f}x",
        )
    console.print(table)
    if result.label_thresholds is not None:
        tuned = result.label_thresholds
        kept = "kept" if tuned.values else "not kept, since 0.5 for all labels is as good"
        console.print(
            f"label thresholds: {tuned.metric} {tuned.before:.4f} -> {tuned.after:.4f} "
            f"(cross-fitted), {kept}"
        )


if __name__ == "__main__":
    main()
