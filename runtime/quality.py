"""The quality of predictions: metrics against true labels, in numpy alone.

For runs over labelled files, which have only the runtime, and for calibration and training.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Labels = NDArray[np.int64]


def evaluate(predicted: Labels, expected: Labels, labels: int) -> dict[str, float]:
    """All scores of a set of predictions, each from 0 to 1 (`matthews` from -1).

    Args:
        predicted: `[rows]` class indices, or `[rows, labels]` of 0 and 1.
        expected: the true labels in the same form.
        labels: number of labels of the model.

    Returns:
        Single-label: `accuracy`, `macro_f1` (over labels that occur), `matthews`.
        Multi-label: `exact_match`, `micro_f1`, `macro_f1`.
    """
    if predicted.ndim == 2:
        hits = (predicted & expected).sum(axis=0)
        total = predicted.sum(axis=0) + expected.sum(axis=0)
        return {
            "exact_match": float((predicted == expected).all(axis=1).mean()),
            "micro_f1": float(f1(hits.sum(), total.sum())),
            "macro_f1": float(f1(hits, total).mean()),
        }
    hits = np.bincount(expected[predicted == expected], minlength=labels)
    predictions = np.bincount(predicted, minlength=labels)
    truth = np.bincount(expected, minlength=labels)
    rows = len(expected)
    return {
        "accuracy": float(hits.sum() / max(1, rows)),
        "macro_f1": float(f1(hits, predictions + truth)[predictions + truth > 0].mean()),
        "matthews": float(matthews(hits, predictions, truth, rows)),
    }


def f1(hits: ArrayLike, total: ArrayLike) -> NDArray[np.float64]:
    """F1 = 2 TP / (2 TP + FP + FN), and 0 for a label that never occurs.

    Args:
        hits: `[...]` rows that have the label and are predicted to have it.
        total: `[...]` rows that have the label, plus rows that are predicted to have it.
    """
    return np.asarray(np.multiply(2.0, hits) / np.maximum(total, 1))


def matthews(
    hits: ArrayLike, predictions: ArrayLike, truth: ArrayLike, rows: float
) -> NDArray[np.float64]:
    """Matthews correlation for any number of classes (Gorodkin 2004, R_K); 0 if undefined.

    Args:
        hits: `[..., labels]` rows that have the label and are predicted to have it.
        predictions: `[..., labels]` rows that are predicted to have the label.
        truth: `[..., labels]` rows that have the label.
        rows: how many rows there are.
    """
    hits = np.asarray(hits, np.float64)
    predictions = np.asarray(predictions, np.float64)
    truth = np.asarray(truth, np.float64)
    squared = float(rows) ** 2
    covariance = hits.sum(axis=-1) * rows - (predictions * truth).sum(axis=-1)
    spread_of_truth = squared - np.square(truth).sum(axis=-1)
    spread = spread_of_truth * (squared - np.square(predictions).sum(axis=-1))
    is_defined = spread > 0
    correlation = covariance / np.sqrt(np.where(is_defined, spread, 1.0))
    return np.asarray(np.where(is_defined, correlation, 0.0))
