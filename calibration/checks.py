"""Refuse what cannot be calibrated, before the model runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..runtime.artifact.manifest import ProblemType
from ..runtime.engine import Engine
from ..runtime.errors import InputError, Remedy
from ..runtime.files import Row
from .goals import CalibrationOptions
from .risk import RiskOf
from .scoring import AGREEMENT, METRICS, ROW_MEANS
from .trace import expected_labels

LEAST_ROWS = 50
"""The least number of rows that is accepted."""

# Share of the rows that have different texts, below which repeated texts are named.
_LEAST_DIFFERENT = 0.9


def check_request(
    engine: Engine,
    options: CalibrationOptions,
    metric: str,
    rows: Sequence[Row],
    test: Sequence[Row] | None,
) -> list[str]:
    """Refuse, before the model runs, what cannot be calibrated.

    Returns:
        Warnings about the rows.

    Raises:
        InputError: the options do not fit the model, or the rows cannot be used.
    """
    _check_options(engine, options, metric)
    task, labelled = engine.manifest.task, not options.unlabelled
    if len(rows) < LEAST_ROWS:
        raise InputError(
            f"{len(rows)} rows are too few to choose on one part and judge on another",
            f"give at least {LEAST_ROWS}; about 750 are needed to confirm a drop of half a point",
        )
    texts = len({row.content for row in rows})
    if texts == 1:
        raise InputError("all rows are the same text", "give different texts, as in real use")
    warnings = []
    if texts < _LEAST_DIFFERENT * len(rows):
        warnings.append(
            f"the {len(rows)} rows have only {texts} different texts, so the promises are too good "
            "unless texts repeat as often in real use"
        )
    if labelled:
        expected = expected_labels(rows, task)
        if len(np.unique(expected, axis=0)) < 2:
            raise InputError(
                "all rows have the same label, so a rule that always predicts it looks perfect",
                "give rows of every label, in the proportions of real use",
            )
        counts = expected.sum(axis=0) if expected.ndim > 1 else np.bincount(expected)
        missing = len(task.labels) - int(np.count_nonzero(counts))
        if missing:
            warnings.append(
                f"{missing} of {len(task.labels)} labels have no row, so the points promise "
                "nothing about them"
            )
    if test is not None:
        if labelled:
            expected_labels(test, task)
        warnings += _check_test(rows, test)
    return warnings


def _check_options(engine: Engine, options: CalibrationOptions, metric: str) -> None:
    """Refuse options that do not fit the model or the target."""
    task, labelled = engine.manifest.task, not options.unlabelled
    known = METRICS[task.problem_type]
    if metric not in known:
        raise InputError(
            f"metric {metric!r} does not exist for this task", f"choose from {', '.join(known)}"
        )
    if not labelled and metric != AGREEMENT:
        raise InputError(
            f"metric {metric} needs labels, but the rows are used without their labels",
            Remedy("leave out {metric} or {unlabelled}"),
        )
    if options.bound is not None:
        if not engine.manifest.targets[engine.target].row_invariant:
            raise InputError(
                f"on target {engine.target} the answer of a row depends on the other rows of its "
                "batch, so the risk of a row cannot be bounded",
                Remedy("choose another {target}, or give {max_drop} instead"),
            )
        if options.bound.risk_of is RiskOf.DROP and metric not in ROW_MEANS:
            raise InputError(
                f"{metric} is not a mean over rows, so the risk of its drop cannot be bounded",
                Remedy(
                    "use {metric} accuracy (exact_match for multi-label), or {risk_of} disagreement"
                ),
            )
    multi_label = task.problem_type is ProblemType.MULTI_LABEL
    if options.tune_label_thresholds and not (multi_label and labelled):
        raise InputError(
            "label thresholds can only be tuned for a multi-label model on labelled rows",
            Remedy("leave out {tune_label_thresholds}, or give labelled multi-label data"),
        )


def _check_test(rows: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """Refuse or name test rows that are among the rows that choose."""
    known = {row.content for row in rows}
    both = [row for row in test if row.content in known]
    if len(both) == len(test):
        raise InputError(
            "the test rows are among the rows that choose, so they would look better than new rows",
            Remedy("give {test} other rows, or leave it out"),
        )
    if not both:
        return []
    return [
        f"{len(both)} of {len(test)} test texts are also among the rows that choose (the first is "
        f"{both[0].place}), so their figures look better than those of new rows"
    ]
