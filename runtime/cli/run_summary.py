"""The summary of a run, as `fpabee-run` prints it."""

from __future__ import annotations

from rich.table import Table

from ..files.summary import Summary
from ..rule_words import rule_in_words
from .console import PlainConsole

_BAR_WIDTH = 30


def print_summary(summary: Summary, operating_point: str | None) -> None:
    """Print the tally of a run to standard error.

    Args:
        summary: the tally.
        operating_point: the name of the calibrated rule that was run, if it was one.
    """
    console = PlainConsole(stderr=True)
    found = summary.to_dict(operating_point)
    rule = "full depth" if summary.rule is None else f"rule {rule_in_words(summary.rule)}"
    if operating_point:
        rule = f"operating point {operating_point}: {rule}"
    lines = [
        f"{summary.rows} rows in {found['seconds']:.1f} s ({found['rows_per_second']:.0f} rows/s) "
        f"on {found['target']}, {rule}"
    ]
    if found["mean_depth"] is not None:
        lines.append(
            f"mean depth {found['mean_depth']:.2f} of {found['layers']} layers, saving "
            f"{found['saving']:.1%}; {summary.truncated} truncated, {summary.empty} empty"
        )
    if summary.completed:
        lines.append(f"{summary.completed} rows were done by an earlier run")
    if summary.errors:
        unusable = " or have no usable label" if summary.metrics else ""
        lines.append(f"{summary.errors} rows could not be read{unusable}: their records are errors")
    for line in lines:
        console.print(line, soft_wrap=True)
    table = Table("exit", "layer", "rows", "share", "", box=None, pad_edge=False)
    for part in found["exits"]:
        share = part["rows"] / max(1, summary.rows - summary.errors)
        bar = "█" * round(_BAR_WIDTH * share)
        table.add_row(*map(str, part.values()), f"{share:.1%}", bar)
    console.print(table)
    if summary.metrics:
        print_scores(summary)
    if operating_point is None and summary.rule is not None:
        points = ", ".join(summary.engine.manifest.targets[found["target"]].operating_points)
        console.print(
            f"The rule is not one of the operating points of {found['target']}: {points}."
            if points
            else f"The rule is not calibrated for your data on {found['target']}: run "
            "fpabee-calibrate on labelled rows.",
            soft_wrap=True,
        )


def print_scores(summary: Summary) -> None:
    """Print the scores of a run to standard error."""
    scores = ", ".join(f"{name} {value:.4f}" for name, value in summary.scores().items())
    PlainConsole(stderr=True).print(scores)
