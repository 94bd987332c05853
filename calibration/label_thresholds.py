"""Tune the decision thresholds of a multi-label model: a label is predicted above its threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.artifact.manifest import ProblemType
from ..runtime.errors import InputError, Remedy
from ..runtime.metrics import Labels, evaluate
from ..runtime.rules.measures import Array, Outputs
from .scoring import LabelledLogits

# From 0.5 outwards, so that the threshold closest to 0.5 wins a tie.
_CANDIDATES = sorted(
    np.round(np.arange(0.1, 0.901, 0.05), 2), key=lambda threshold: abs(threshold - 0.5)
)
_ROUNDS = 3
_PARTS = 5


@dataclass(frozen=True)
class TunedLabelThresholds:
    """Decision thresholds, and what they give on rows that did not choose them.

    Attributes:
        values: the threshold of each label; empty if 0.5 for all labels is at least as good.
        metric: the metric they were chosen by.
        before: the metric at full depth with 0.5 for all labels.
        after: the metric with tuned thresholds, cross-fitted.
    """

    values: tuple[float, ...]
    metric: str
    before: float
    after: float

    def to_dict(self) -> dict[str, Any]:
        """The form in JSON output, where the thresholds are called cuts."""
        scores = {"metric": self.metric, "before": self.before, "after": self.after}
        return {"cuts": self.values, **scores}


def check_label_thresholds(problem_type: ProblemType, labelled: bool) -> None:
    """Check that label thresholds can be tuned.

    Raises:
        InputError: the task is single-label, or the labels of the rows are not known.
    """
    if problem_type is not ProblemType.MULTI_LABEL or not labelled:
        raise InputError(
            "label thresholds can only be tuned for a multi-label model on labelled rows",
            Remedy("leave out {tune_label_thresholds}, or give labelled multi-label data"),
        )


def tune_label_thresholds(rows: LabelledLogits, metric: str, seed: int = 0) -> TunedLabelThresholds:
    """Choose a threshold for each label by the metric at full depth.

    Args:
        rows: the rows, with labels.
        metric: `exact_match`, `micro_f1` or `macro_f1`.
        seed: deals the rows into parts for cross-fitting.

    Raises:
        InputError: the task is single-label, or the labels of the rows are not known.
    """
    check_label_thresholds(rows.problem_type, rows.expected is not None)
    probabilities = Outputs(rows.logits[-1], rows.problem_type).probabilities
    expected = rows.expected
    assert expected is not None
    parts = np.random.default_rng(seed).permutation(np.arange(len(rows)) % _PARTS)
    predicted = np.empty_like(expected)
    for part in range(_PARTS):
        here = parts == part
        thresholds = _search(probabilities[~here], expected[~here], metric)
        predicted[here] = probabilities[here] > thresholds
    before = _score((probabilities > 0.5).astype(np.int64), expected, metric)
    after = _score(predicted, expected, metric)
    chosen = _search(probabilities, expected, metric).tolist() if after > before else ()
    return TunedLabelThresholds(tuple(chosen), metric, before, after)


def _search(probabilities: Array, expected: Labels, metric: str) -> Array:
    """The thresholds with the best metric, found label by label in several rounds."""
    thresholds = np.full(expected.shape[1], 0.5)
    predicted = (probabilities > thresholds).astype(np.int64)
    best = _score(predicted, expected, metric)
    for _ in range(_ROUNDS):
        before = thresholds.copy()
        for label in range(len(thresholds)):
            for threshold in _CANDIDATES:
                tried = predicted.copy()
                tried[:, label] = probabilities[:, label] > threshold
                score = _score(tried, expected, metric)
                if score > best + 1e-12:
                    best, predicted, thresholds[label] = score, tried, threshold
        if np.array_equal(before, thresholds):
            break
    return thresholds


def _score(predicted: Labels, expected: Labels, metric: str) -> float:
    return evaluate(predicted, expected, expected.shape[1])[metric]
