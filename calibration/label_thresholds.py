"""Per-label decision cuts of multi-label models: a label is predicted above its cut."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.artifact.manifest import ProblemType
from ..runtime.errors import InputError
from ..runtime.metrics import Labels, evaluate
from ..runtime.rules.measures import Array, Outputs
from .scoring import Rows

_CANDIDATES = np.round(np.arange(0.1, 0.901, 0.05), 2)
_ROUNDS = 3
_PARTS = 5


@dataclass(frozen=True)
class TunedLabelThresholds:
    """Decision cuts, and what they are worth on rows that did not choose them.

    Attributes:
        values: the threshold of each label; empty if 0.5 for all is at least as good there.
        metric: the score they were chosen by.
        before: the score at full depth with 0.5 for all.
        after: with tuned cuts, cross-fitted.
    """

    values: tuple[float, ...]
    metric: str
    before: float
    after: float

    def to_dict(self) -> dict[str, Any]:
        """As it is written in JSON output, where the thresholds are called cuts."""
        return {
            "cuts": self.values,
            "metric": self.metric,
            "before": self.before,
            "after": self.after,
        }


def check_label_thresholds(problem_type: ProblemType, labelled: bool) -> None:
    """Check that cuts can be tuned.

    Raises:
        InputError: the task is single-label, or the rows have no labels.
    """
    if problem_type is not ProblemType.MULTI_LABEL or not labelled:
        raise InputError(
            "cuts are for multi-label models with labelled rows",
            "leave out --tune-label-thresholds, or give labelled multi-label data",
        )


def tune_label_thresholds(rows: Rows, metric: str, seed: int = 0) -> TunedLabelThresholds:
    """Choose a cut for each label by the score at full depth.

    Args:
        rows: the rows, with labels.
        metric: `exact_match`, `micro_f1` or `macro_f1`.
        seed: of the parts for cross-fitting.

    Raises:
        InputError: the task is single-label, or the rows have no labels.
    """
    check_label_thresholds(rows.problem_type, rows.expected is not None)
    probabilities = Outputs(rows.logits[-1], rows.problem_type).probabilities
    expected = rows.expected
    assert expected is not None
    parts = np.random.default_rng(seed).permutation(np.arange(len(rows)) % _PARTS)
    predicted = np.empty_like(expected)
    for part in range(_PARTS):
        here = parts == part
        label_thresholds = _search(probabilities[~here], expected[~here], metric)
        predicted[here] = probabilities[here] > label_thresholds
    before = _score((probabilities > 0.5).astype(np.int64), expected, metric)
    after = _score(predicted, expected, metric)
    chosen = _search(probabilities, expected, metric) if after > before else ()
    return TunedLabelThresholds(tuple(float(cut) for cut in chosen), metric, before, after)


def with_label_thresholds(rows: Rows, label_thresholds: tuple[float, ...]) -> Rows:
    """The same rows under other cuts."""
    return dataclasses.replace(rows, label_thresholds=label_thresholds)


def _search(probabilities: Array, expected: Labels, metric: str) -> Array:
    """Label by label, and again: the cut with the best score; 0.5 unless another is better."""
    labels = expected.shape[1]
    label_thresholds = np.full(labels, 0.5)
    predicted = (probabilities > label_thresholds).astype(np.int64)
    best = _score(predicted, expected, metric)
    for _ in range(_ROUNDS):
        before = label_thresholds.copy()
        for label in range(labels):
            # From 0.5 outwards, so that ties stay close to it.
            for cut in sorted(_CANDIDATES, key=lambda value: abs(value - 0.5)):
                tried = predicted.copy()
                tried[:, label] = probabilities[:, label] > cut
                score = _score(tried, expected, metric)
                if score > best + 1e-12:
                    best, predicted, label_thresholds[label] = score, tried, cut
        if np.array_equal(before, label_thresholds):
            break
    return label_thresholds


def _score(predicted: Labels, expected: Labels, metric: str) -> float:
    return evaluate(predicted, expected, expected.shape[1])[metric]
