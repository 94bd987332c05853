"""What was certified for a reranker: as a table with sentences, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..calibration.ranking import RankingPoint
from ..calibration.report.words import share_interval_in_words
from ..runtime.artifact.operating_point import Certificate
from .console import echo, echo_cells, echo_wrapped

# Of the figures in the table.
_WIDTHS = (10, 9, 11, 13)


def show(points: Sequence[RankingPoint], default_target: str) -> None:
    """Print a table of the operating points, and a sentence for each; it fits 80 columns.

    Args:
        points: one for each target, at least one.
        default_target: the target to name as the default.
    """
    first = points[0]
    echo("")
    show_heads(first.times.documents, first.top)
    for point in points:
        held = point.held_out
        layers = f"{point.chosen_on.mean_depth:.2f}"
        milliseconds = f"{point.times.milliseconds:.1f}"
        faster = f"{point.times.times_faster:.1f}"
        changed = f"{held.changed} of {held.queries:,}"
        echo_cells(_name(point, default_target), (layers, milliseconds, faster, changed), _WIDTHS)
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


def show_heads(documents: int, top: int) -> None:
    """Print the heads of the table.

    Args:
        documents: how many documents the timed queries have.
        top: how many of them are wanted.
    """
    for name, cells in (
        ("", ("", "", "times", "")),
        ("", ("layers per", f"ms for {documents}", "faster than", "queries with")),
        (
            "target and operating point",
            ("document", "documents", "all layers", f"other top {top}"),
        ),
    ):
        echo_cells(name, cells, _WIDTHS)


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
    held = point.held_out
    interval = share_interval_in_words(held.changed, held.queries, point.certificate)
    promised = certificate_in_words(point.certificate, point.top)
    rows = point.certificate.promises[0].rows
    tested = f"tested on {rows:,} of {point.chosen_on.queries:,} queries"
    judged = f"of those that decided nothing, {held.changed} of {held.queries:,} have one"
    return f"{promised}, {tested}; {judged} {interval}"


def certificate_in_words(certificate: Certificate, top: object) -> str:
    """What is guaranteed of rankings.

    Args:
        certificate: that of an operating point.
        top: how many documents are wanted.
    """
    (promise,) = certificate.promises
    most = f"at most {promise.at_most:g} % of new queries have another top {top}"
    return f"{most}, with {certificate.confidence:.4g} % confidence"
