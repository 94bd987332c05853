"""The summary of a run, as `fpabee-run` prints it."""

from __future__ import annotations

from rich.table import Table

from ..files.job import Job
from ..rule_words import rule_in_words
from .console import PlainConsole

_BAR_WIDTH = 30


def print_summary(job: Job, operating_point: str | None) -> None:
    """Print the tally of a run to standard error.

    Args:
        job: the run.
        operating_point: the name of the calibrated rule that was run, if it was one.
    """
    console = PlainConsole(stderr=True)
    found = job.to_dict(operating_point)
    rule = "full depth" if job.rule is None else f"rule {rule_in_words(job.rule)}"
    if operating_point:
        rule = f"operating point {operating_point}: {rule}"
    lines = [
        f"{job.rows} rows in {found['seconds']:.1f} s ({found['rows_per_second']:.0f} rows/s) "
        f"on {found['target']}, {rule}"
    ]
    if found["mean_depth"] is not None:
        lines.append(
            f"mean depth {found['mean_depth']:.2f} of {found['layers']} layers, saving "
            f"{found['saving']:.1%}; {job.truncated} truncated, {job.empty} empty"
        )
    if job.rows_before:
        lines.append(f"{job.rows_before} rows were done by an earlier run")
    if job.errors:
        unusable = " or have no usable label" if job.metrics else ""
        lines.append(f"{job.errors} rows could not be read{unusable}: their records are errors")
    for line in lines:
        console.print(line, soft_wrap=True)
    table = Table("exit", "layer", "rows", "share", "", box=None, pad_edge=False)
    for part in found["exits"]:
        share = part["rows"] / max(1, job.rows - job.errors)
        bar = "█" * round(_BAR_WIDTH * share)
        table.add_row(*map(str, part.values()), f"{share:.1%}", bar)
    console.print(table)
    if job.metrics:
        print_scores(job)
    if operating_point is None and job.rule is not None:
        points = ", ".join(job.engine.manifest.targets[found["target"]].operating_points)
        console.print(
            f"The rule is not one of the operating points of {found['target']}: {points}."
            if points
            else f"The rule is not calibrated for your data on {found['target']}: run "
            "fpabee-calibrate on labelled rows.",
            soft_wrap=True,
        )


def print_scores(job: Job) -> None:
    """Print the scores of a run to standard error."""
    scores = ", ".join(f"{name} {value:.4f}" for name, value in job.scores().items())
    PlainConsole(stderr=True).print(scores)
