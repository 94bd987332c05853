"""The page: one file with everything in it, no scripts, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ...runtime.artifact.manifest import ProblemType
from ..descriptions import drop_in_words, rule_in_words
from ..scoring import AGREEMENT
from .data import Record, Report, summary
from .plots import Picture
from .texts import Names, changed_by_stopping, ran_all_layers

_MOST_ROWS = 40
_MOST_CHARACTERS = 400
_MOST_LABELS = 40


def render(
    report: Report, content: dict[str, list[Record]], pictures: Mapping[str, Picture | None]
) -> str:
    """The page.

    Args:
        report: what it says.
        content: its tables, see `data.tables`.
        pictures: its figures by name.
    """
    environment = Environment(
        loader=PackageLoader(__name__.rpartition(".")[0], "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        picture=_data_uri,
        rule=rule_in_words,
        drop=drop_in_words,
        clip=_clip,
        names=_names,
        limited=lambda rows: rows[:_MOST_ROWS],
    )
    return environment.get_template("page.html").render(
        report=report,
        result=report.result,
        summary=summary(report),
        content=content,
        pictures=pictures,
        points=[_point(report, name) for name in (p.name for p in report.result.points)],
        contenders_wish=report.result.contenders_wish,
        multi_label=report.manifest.task.problem_type is ProblemType.MULTI_LABEL,
        agreement=report.metric == AGREEMENT,
        most_rows=_MOST_ROWS,
    )


def _point(report: Report, name: str) -> dict[str, Any]:
    """The rows that tell something about an operating point."""
    changed = changed_by_stopping(report.rows, name)
    right = [(row.right[row.exits[name] - 1], row.right[-1]) for row in changed]
    return {
        "name": name,
        "full": ran_all_layers(report.rows, name),
        "changed": changed,
        "lost": sum(last and not early for early, last in right),
        "won": sum(early and not last for early, last in right),
    }


def _data_uri(picture: Picture) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(picture.svg).decode()


def _clip(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:_MOST_CHARACTERS].rstrip()} … ({len(text):,} characters)"


def _names(names: Names | list[str]) -> str:
    """Labels as text; no label is a set too."""
    shown = ", ".join(name if len(name) <= 60 else name[:59] + "…" for name in names[:_MOST_LABELS])
    more = len(names) - _MOST_LABELS
    return (shown or "(none)") + (f", and {more} more" if more > 0 else "")
