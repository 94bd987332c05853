"""What was certified for a reranker: as a table with sentences, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import set_cell_size

from ..calibration.guarantee import share_interval
from ..calibration.ranking import RankingPoint
from .console import echo, echo_wrapped


def show(points: Sequence[RankingPoint], default_target: str) -> None:
    """Print a table of the operating points, and a sentence for each; it fits 80 columns.

    Args:
        points: one for each target, at least one.
        default_target: the target to name as the default.
    """
    first = points[0]
    echo("")
    echo(_line("", "layers per", f"ms for {first.times.documents}", "times", "queries with"))
    other = f"other top {first.top}"
    echo(_line("target and operating point", "document", "documents", "faster", other))
    for point in points:
        held = point.held_out
        name = _name(point, default_target)
        layers = f"{point.chosen_on.mean_depth:.2f}"
        milliseconds = f"{point.times.milliseconds:.1f}"
        faster = f"{point.times.times_faster:.2f}"
        echo(_line(name, layers, milliseconds, faster, f"{held.changed} of {held.queries:,}"))
    echo("")
    for point in points:
        echo_wrapped(f"{_name(point, default_target)}: {_promise(point)}")
    default = next(point for point in points if point.target == default_target)
    if getattr(default.rule, "exit_0_threshold", None) is not None:
        held = default.held_out
        share = held.exits[0] / max(1, sum(held.exits))
        echo_wrapped(
            f"by their scores, {share:.1%} of the documents of these queries leave before layer 1; "
            "the promise also holds without scores"
        )
    in_batches = [
        f"{each.mean_depth:.2f} in batches of {size}" for size, each in default.batches.items()
    ]
    echo_wrapped(
        "a packed file compares documents within a batch: layers per document of queries that "
        f"decided nothing are {default.without_scores.mean_depth:.2f} in batches of whole queries, "
        f"{' and '.join(in_batches)}"
    )


def to_dict(point: RankingPoint) -> dict[str, Any]:
    """A point for JSON."""
    return {
        "target": point.target,
        "name": point.name,
        "top": point.top,
        "rule": point.rule.to_dict(),
        "layers": point.layers,
        "chosen_on": point.chosen_on,
        "held_out": point.held_out,
        "without_scores": point.without_scores,
        "batches": {str(size): each for size, each in point.batches.items()},
        "times": point.times,
        "certificate": point.certificate,
        "promise": _promise(point),
    }


def _name(point: RankingPoint, default_target: str) -> str:
    return f"{point.target} {point.name}{' (default)' * (point.target == default_target)}"


def _promise(point: RankingPoint) -> str:
    """What a point promises, or why it promises nothing, and how it did on other queries."""
    if point.certificate is None:
        return f"No guarantee: every document runs through all layers, since {point.refusal}"
    (promise,) = point.certificate.promises
    held = point.held_out
    low, high = share_interval(held.changed, held.queries)
    most = f"at most {promise.at_most:g} % of new queries have another top {point.top}"
    confidence = f"with {point.certificate.confidence:g} % confidence"
    tested = f"tested on {promise.rows:,} of {point.chosen_on.queries:,} queries"
    judged = f"of those that decided nothing, {held.changed} of {held.queries:,} have one"
    return f"{most}, {confidence}, {tested}; {judged} (95 %: {100 * low:.2f} to {100 * high:.2f} %)"


def _line(name: str, layers: str, milliseconds: str, faster: str, changed: str) -> str:
    """A line of the table, of 80 columns; a longer name loses its end."""
    left = set_cell_size(name, 38)
    return f"{left} {layers:>10} {milliseconds:>9} {faster:>6} {changed:>13}".rstrip()
