"""Refuse what cannot be calibrated, before the model runs."""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.engine import Engine
from ..runtime.errors import InputError
from ..runtime.files import Row
from .goals import CalibrationOptions
from .risk import RiskOf
from .scoring import AGREEMENT, METRICS, ROW_MEANS
from .trace import expected_labels

LEAST_ROWS = 50
"""The least number of rows that is accepted."""


def check_request(
    engine: Engine,
    options: CalibrationOptions,
    metric: str,
    rows: Sequence[Row],
    test: Sequence[Row],
) -> list[str]:
    """Refuse, before the model runs, what cannot be calibrated.

    Returns:
        Warnings about the rows.

    Raises:
        InputError: the options do not fit the model, or the rows cannot be used.
    """
    problem_type = engine.manifest.task.problem_type
    known = (AGREEMENT,) if options.unlabelled else METRICS[problem_type]
    if metric not in known:
        what = "rows without labels" if options.unlabelled else problem_type.value
        raise InputError(
            f"there is no metric {metric!r} for {what}", f"choose from {', '.join(known)}"
        )
    bounds_drop = options.bound is not None and options.bound.risk_of is RiskOf.DROP
    if bounds_drop and metric not in ROW_MEANS:
        raise InputError(
            f"{metric} is not a mean over rows, so the risk of its drop cannot be bounded",
            "use `metric` accuracy (exact_match for multi-label), or `risk_of` disagreement",
        )
    texts = {row.content for row in rows}
    if len(texts) < LEAST_ROWS:
        raise InputError(
            f"{len(texts)} different texts are too few to choose on one part and judge on another",
            f"give at least {LEAST_ROWS}; about 750 are needed to confirm a drop of half a point",
        )
    if not options.unlabelled:
        expected_labels(test, engine.manifest.task)
    both = [row for row in test if row.content in texts]
    if not both:
        return []
    return [
        f"{len(both)} of {len(test)} test texts are also among the rows that choose (the first is "
        f"{both[0].where}), so their figures look better than those of new rows"
    ]
