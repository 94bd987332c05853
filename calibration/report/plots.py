"""The figures of a report. No pyplot: nothing global is touched, and no figure stays open."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..calibrate import SHOWN_RULES
from .data import Report
from .exits import Bin
from .fronts import FrontSetting

# Okabe and Ito's colours, which the colour-blind tell apart; each also has a dash and a marker.
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)
_COLOURS = (_BLUE, _RED, _GREEN, _ORANGE, _PURPLE, _SKY)
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
_LINE_MARKERS = (".", "x", "+", "1", "2", "3")
_POINT_MARKERS = ("o", "s", "D", "^", "v", "P")
_GREY = "#767676"
_LIGHT = "#C8C8C8"
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
    "text.parse_math": False,  # names may hold a $
    "text.usetex": False,
}
_WIDTH = 9.5
_COLUMNS = 4
_PNG_DPI = 150
_LONGEST_NAME = 28
# Curves that fall lower leave the picture, so that what is affordable can be seen.
_LEAST_FLOOR = 4.0
_MOST_DROP = 5.0


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        svg: for the page.
        png: the same for other uses.
    """

    svg: bytes
    png: bytes


def draw(report: Report) -> dict[str, Picture | None]:
    """Every figure by name; None where the calibration has nothing to show."""
    figures: dict[str, Callable[[Report], Figure | None]] = {
        "speedup": _speedup,
        "rules": lambda report: _panels(report, report.fronts),
        "measures": lambda report: _panels(report, report.measures),
        "depths": _depths,
        "exits": _exits,
        "reliability": _reliability,
        "patience": _patience,
        "segments": _segments,
    }
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        drawn = {name: figure(report) for name, figure in figures.items()}
        return {name: None if found is None else _saved(found) for name, found in drawn.items()}


def _saved(figure: Figure) -> Picture:
    content = {}
    for kind, more in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": _PNG_DPI})):
        file = io.BytesIO()
        figure.savefig(file, format=kind, **more)
        content[kind] = file.getvalue()
    return Picture(content["svg"], content["png"])


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _clipped(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _speedup(report: Report) -> Figure:
    """Score against speed-up: the rules that matter most, and the points with intervals."""
    figure = _figure(5.2)
    axes = figure.subplots()
    points = report.result.points
    names = [*SHOWN_RULES, *(point.kind for point in points)]
    names += [comparison.kind for comparison in report.result.comparisons]
    curves = _by_curve(report.fronts)
    chosen = [name for name in dict.fromkeys(names) if name in curves][: len(_COLOURS)]
    for number, name in enumerate(chosen):
        x, y = _line(curves[name])
        axes.plot(
            x,
            y,
            color=_COLOURS[number],
            linestyle=_DASHES[number],
            marker=_LINE_MARKERS[number],
            linewidth=1.6,
            label=name,
        )
    _reference(axes, report)
    for number, point in enumerate(points):
        held = point.held_out
        low, high = held.interval
        axes.errorbar(
            held.estimated,
            -held.drop,
            # A bootstrap interval need not hold the estimate.
            yerr=[[max(0.0, high - held.drop)], [max(0.0, held.drop - low)]],
            color="black",
            marker=_POINT_MARKERS[number % len(_POINT_MARKERS)],
            markersize=11 - 2 * (number % 4),
            markerfacecolor="none",
            markeredgewidth=1.6,
            capsize=6 - number % 4,
            linestyle="none",
            zorder=5,
            label=f"point {_clipped(point.name)}, with 95 % interval",
        )
    _limits(axes, report, curves, chosen)
    axes.set_xlabel("estimated speed-up: time at full depth / time with the rule")
    axes.set_ylabel(_loss_label(report))
    _score_axis(axes, report)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _reference(axes: Axes, report: Report) -> None:
    axes.axhline(
        0,
        color="black",
        linewidth=1,
        label=f"full depth: {report.metric} {report.full_depth:.4f}",
    )


def _loss_label(report: Report) -> str:
    return f"{report.metric} against full depth, points"


def _score_axis(axes: Axes, report: Report) -> None:
    full = report.full_depth

    def score(points: Any) -> Any:
        return full + points / 100

    def points(score: Any) -> Any:
        return 100 * (score - full)

    right = axes.secondary_yaxis("right", functions=(score, points))
    right.set_ylabel(report.metric)


def _by_curve(settings: Sequence[FrontSetting]) -> dict[str, list[FrontSetting]]:
    curves: dict[str, list[FrontSetting]] = {}
    for setting in settings:
        curves.setdefault(setting.curve, []).append(setting)
    return curves


def _line(settings: Sequence[FrontSetting]) -> tuple[list[float], list[float]]:
    """Speed-ups, ascending, and changes of the score in points."""
    pairs = sorted({(setting.speedup, -setting.drop) for setting in settings})
    return [x for x, _ in pairs], [y for _, y in pairs]


def _limits(
    axes: Axes,
    report: Report,
    curves: dict[str, list[FrontSetting]],
    shown: Sequence[str],
) -> None:
    """The part of the plane where settings can be afforded."""
    highs = [point.held_out.interval[1] for point in report.result.points]
    floor = max(_LEAST_FLOOR, 1.3 * max(highs))
    seen = [s for name in shown for s in curves[name] if s.drop <= floor]
    fastest = [s.speedup for s in seen] + [p.held_out.estimated for p in report.result.points]
    tops = [-s.drop for s in seen] + [-p.held_out.interval[0] for p in report.result.points]
    axes.set_ylim(-floor, max(0.5, *tops) + 0.05 * floor)
    axes.set_xlim(0.95, 1.05 * max(1.2, *fastest))


def _panels(report: Report, settings: Sequence[FrontSetting]) -> Figure | None:
    """A panel for each curve, before all others in grey."""
    curves = _by_curve(settings)
    if not curves:
        return None
    figure, panels = _grid(len(curves), 2.0)
    for axes, name in zip(panels, curves, strict=True):
        for other in curves.values():
            axes.plot(*_line(other), color=_LIGHT, linewidth=0.9)
        axes.plot(*_line(curves[name]), color=_BLUE, marker=".", linewidth=1.8)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(name)
        _limits(axes, report, curves, list(curves))
    figure.supxlabel("estimated speed-up", fontsize=9)
    figure.supylabel(_loss_label(report), fontsize=9)
    return figure


def _grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels of the same axes, a few in a row."""
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = _figure(0.4 + height * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for spare in panels[count:]:
        spare.set_visible(False)
    for axes in panels[max(0, count - columns) : count]:
        axes.tick_params(labelbottom=True)
    return figure, list(panels[:count])


def _depths(report: Report) -> Figure:
    """Where each operating point stops rows."""
    points, layers = report.result.points, report.result.layers
    figure = _figure(0.6 + 1.5 * len(points))
    panels = figure.subplots(len(points), 1, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, point in zip(panels, points, strict=True):
        held = point.held_out
        shares = np.array(held.exits) / held.rows
        bars = axes.bar(layers, shares, color=_BLUE, width=0.7)
        axes.bar_label(bars, [f"{100 * s:.0f} %" if s else "" for s in shares], fontsize=8)
        above = axes.get_xaxis_transform()
        axes.plot(held.mean_depth, 1.0, "v", color=_RED, transform=above, clip_on=False)
        axes.set_title(f"{_clipped(point.name)}: mean depth {held.mean_depth:.2f} (▼)")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.margins(y=0.18)
        axes.grid(axis="x", visible=False)
    panels[-1].set_xticks(layers)
    panels[-1].set_xlabel("layer of the exit")
    figure.supylabel("rows that stop there", fontsize=9)
    return figure


def _exits(report: Report) -> Figure:
    """The score of every exit by itself."""
    figure = _figure(3.2)
    axes = figure.subplots()
    scores = report.exit_scores
    layers = [score.layer for score in scores]
    values = np.array([score.score for score in scores])
    drops = np.array([score.drop for score in scores])
    below = np.array([score.high for score in scores]) - drops
    above = drops - np.array([score.low for score in scores])
    axes.errorbar(
        layers,
        values,
        yerr=np.maximum([below, above], 0) / 100,
        color=_BLUE,
        marker="o",
        capsize=4,
        linewidth=1.6,
    )
    for score in scores:
        axes.annotate(
            f"{score.score:.3f}",
            (score.layer, score.score),
            xytext=(4, -11),
            textcoords="offset points",
            fontsize=8,
        )
    axes.axhline(values[-1], color="black", linewidth=1)
    axes.set_xticks(layers)
    axes.margins(x=0.06, y=0.12)
    if values.min() >= 0:
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.set_xlabel("layer of the exit at which all rows stop")
    axes.set_ylabel(report.metric)
    return figure


def _reliability(report: Report) -> Figure | None:
    """Probability against truth, a panel for each exit."""
    if not report.bins:
        return None
    figure, panels = _grid(len(report.exit_scores), 2.4)
    for axes, score in zip(panels, report.exit_scores, strict=True):
        bins = [bin for bin in report.bins if bin.exit == score.exit]
        _reliability_panel(axes, bins)
        error = 100 * (score.calibration_error or 0.0)
        axes.set_title(f"layer {score.layer}: ECE {error:.1f} %")
    figure.supxlabel("probability", fontsize=9)
    figure.supylabel("share that is true", fontsize=9)
    return figure


def _reliability_panel(axes: Axes, bins: Sequence[Bin]) -> None:
    total = sum(bin.count for bin in bins)
    width = bins[0].high - bins[0].low
    middles = [(bin.low + bin.high) / 2 for bin in bins]
    axes.bar(middles, [bin.count / total for bin in bins], width, color=_LIGHT)
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--")
    full = [bin for bin in bins if bin.probability is not None and bin.correct is not None]
    x = [bin.probability for bin in full]
    y = [bin.correct for bin in full]
    axes.plot(x, y, color=_BLUE, linewidth=1.4)  # type: ignore[arg-type]
    sizes = [10 + 60 * bin.count / total for bin in full]
    axes.scatter(x, y, s=sizes, color=_BLUE, zorder=3)  # type: ignore[arg-type]
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])


def _patience(report: Report) -> Figure | None:
    """Drop and speed-up of every patience and threshold, as numbers on colours."""
    if not report.cells:
        return None
    patiences = sorted({cell.patience for cell in report.cells})
    thresholds = sorted({cell.threshold for cell in report.cells})
    by_place = {(cell.patience, cell.threshold): cell for cell in report.cells}
    cells = [[by_place[p, t] for t in thresholds] for p in patiences]
    drops = np.array([[cell.drop for cell in row] for row in cells])
    speeds = np.array([[cell.speedup for cell in row] for row in cells])
    figure = _figure(1.6 + 0.56 * len(patiences))
    top, bottom = figure.subplots(2, 1, sharex=True)
    most = min(_MOST_DROP, max(0.1, float(np.abs(drops).max())))
    name = f"drop of {report.metric}, points"
    # Darker is worse in both: slow, or far below full depth.
    _heat(top, drops, "PuOr_r", (-most, most), "{:+.1f}", name)
    _heat(bottom, speeds, "cividis", (1.0, float(speeds.max())), "{:.2f}", "estimated speed-up")
    for axes in (top, bottom):
        axes.set_yticks(range(len(patiences)), [str(patience) for patience in patiences])
        axes.set_ylabel("patience")
    bottom.set_xticks(range(len(thresholds)), [f"{t:.3g}" for t in thresholds])
    bottom.set_xlabel(f"threshold of {report.measure.value}: to the right, more rows stop early")
    return figure


def _heat(
    axes: Axes,
    values: np.ndarray[Any, np.dtype[np.float64]],
    colours: str,
    limits: tuple[float, float],
    form: str,
    title: str,
) -> None:
    low, high = limits
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
    axes.grid(visible=False)
    axes.set_title(title)
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(value))
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        axes.text(
            column,
            row,
            form.format(value),
            ha="center",
            va="center",
            fontsize=8,
            color="black" if bright else "white",
        )


def _segments(report: Report) -> Figure:
    """Milliseconds of each segment at the middle length."""
    costs, layers = report.result.costs, report.result.layers
    figure = _figure(2.9)
    panels = figure.subplots(1, len(costs), squeeze=False).ravel()
    for axes, model in zip(panels, costs, strict=True):
        middle = len(model.lengths) // 2
        times = 1e3 * np.array(model.seconds)[:, middle]
        bars = axes.bar(layers, times, color=_BLUE, width=0.7)
        title = f"batch {model.batch}, {model.lengths[middle]} tokens"
        if model.head_shares:
            heads = times * np.array(model.head_shares)
            axes.bar(layers, heads, color=_ORANGE, width=0.7)
            labels = [f"{100 * share:.1f} %" for share in model.head_shares]
            axes.bar_label(bars, labels, fontsize=7)
            title += "; above: share of the head (orange)"
        axes.set_title(title)
        axes.set_xticks(layers)
        axes.set_xlabel("layer of the exit at the segment's end")
        axes.set_ylabel("milliseconds a row")
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
    return figure
