"""Tune the decision thresholds of a multi-label model: a label is predicted above its threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.metrics import Labels, evaluate
from ..runtime.rules.measures import Array, Outputs
from .families import PARTS, deal
from .scoring import LabelledLogits

# From 0.5 outwards, so that the threshold closest to 0.5 wins a tie.
_CANDIDATES = sorted(
    np.round(np.arange(0.1, 0.901, 0.05), 2), key=lambda threshold: abs(threshold - 0.5)
)
_ROUNDS = 3


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


def tune_label_thresholds(rows: LabelledLogits, metric: str, seed: int = 0) -> TunedLabelThresholds:
    """Choose a threshold for each label by the metric at full depth.

    Args:
        rows: the rows of a multi-label task, with labels.
        metric: `exact_match`, `micro_f1` or `macro_f1`.
        seed: deals the rows into parts for cross-fitting.
    """
    probabilities = Outputs(rows.logits[-1], rows.problem_type).probabilities
    expected = rows.expected
    assert expected is not None
    parts = deal(len(rows), seed)
    predicted = np.empty_like(expected)
    for part in range(PARTS):
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
