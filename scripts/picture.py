#!/usr/bin/env python
"""Draw the README's picture from the results of `peers.py`: accuracy against texts a second.

    python scripts/picture.py scripts/results/peers.json docs/assets

It shows one dataset. A model that was trained with exits is a curve over its operating points and
full depth, for which it is one graph. A plain classifier is a point for each library, and its
conversion is one as well. Texts a second are those of the whole file, on a logarithmic axis: the
time of the median text would hide the texts that use all layers. An arrow says how many times as
many texts the conversion answers as PyTorch. A light and a dark version are written.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from fpabee.commands.command import exits_with_one_line
from fpabee.runtime import InputError

MODEL = "mini-sst2-exit-0-42"
OWN = {
    "fpabee-fast": ("fast", "left"),
    "fpabee-balanced": ("fpabee, trained with exits: balanced", "over"),
    "fpabee-safe": ("safe", "below"),
    "one-graph": ("full depth", "left"),
}
"""The operating points and full depth in the picture, and where their names are written."""
CONVERTED = {"fpabee-converted-openvino-bf16": ("fpabee, converted", "right")}
"""The conversion, likewise."""
OTHERS = {
    "pipeline": ("PyTorch", "above"),
    "pipeline-bf16": ("PyTorch bf16", "below"),
    "openvino-int8": ("OpenVINO int8", "above"),
}
"""The classifier that was converted, in other libraries."""
ARROW = ("pipeline", "fpabee-converted-openvino-bf16")
"""Between which systems the arrow is drawn."""
# Ink and grid of each version of the picture, and the colours of fpabee and of the alternatives.
THEMES = {
    "light": ("#1f2328", "#d8dee4", "#0072B2", "#BC4C00"),
    "dark": ("#e6edf3", "#3d444d", "#58A6FF", "#F0883E"),
}
PLACES = {
    "above": (0, 9, "center"),
    "over": (8, 9, "right"),
    "below": (0, -18, "center"),
    "left": (-10, -4, "right"),
    "right": (10, -4, "left"),
}
"""How many points a name is away from its point, and how it is aligned."""

Place = tuple[float, float]


def style(ink: str, grid: str) -> dict[Any, Any]:
    """The settings of matplotlib for a theme."""
    inked = ("text.color", "axes.titlecolor", "axes.labelcolor", "axes.edgecolor")
    return dict.fromkeys((*inked, "xtick.color", "ytick.color"), ink) | {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 11,
        "grid.color": grid,
        "grid.linewidth": 0.7,
        "svg.fonttype": "none",
        "svg.hashsalt": "fpabee",
    }


def read(path: Path) -> tuple[dict[str, Place], float]:
    """The texts a second and the accuracy in percent of each system, and the factor of the arrow.

    Raises:
        InputError: a system was not measured.
    """
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = stored.get(MODEL, {})
    rounds = {name: rows.get(name, {}).get("rounds") for name in OWN | CONVERTED | OTHERS}
    missing = [name for name, each in rounds.items() if not each]
    if missing:
        raise InputError(
            f"{path} has no results of {', '.join(missing)}", "run scripts/peers.py first"
        )
    places = {
        name: (
            statistics.median(one["rows_per_s"] for one in each),
            100 * statistics.median(one["score"] for one in each),
        )
        for name, each in rounds.items()
    }
    slow, fast = ({one["round"]: one["rows_per_s"] for one in rounds[name]} for name in ARROW)
    return places, statistics.median(fast[number] / slow[number] for number in slow)


def picture(places: dict[str, Place], factor: float, own: str, other: str) -> Figure:
    """The picture, in the colours of fpabee and of the alternatives."""
    figure = Figure(figsize=(6.2, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*(places[name] for name in OWN), strict=True), "o-", color=own, markersize=8)
    axes.plot(*zip(*(places[name] for name in OTHERS), strict=True), "D", color=other, markersize=8)
    axes.plot(*places[ARROW[1]], "D", color=own, markersize=8)
    for names, color in ((OWN, own), (CONVERTED, own), (OTHERS, other)):
        for name, (label, side) in names.items():
            right, up, align = PLACES[side]
            away: dict[str, Any] = {
                "xytext": (right, up),
                "textcoords": "offset points",
                "ha": align,
            }
            text = axes.annotate(label, places[name], color=color, **away)
            text.set_in_layout(False)
    slow, fast = (places[name] for name in ARROW)
    lowest = min(accuracy for _, accuracy in places.values())
    height = (lowest + slow[1]) / 2
    line: dict[str, Any] = {"arrowprops": {"arrowstyle": "->", "color": own}}
    axes.annotate("", (fast[0], height), (slow[0], height), **line)
    middle = (slow[0] * fast[0]) ** 0.5
    words = f"{factor:.1f} times as many texts"
    axes.text(middle, height, words, color=own, ha="center", va="bottom")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([200, 500, 1000, 2000, 5000])
    axes.margins(x=0.12)
    axes.margins(y=0.15)
    axes.set_xlabel("texts per second, over the test file")
    axes.set_ylabel("test accuracy in %")
    return figure


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@exits_with_one_line
def main(results: Path, folder: Path) -> None:
    """Draw RESULTS as score-light.svg and score-dark.svg into FOLDER."""
    places, factor = read(results)
    folder.mkdir(parents=True, exist_ok=True)
    for theme, (ink, grid, own, other) in THEMES.items():
        with mpl.rc_context(style(ink, grid)):
            path = folder / f"score-{theme}.svg"
            picture(places, factor, own, other).savefig(
                path, transparent=True, metadata={"Date": None}
            )


if __name__ == "__main__":
    main()
