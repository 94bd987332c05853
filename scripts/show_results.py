#!/usr/bin/env python
"""Print what `scripts/quickstart` produced: a table of predictions, and what early exit gains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from fpabee.runtime import read_manifest
from fpabee.runtime.cli.console import table_console

_BATCH = "32"


def predictions_table(lines: list[str]) -> Table:
    """The output of `fpabee-run --with-text` as a table."""
    table = Table("text", "label", "score", "exit")
    for row in map(json.loads, lines):
        table.add_row(row["text"], row["label"], f"{row['score']:.3f}", str(row["exit"]))
    return table


def gains(calibrated: dict[str, Any], full: dict[str, Any], speedup: float) -> Iterator[str]:
    """What early exit gains, in plain words.

    Args:
        calibrated: the summary of `fpabee-run --json --metrics` at an operating point.
        full: the same with `--full-depth`.
        speedup: how many times faster the operating point is.
    """
    point, rows = calibrated["operating_point"], calibrated["rows"]
    scores = [summary["metrics"]["accuracy"] for summary in (full, calibrated)]
    yield f"What early exit gains on the {rows} test requests (operating point {point!r}):"
    yield f"  accuracy  {scores[0]:.1%} at full depth, {scores[1]:.1%} with early exit"
    yield f"  layers    {calibrated['saving']:.0%} fewer"
    yield f"  time      {1 - 1 / speedup:.0%} less, as measured during calibration"


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Print the results in FOLDER, which scripts/quickstart wrote."""
    table_console().print(
        predictions_table((folder / "predictions.jsonl").read_text().splitlines())
    )
    # The summary is the last line on stderr; a library may have written others before.
    calibrated, full = (
        json.loads((folder / name).read_text().splitlines()[-1])
        for name in ("test.json", "test_full.json")
    )
    target = read_manifest(folder / "engines").targets[calibrated["target"]]
    point = target.operating_points[calibrated["operating_point"]]
    for line in gains(calibrated, full, point.measured_speedup[_BATCH]):
        click.echo(line)


if __name__ == "__main__":
    main()
