"""The page: one file that contains everything, without scripts, and fetches nothing."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ...runtime.artifact.manifest import ProblemType
from ..descriptions import drop_in_words, exit_0_in_words, promise_in_words, rule_in_words
from .data import Report, summary
from .texts import Names, changed_by_stopping

_MOST_ROWS = 40
_MOST_CHARACTERS = 400
_MOST_LABELS = 40


def render(report: Report, pictures: Mapping[str, bytes]) -> str:
    """The page.

    Args:
        report: what it says.
        pictures: its figures by name, as SVG.
    """
    environment = Environment(
        loader=PackageLoader(__name__.rpartition(".")[0], "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        rule=rule_in_words,
        drop=drop_in_words,
        exit_0=exit_0_in_words,
        promise=promise_in_words,
        clip=_clip,
        ratio=_ratio,
        names=_names,
    )
    return environment.get_template("page.html").render(
        report=report,
        result=report.result,
        layers=dict(zip(report.result.rows.exits, report.result.layers, strict=True)),
        summary=summary(report),
        pictures={name: _data_uri(svg) for name, svg in pictures.items()},
        points=[_point(report, point.name) for point in report.result.points],
        comparisons_goal=report.result.comparisons_goal,
        multi_label=report.manifest.task.problem_type is ProblemType.MULTI_LABEL,
        most_rows=_MOST_ROWS,
    )


def _point(report: Report, name: str) -> dict[str, Any]:
    """The answers that an operating point changes."""
    changed = changed_by_stopping(report.rows, name)
    gains = [row.gain(name) for row in changed]
    return {
        "name": name,
        "changed": changed,
        "lost": gains.count(-1),
        "gained": gains.count(1),
    }


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _clip(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:_MOST_CHARACTERS].rstrip()} … ({len(text):,} characters)"


def _ratio(value: float) -> str:
    """A ratio of layers, which has no limit if exit 0 answers every row."""
    return f"{value:.2f}x" if value < 1000 else "no layers"


def _names(names: Names | list[str]) -> str:
    """Labels as text; a row may have none."""
    shown = ", ".join(name if len(name) <= 60 else name[:59] + "…" for name in names[:_MOST_LABELS])
    more = len(names) - _MOST_LABELS
    return (shown or "(none)") + (f", and {more} more" if more > 0 else "")
