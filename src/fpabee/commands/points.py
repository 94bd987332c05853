"""What a calibration found: as a table with sentences, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..calibration.report.words import exit_0_in_words, promise_in_words
from ..calibration.result import Calibration, Point
from ..calibration.scoring import AGREEMENT
from ..runtime.artifact.operating_point import Goal
from ..runtime.rules.words import rule_in_words
from .console import echo, echo_cells, echo_wrapped

# Of the figures in the table.
_WIDTHS = (8, 12, 6, 8)
# Of the heads above them, one of which spans two columns.
_HEAD_WIDTHS = (8, 19, 8)


def show(results: Sequence[Calibration], default_target: str | None = None) -> None:
    """Print a table of all operating points, and sentences about each, in lines of 80 columns.

    Args:
        results: one for each target.
        default_target: the target to name as the default; None: none of them.
    """
    for result in results:
        metric = result.points[0].held_out.metric
        echo(
            f"{result.target}: {len(result.rows):,} rows, {result.layers[-1]} layers, "
            f"{metric} {result.full_depth_score:.4f} at full depth"
        )
    echo("")
    first = results[0].points[0]
    is_agreement = first.held_out.metric == AGREEMENT
    what = "flags" if results[0].rows.decides_by_flags else "answers"
    show_heads((what, "changed") if is_agreement else ("points", "lost"))
    for result in results:
        for point in result.points:
            single, *_, file = [f"{ratio:.1f}" for ratio in (*point.measured.values(),) * 2]
            layers = f"{point.chosen_on.mean_depth:.2f}"
            loss = _lost(point, is_agreement) if result.is_judged(point) else "unknown"
            name = _name(point, result, default_target)
            echo_cells(name, (layers, single, file, loss), _WIDTHS)
    for result in results:
        echo("")
        for point in result.points:
            parts = [promise_in_words(point, result)]
            if isinstance(point.goal, Goal):
                parts.append(f"goal: {point.goal}")
            if not point.refusal:
                parts.append(rule_in_words(point.rule))
            echo_wrapped(f"{_name(point, result, default_target)}: {'; '.join(parts)}")
        if result.rows.first_exit == 0:
            default = [point for point in result.points if point.name == result.default]
            shown = next(iter(default), result.points[0])
            echo_wrapped(f"exit 0 answers at {shown.name}: {exit_0_in_words(shown)}")
        for warning in result.warnings:
            echo_wrapped(f"warning: {warning}")


def show_heads(lost: tuple[str, str]) -> None:
    """Print the heads of the table.

    Args:
        lost: the two words over the last column, such as `answers` and `changed`.
    """
    for heads in (("", "times faster than", ""), ("layers", "all layers", lost[0])):
        echo_cells("", heads, _HEAD_WIDTHS)
    echo_cells("target and operating point", ("per text", "single text", "file", lost[1]), _WIDTHS)


def to_dict(result: Calibration) -> dict[str, Any]:
    """The result for JSON."""
    points = [
        {
            "name": point.name,
            "goal": str(point.goal),
            "rule": point.rule.to_dict(),
            "chosen_on": point.chosen_on,
            "held_out": point.held_out,
            "measured_speedup": point.measured,
            "certificate": point.certificate,
            "promise": promise_in_words(point, result),
        }
        for point in result.points
    ]
    return {
        "target": result.target,
        "rows": len(result.rows),
        "held_out": result.held_out,
        "default": result.default,
        "points": points,
        "warnings": result.warnings,
    }


def _name(point: Point, result: Calibration, default_target: str | None) -> str:
    """A target and an operating point; default is what runs if neither is named."""
    is_default = point.name == result.default and default_target in (None, result.target)
    return f"{result.target} {point.name}{' (default)' * is_default}"


def _lost(point: Point, is_agreement: bool) -> str:
    """The drop in points; for agreement, the share of changed answers."""
    held = point.held_out
    return f"{100 * (1 - held.score):.2f} %" if is_agreement else f"{held.drop:+.2f}"
