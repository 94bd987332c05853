"""The figures of a report. pyplot is not used, so no global state changes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from .data import Report
from .exits import Bin

# The palette of Okabe and Ito, for readers with colour blindness; dashes and markers differ, too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
_LINE_MARKERS = (".", "x", "+", "1", "2", "3")
_POINT_MARKERS = ("o", "s", "D", "^", "v", "P")
_GREY, _LIGHT = "#767676", "#C8C8C8"
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
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "fpabee",
    "text.parse_math": False,  # names may contain a $
    "text.usetex": False,
}
_WIDTH = 9.5
_COLUMNS = 4
_LONGEST_NAME = 28
# In points: curves are shown down to this drop, and further if an interval reaches lower.
_LEAST_FLOOR = 4.0
# Speed-ups above this one are shown on a logarithmic axis.
_MOST_LINEAR = 8.0


def draw(report: Report) -> dict[str, bytes]:
    """The figures by name, as SVG; without labels there is no reliability diagram."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A name may be in a script that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figures = {"speedup": _speedup(report), "depths": _depths(report)}
        if report.bins:
            figures["reliability"] = _reliability(report)
        return {name: _svg(figure) for name, figure in figures.items()}


def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _clipped(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _speedup(report: Report) -> Figure:
    """Score against speed-up: the curves, and the operating points with their intervals."""
    figure = _figure(5.2)
    axes = figure.subplots()
    curves = groupby(report.fronts, key=lambda setting: setting.curve)
    for number, (name, settings) in enumerate(curves):
        pairs = sorted({(setting.estimated_speedup, -setting.drop) for setting in settings})
        axes.plot(
            *zip(*pairs, strict=True),
            color=_COLOURS[number],
            linestyle=_DASHES[number],
            marker=_LINE_MARKERS[number],
            linewidth=1.6,
            label=name,
        )
    label = f"full depth: {report.metric} {report.full_depth:.4f}"
    axes.axhline(0, color="black", linewidth=1, label=label)
    for number, point in enumerate(report.result.points):
        held = point.held_out
        low, high = held.interval
        axes.errorbar(
            point.chosen_on.estimated,
            -held.drop,
            # An interval from a bootstrap need not contain the estimate.
            yerr=[[max(0.0, high - held.drop)], [max(0.0, held.drop - low)]],
            color="black",
            marker=_POINT_MARKERS[number % len(_POINT_MARKERS)],
            markersize=11 - 2 * (number % 4),
            markerfacecolor="none",
            markeredgewidth=1.6,
            capsize=6 - number % 4,
            linestyle="none",
            zorder=5,
            label=f"{_clipped(point.name)}, with 95 % interval",
        )
    _limit(axes, report)
    axes.set_xlabel("estimated speed-up: time at full depth / time with the rule")
    axes.set_ylabel(f"{report.metric} compared with full depth, points")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _limit(axes: Axes, report: Report) -> None:
    """Show the part of the plane where people choose."""
    points = report.result.points
    floor = max(_LEAST_FLOOR, 1.3 * max(point.held_out.interval[1] for point in points))
    seen = [setting for setting in report.fronts if setting.drop <= floor]
    fastest = [s.estimated_speedup for s in seen] + [p.chosen_on.estimated for p in points]
    tops = [-s.drop for s in seen] + [-p.held_out.interval[0] for p in points]
    axes.set_ylim(-floor, max(0.5, *tops) + 0.05 * floor)
    axes.set_xlim(0.95, 1.05 * max(1.2, *fastest))
    if max(fastest) > _MOST_LINEAR:  # where exit 0 answers nearly all rows
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.xaxis.set_minor_formatter(NullFormatter())


def _depths(report: Report) -> Figure:
    """Where each operating point stops rows."""
    points, layers = report.result.points, report.result.layers
    figure = _figure(0.6 + 1.5 * len(points))
    panels = figure.subplots(len(points), 1, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, point in zip(panels, points, strict=True):
        held = point.chosen_on
        shares = np.array(held.exits) / held.rows
        bars = axes.bar(layers, shares, color=_COLOURS[0], width=0.7)
        axes.bar_label(bars, [f"{100 * s:.0f} %" if s else "" for s in shares], fontsize=8)
        above = axes.get_xaxis_transform()
        axes.plot(held.mean_depth, 1.0, "v", color=_COLOURS[1], transform=above, clip_on=False)
        axes.set_title(f"{_clipped(point.name)}: mean depth {held.mean_depth:.2f} (▼)")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.margins(y=0.18)
        axes.grid(axis="x", visible=False)
    panels[-1].set_xticks(layers)
    panels[-1].set_xlabel("layer of the exit")
    figure.supylabel("rows that stop there", fontsize=9)
    return figure


def _reliability(report: Report) -> Figure:
    """Probability against truth, with one panel for each exit."""
    count = len(report.exit_scores)
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = _figure(0.4 + 2.4 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes, score in zip(panels, report.exit_scores, strict=False):
        _reliability_panel(axes, [bin for bin in report.bins if bin.exit == score.exit])
        error = 100 * (score.calibration_error or 0.0)
        axes.set_title(f"layer {score.layer}: ECE {error:.1f} %")
        axes.tick_params(labelbottom=True)
    figure.supxlabel("probability", fontsize=9)
    figure.supylabel("share that is true", fontsize=9)
    return figure


def _reliability_panel(axes: Axes, bins: Sequence[Bin]) -> None:
    total = sum(bin.count for bin in bins)
    middles = [(bin.low + bin.high) / 2 for bin in bins]
    axes.bar(middles, [bin.count / total for bin in bins], bins[0].high - bins[0].low, color=_LIGHT)
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--")
    full = [bin for bin in bins if bin.count]
    x = np.array([bin.probability for bin in full], float)
    y = np.array([bin.correct for bin in full], float)
    axes.plot(x, y, color=_COLOURS[0], linewidth=1.4)
    axes.scatter(x, y, s=[10 + 60 * bin.count / total for bin in full], color=_COLOURS[0], zorder=3)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
