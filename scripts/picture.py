#!/usr/bin/env python
"""Draw the README's picture from the results of `peers.py`: score against time per text.

    python scripts/picture.py scripts/results/peers docs/assets

There is one panel for each data set. fpabee is a curve over its operating points, and every
alternative is a point. A light and a dark version are written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peers import MODELS

from fpabee.runtime import InputError
from fpabee.runtime.cli.errors import exits_with_one_line

OWN = "fpabee-"
BLUE, OTHER = "#0072B2", "#D55E00"
# What alternatives that are not alike look like; the first prefix that fits counts.
MARKERS = {
    "torch": "^",
    "pabee": "v",
    "onnx": "s",
    "openvino": "D",
    "first": "P",
    "": "X",
}

Results = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Theme:
    """Colours of a version of the picture."""

    name: str
    ink: str
    grid: str


THEMES = (Theme("light", "#1f2328", "#d8dee4"), Theme("dark", "#e6edf3", "#3d444d"))


def read(folder: Path) -> Results:
    """What was measured, by data set; alternatives that failed are left out.

    Raises:
        InputError: nothing was measured.
    """
    found = {}
    for name in MODELS:
        rows = [
            json.loads(path.read_text("utf-8")) for path in sorted(folder.glob(f"{name}/*.json"))
        ]
        if any("score" in row for row in rows):
            found[name] = [row for row in rows if "score" in row]
    if not found:
        raise InputError(f"{folder} has no results", "run scripts/peers.py first")
    return found


def draw(axes: Axes, name: str, rows: list[dict[str, Any]], theme: Theme) -> None:
    """Draw a data set."""
    own = sorted((row["median_ms"], row) for row in rows if row["name"].startswith(OWN))
    axes.plot(
        [ms for ms, _ in own], [100 * row["score"] for _, row in own], "o-", color=BLUE,
        zorder=3, label="fpabee, operating points",
    )  # fmt: skip
    for row in rows:
        if row["name"].startswith(OWN):
            continue
        marker = next(m for prefix, m in MARKERS.items() if row["name"].startswith(prefix))
        place = row["median_ms"], 100 * row["score"]
        axes.plot(*place, marker, color=OTHER)
        axes.annotate(
            row["name"], place, (4, 4), textcoords="offset points", color=theme.ink, fontsize=7
        )
    axes.set_xscale("log")
    axes.set_title(name, color=theme.ink)
    axes.set_xlabel("ms per text, one at a time", color=theme.ink)
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.tick_params(colors=theme.ink, which="both")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.ink)


def picture(results: Results, theme: Theme) -> Figure:
    """The picture in one theme."""
    figure = Figure(figsize=(1.2 + 4 * len(results), 4.2), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, rows) in zip(panels, results.items(), strict=True):
        draw(axes, name, rows, theme)
    panels[0].set_ylabel("test accuracy, %", color=theme.ink)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, frameon=False, labelcolor=theme.ink, loc="outside lower center")
    return figure


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@exits_with_one_line
def main(results: Path, folder: Path) -> None:
    """Draw RESULTS as score-light.svg and score-dark.svg into FOLDER."""
    content = read(results)
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        style: dict[Any, Any] = {"svg.hashsalt": "fpabee", "svg.fonttype": "none", "font.size": 10}
        with mpl.rc_context(style):
            figure = picture(content, theme)
            path = folder / f"score-{theme.name}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
