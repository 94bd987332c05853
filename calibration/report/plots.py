"""The pictures of a report. pyplot is not used, so no global state changes."""

from __future__ import annotations

import io
import warnings
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..result import Calibration
from .curves import curves

# The palette of Okabe and Ito, for readers with colour blindness; dashes and markers differ, too.
# There may be as many curves as rules.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#F0E442", "#999999")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
_POINT_MARKERS = ("o", "s", "D", "^", "v", "P")
_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "fpabee",
    "text.parse_math": False,  # names may contain a $
}
_WIDTH = 9.5
_LONGEST_NAME = 28
# In points: curves are shown down to this drop, and further if an interval reaches lower.
_LEAST_FLOOR = 4.0


def draw(result: Calibration) -> dict[str, bytes]:
    """The pictures by name, as SVG."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A name may be in a script that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return {"depth": _svg(_depth(result)), "exits": _svg(_exits(result))}


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _depth(result: Calibration) -> Figure:
    """Score against depth: the curves, and the operating points with their intervals."""
    figure = Figure(figsize=(_WIDTH, 5.2), layout="constrained")
    metric = result.points[0].held_out.metric
    axes = figure.subplots()
    for number, (rule, settings) in enumerate(curves(result).items()):
        axes.plot(
            [depth for depth, _ in settings],
            [-drop for _, drop in settings],
            color=_COLOURS[number],
            linestyle=_DASHES[number],
            marker=".",
            label=rule,
        )
    axes.axhline(0, color="black", linewidth=1, label="full depth")
    for number, point in enumerate(result.points):
        held = point.held_out
        low, high = held.interval
        axes.errorbar(
            point.chosen_on.mean_depth,
            -held.drop,
            # An interval from a bootstrap need not contain the estimate.
            yerr=[[max(0.0, high - held.drop)], [max(0.0, held.drop - low)]],
            color="black",
            marker=_POINT_MARKERS[number % len(_POINT_MARKERS)],
            markersize=11 - 2 * (number % 4),
            markerfacecolor="none",
            capsize=6 - number % 4,
            linestyle="none",
            zorder=5,
            label=f"{point.name[:_LONGEST_NAME]}, with its interval",
        )
    # The part of the plane where people choose.
    floor = max(_LEAST_FLOOR, *(1.3 * point.held_out.interval[1] for point in result.points))
    axes.set_ylim(bottom=-floor)
    passes = " in two passes" if result.rows.has_quick_pass else ""
    axes.set_xlabel(f"mean depth in layers{passes}, of {result.depth}")
    axes.set_ylabel(f"{metric} compared with full depth, points")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _exits(result: Calibration) -> Figure:
    """Where each operating point stops rows."""
    points = result.points
    layers = result.layers
    figure = Figure(figsize=(_WIDTH, 0.6 + 1.5 * len(points)), layout="constrained")
    panels = figure.subplots(len(points), 1, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, point in zip(panels, points, strict=True):
        runs = point.chosen_on
        shares = np.array(runs.exits) / runs.rows
        bars = axes.bar(layers, shares, color=_COLOURS[0], width=0.7)
        axes.bar_label(bars, [f"{100 * s:.0f} %" if s else "" for s in shares], fontsize=8)
        above = axes.get_xaxis_transform()
        axes.plot(runs.mean_depth, 1.0, "v", color=_COLOURS[1], transform=above, clip_on=False)
        axes.set_title(f"{point.name[:_LONGEST_NAME]}: mean depth {runs.mean_depth:.2f} (▼)")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.margins(y=0.18)
        axes.grid(axis="x", visible=False)
    panels[-1].set_xticks(layers)
    panels[-1].set_xlabel("layers that have run at the exit")
    figure.supylabel("rows that stop there", fontsize=9)
    return figure
