"""The results of a search for operating points: a table with sentences, and JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from ..calibration.ranking import RankingPoint
from ..calibration.report.words import (
    exit_0_in_words,
    passes_in_words,
    promise_in_words,
    share_interval_in_words,
    tested_in_words,
)
from ..calibration.result import Calibration, Outcome, Point
from ..calibration.scoring import AGREEMENT, exits_of_rows
from ..runtime.artifact.operating_point import Certificate, Goal
from ..runtime.rules.words import rule_in_words
from .console import echo, echo_cells, echo_wrapped

AnyResult = TypeVar("AnyResult", bound=Calibration | RankingPoint)
"""The operating points of a target."""


class Shown(ABC, Generic[AnyResult]):
    """How the results of a kind of model are shown.

    Attributes:
        results: the field of a `Conversion` that has them.
        unit: what promises are about.
        agreement: how the exits agree with the model that was converted, with a place for numbers.
        widths: of the figures in the table.
    """

    results: ClassVar[str]
    unit: ClassVar[str]
    agreement: ClassVar[str]
    widths: ClassVar[tuple[int, ...]]

    def show(self, results: Sequence[AnyResult], default_target: str | None = None) -> None:
        """Print a table of all operating points, and sentences about each; it fits 80 columns.

        Args:
            results: one for each target.
            default_target: the target to name as the default; None: none of them.
        """
        for line in self._introduction(results):
            echo(line)
        echo("")
        self._show_heads(results)
        for result in results:
            for point in result.points:
                cells = self._cells(result, point)
                echo_cells(_name(result, point, default_target), cells, self.widths)
        for paragraph in self._paragraphs(results, default_target):
            echo("")
            for line in paragraph:
                echo_wrapped(line)

    @abstractmethod
    def to_dict(self, result: AnyResult) -> dict[str, Any]:
        """A result for JSON."""

    def _introduction(self, results: Sequence[AnyResult]) -> list[str]:
        """The lines before the table."""
        return []

    @abstractmethod
    def _show_heads(self, results: Sequence[AnyResult]) -> None:
        """Print the heads of the table."""

    @abstractmethod
    def _cells(self, result: AnyResult, point: Any) -> tuple[str, ...]:
        """The figures of a point."""

    @abstractmethod
    def _paragraphs(
        self, results: Sequence[AnyResult], default_target: str | None
    ) -> Iterator[list[str]]:
        """The sentences after the table, with an empty line before each list of them."""


class _Texts(Shown[Calibration]):
    """Texts that get labels."""

    results = "targets"
    unit = "texts"
    agreement = "exits agree with the classifier on {} %"
    widths = (9, 12, 6, 8)

    def to_dict(self, result: Calibration) -> dict[str, Any]:
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
            | _quick_pass(point)
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

    def _introduction(self, results: Sequence[Calibration]) -> list[str]:
        return [
            f"{result.target}: {len(result.rows):,} rows, {result.depth} layers, "
            f"{result.points[0].held_out.metric} {result.full_depth_score:.4f} at full depth"
            for result in results
        ]

    def _show_heads(self, results: Sequence[Calibration]) -> None:
        what = "flags" if results[0].rows.decides_by_flags else "answers"
        is_agreement = _is_agreement(results[0].points[0])
        show_heads_of_texts((what, "changed") if is_agreement else ("points", "lost"))

    def _cells(self, result: Calibration, point: Point) -> tuple[str, ...]:
        single, *_, file = [f"{ratio:.1f}" for ratio in (*point.measured.values(),) * 2]
        lost = "unknown"
        if result.is_judged(point):
            held = point.held_out
            changed = f"{100 * (1 - held.score):.2f} %"
            lost = changed if _is_agreement(point) else f"{held.drop:+.2f}"
        return _cost(point), single, file, lost

    def _paragraphs(
        self, results: Sequence[Calibration], default_target: str | None
    ) -> Iterator[list[str]]:
        for result in results:
            lines = []
            for point in result.points:
                parts = [promise_in_words(point, result)]
                if isinstance(point.goal, Goal):
                    parts.append(f"goal: {point.goal}")
                if not point.refusal:
                    parts.append(rule_in_words(point.rule))
                parts += _passes(point, result.target, "texts")
                lines.append(f"{_name(result, point, default_target)}: {'; '.join(parts)}")
            for number in exits_of_rows(result.rows).before_layers:
                default = [point for point in result.points if point.name == result.default]
                shown = next(iter(default), result.points[0])
                lines.append(f"exit {number} answers at {shown.name}: {exit_0_in_words(shown)}")
            yield [*lines, *(f"warning: {warning}" for warning in result.warnings)]


class _Queries(Shown[RankingPoint]):
    """Queries whose documents are put in order."""

    results = "rankings"
    unit = "queries"
    agreement = "rank correlation of the exits with the reranker: {} %"
    widths = (10, 9, 11, 13)

    def to_dict(self, result: RankingPoint) -> dict[str, Any]:
        return {
            "target": result.target,
            "name": result.name,
            "top": result.top,
            "rule": result.rule.to_dict(),
            "layers": result.layers,
            "chosen_on": _counts(result.chosen_on),
            "held_out": _counts(result.held_out),
            "without_scores": _counts(result.without_scores),
            "batches": {str(size): _counts(each) for size, each in result.batches.items()},
            "times": result.times,
            "certificate": result.certificate,
            "promise": _promise(result),
        } | _quick_pass(result)

    def _show_heads(self, results: Sequence[RankingPoint]) -> None:
        show_heads_of_queries(results[0].times.documents, results[0].top)

    def _cells(self, result: RankingPoint, point: RankingPoint) -> tuple[str, ...]:
        held = point.held_out
        return (
            _cost(point),
            f"{point.times.milliseconds:.1f}",
            f"{point.times.times_faster:.1f}",
            f"{held.changed_answers} of {held.rows:,}",
        )

    def _paragraphs(
        self, results: Sequence[RankingPoint], default_target: str | None
    ) -> Iterator[list[str]]:
        lines = [
            "; ".join(
                [
                    f"{_name(each, each, default_target)}: {_promise(each)}",
                    *_passes(each, each.target, "documents"),
                ]
            )
            for each in results
        ]
        default = next(each for each in results if each.target == default_target)
        if default.rule.exit_0_threshold is not None:
            left, *_ = default.held_out.exits
            share = left / max(1, sum(default.held_out.exits))
            lines.append(
                f"by their scores, {100 * share:.1f} % of the documents of these queries leave "
                "before layer 1; the promise also holds without scores"
            )
        in_batches = [
            f"{each.mean_depth:.2f} in batches of {size}" for size, each in default.batches.items()
        ]
        if in_batches:
            lines.append(
                "a packed file compares documents within a batch: layers per document of queries "
                f"that decided nothing are {default.without_scores.mean_depth:.2f} in batches of "
                f"whole queries, {' and '.join(in_batches)}"
            )
        yield lines


KINDS: dict[str, Shown[Any]] = {"predict": _Texts(), "rank": _Queries()}
"""How results are shown, by the method of `Engine` that asks the model."""


def show_heads_of_texts(lost: tuple[str, str]) -> None:
    """Print the heads of the table of a classifier.

    Args:
        lost: the two words over the last column, such as `answers` and `changed`.
    """
    # One of these spans two columns.
    for heads in (("layers or", "times faster than", ""), ("time per", "all layers", lost[0])):
        echo_cells("", heads, (9, 19, 8))
    heads_of_figures = ("text", "single text", "file", lost[1])
    echo_cells("target and operating point", heads_of_figures, _Texts.widths)


def show_heads_of_queries(documents: int, top: int) -> None:
    """Print the heads of the table of a reranker.

    Args:
        documents: how many documents the timed queries have.
        top: how many of them are wanted.
    """
    for name, cells in (
        ("", ("layers or", "", "times", "")),
        ("", ("time per", f"ms for {documents}", "faster than", "queries with")),
        (
            "target and operating point",
            ("document", "documents", "all layers", f"other top {top}"),
        ),
    ):
        echo_cells(name, cells, _Queries.widths)


def _quick_pass(point: Point) -> dict[str, Any]:
    """The fields of JSON for a quick pass, if the point has one."""
    costs = point.quick_costs
    if costs is None:
        return {}
    return {"quick_target": point.quick_target, **costs._asdict()}


def _passes(point: Point, target: str, items: str) -> list[str]:
    """The sentence on a quick pass and its costs, if the point has one."""
    costs = point.quick_costs
    if costs is None:
        return []
    return [passes_in_words(costs, point.quick_target, target, items)]


def _cost(point: Point) -> str:
    """Layers per text or document; where there are two passes, the share of the time instead."""
    costs = point.quick_costs
    if costs is None or costs.time_share is None:
        return f"{point.chosen_on.mean_depth:.2f}"
    return f"{100 * costs.time_share:.0f} % time"


def ranking_in_words(certificate: Certificate, top: object) -> str:
    """The guarantee for rankings in words.

    Args:
        certificate: that of an operating point.
        top: how many documents are wanted.
    """
    (promise,) = certificate.promises
    most = f"at most {promise.at_most:g} % of new queries have another top {top}"
    return f"{most}, with {certificate.confidence:.4g} % confidence"


def _name(result: Calibration | RankingPoint, point: Point, default_target: str | None) -> str:
    """A target and an operating point; default is what runs if neither is named."""
    is_default = point.name == result.default and default_target in (None, result.target)
    return f"{result.target} {point.name}{' (default)' * is_default}"


def _is_agreement(point: Point) -> bool:
    return point.held_out.metric == AGREEMENT


def _counts(outcome: Outcome) -> dict[str, Any]:
    """The counts of a rule on queries, for JSON."""
    return {
        "queries": outcome.rows,
        "changed": outcome.changed_answers,
        "changed_at_full_depth": round(outcome.rows * (1 - outcome.full_depth_score)),
        "mean_depth": outcome.mean_depth,
        "exits": outcome.exits,
    }


def _promise(point: RankingPoint) -> str:
    """The promise of a point, or why it has none, and its result on other queries."""
    if point.certificate is None:
        return f"No guarantee: every document runs through all layers, since {point.refusal}"
    held = point.held_out
    interval = share_interval_in_words(held.changed_answers, held.rows, point.certificate)
    promised = ranking_in_words(point.certificate, point.top)
    tested = tested_in_words(point.certificate, point.chosen_on.rows, "queries")
    judged = f"of those that decided nothing, {held.changed_answers} of {held.rows:,} have one"
    return f"{promised}, {tested}; {judged} {interval}"
