#!/usr/bin/env python
"""Draw the README's picture from the results of `peers.py`: score against time per text.

    python scripts/picture.py scripts/results/peers.json docs/assets

There is one panel for each model. fpabee is a curve over its operating points, and every
alternative is a point. The time is that of the whole file, divided by its texts: the time of the
median text would hide the texts that use all layers. A light and a dark version are written.
"""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peers import CUTS, PABEE
from systems import OTHERS

from fpabee.runtime import InputError
from fpabee.runtime.cli.command import exits_with_one_line

OWN = "fpabee-"
SHOWN = sorted([PABEE, *(other.name for other in OTHERS), *(f"first-{n}-layers" for n in CUTS)])
BLUE = "#0072B2"
# Colours and markers of the alternatives: together they tell more than a dozen apart.
COLORS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "sD^vPX*"

Places = dict[str, tuple[float, float]]
"""The milliseconds and the accuracy of each system."""
Results = dict[str, Places]
Styles = dict[str, tuple[str, str]]
"""The colour and the marker of each alternative."""


# Ink and grid of each version of the picture.
THEMES = {"light": ("#1f2328", "#d8dee4"), "dark": ("#e6edf3", "#3d444d")}


def style(ink: str, grid: str) -> dict[Any, Any]:
    """The settings of matplotlib for a theme."""
    inked = ("text.color", "axes.titlecolor", "axes.labelcolor", "axes.edgecolor")
    return dict.fromkeys((*inked, "xtick.color", "ytick.color"), ink) | {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 10,
        "grid.color": grid,
        "grid.linewidth": 0.7,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "fpabee",
    }


def read(path: Path) -> Results:
    """What was measured, by model, except for systems that failed or that are not drawn.

    Raises:
        InputError: nothing was measured.
    """
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {
        model: {
            name: (1000 / row["rows_per_s"], 100 * row["score"])
            for name, row in rows.items()
            if "score" in row and (name in SHOWN or name.startswith(OWN))
        }
        for model, rows in stored.items()
    }
    if not any(found.values()):
        raise InputError(f"{path} has no results", "run scripts/peers.py first")
    return {model: places for model, places in found.items() if places}


def draw(axes: Axes, name: str, places: Places, styles: Styles) -> None:
    """Draw the systems of a model."""
    own = sorted(place for other, place in places.items() if other.startswith(OWN))
    axes.plot(*zip(*own, strict=True), "o-", color=BLUE, zorder=3, label="fpabee")
    for other, (color, marker) in styles.items():
        if other in places:
            axes.plot(*places[other], marker, color=color, zorder=4, label=other)
    axes.set_xscale("log")
    axes.set_title(name)
    axes.set_xlabel("ms per text, over the test file")


def picture(results: Results) -> Figure:
    """The picture, in the colours that matplotlib is set to."""
    figure = Figure(figsize=(3.2 + 4 * len(results), 3.8), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    styles = dict(zip(SHOWN, zip(cycle(COLORS), cycle(MARKERS), strict=False), strict=False))
    lines: dict[str, Any] = {}
    for axes, (model, places) in zip(panels, results.items(), strict=True):
        draw(axes, model.split("-")[1], places, styles)
        drawn, labels = axes.get_legend_handles_labels()
        lines |= zip(labels, drawn, strict=True)
    panels[0].set_ylabel("test accuracy, %")
    figure.legend(lines.values(), lines, loc="outside right upper")
    return figure


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@exits_with_one_line
def main(results: Path, folder: Path) -> None:
    """Draw RESULTS as score-light.svg and score-dark.svg into FOLDER."""
    content = read(results)
    folder.mkdir(parents=True, exist_ok=True)
    for theme, (ink, grid) in THEMES.items():
        with mpl.rc_context(style(ink, grid)):
            path = folder / f"score-{theme}.svg"
            picture(content).savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
