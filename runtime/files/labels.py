"""Labels of rows as numbers, and the metrics of predictions against them, in numpy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..artifact.manifest import ProblemType
from ..errors import RowError

Labels = NDArray[np.int64]


def encode_labels(
    rows: Sequence[Sequence[str]],
    names: Sequence[str],
    problem_type: ProblemType,
    places: Sequence[str] = (),
) -> Labels:
    """Convert label names to numbers.

    Args:
        rows: the label names of each row.
        names: all label names, in the order of the logits.
        problem_type: the task.
        places: how to refer to each row in messages; default: by its number.

    Returns:
        Single-label: `[rows]` indices. Multi-label: `[rows, labels]` of 0 and 1. Both int64.

    Raises:
        RowError: the model does not have a label, or a row of a single-label task does not
            have exactly one.
    """
    index = {name: number for number, name in enumerate(names)}
    encoded = np.zeros((len(rows), len(names)), np.int64)
    for number, row in enumerate(rows):
        place = places[number] if places else f"row {number + 1}"
        unknown = [name for name in row if name not in index]
        if unknown:
            raise RowError(
                f"{place} has label {unknown[0]!r}, which the model does not know",
                f"the model's labels are: {', '.join(names)}",
            )
        if problem_type is ProblemType.SINGLE_LABEL and len(row) != 1:
            raise RowError(
                f"{place} has {len(row)} labels, but the task is single-label",
                'give each row one "label"; several labels need a model that was trained and '
                "exported with `problem_type` multi_label_classification",
            )
        encoded[number, [index[name] for name in row]] = 1
    return encoded.argmax(axis=1) if problem_type is ProblemType.SINGLE_LABEL else encoded


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
    correct = expected[predicted == expected]
    hits, found, truth = (
        np.bincount(numbers, minlength=labels) for numbers in (correct, predicted, expected)
    )
    rows = len(expected)
    return {
        "accuracy": float(hits.sum() / max(1, rows)),
        "macro_f1": float(f1(hits, found + truth)[found + truth > 0].mean()),
        "matthews": float(matthews(hits, found, truth, rows)),
    }


def f1(hits: ArrayLike, total: ArrayLike) -> NDArray[np.float64]:
    """F1 = 2 TP / (2 TP + FP + FN), and 0 for a label that never occurs.

    Args:
        hits: `[...]` rows that have the label and are predicted to have it.
        total: `[...]` rows that have the label, plus rows that are predicted to have it.
    """
    return np.asarray(np.multiply(2.0, hits) / np.maximum(total, 1))


def matthews(
    hits: ArrayLike, found: ArrayLike, truth: ArrayLike, rows: float
) -> NDArray[np.float64]:
    """Matthews correlation for any number of classes (Gorodkin 2004, R_K); 0 if undefined.

    Args:
        hits: `[..., labels]` rows that have the label and are predicted to have it.
        found: `[..., labels]` rows that are predicted to have the label.
        truth: `[..., labels]` rows that have the label.
        rows: how many rows there are.
    """
    hits, found, truth = (np.asarray(counts, np.float64) for counts in (hits, found, truth))
    squared = float(rows) ** 2
    covariance = hits.sum(axis=-1) * rows - (found * truth).sum(axis=-1)
    spread = (squared - np.square(truth).sum(-1)) * (squared - np.square(found).sum(-1))
    defined = spread > 0
    return np.asarray(np.where(defined, covariance / np.sqrt(np.where(defined, spread, 1.0)), 0.0))
