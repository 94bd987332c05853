"""Fit the learned rule: which answers will a later exit change?

The weights come from a ridge logistic regression over all exits together. An exit's own deviation
from the common weights is penalized more, so that exits with few changed answers mostly use the
common weights. The target is agreement with the last exit, which needs no labels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.manifest import ProblemType
from ..runtime.optional_packages import require
from ..runtime.rules.learned import Learned, features
from ..runtime.rules.measures import Array, Mask, Outputs
from .scoring import LabelledLogits, same_answers

# The least number of answers that change, and of answers that do not.
_LEAST_CHANGES = 5
# More rows than this do not improve the weights, but take longer.
_MOST_ROWS = 3000
# How freely an exit may deviate from the common weights; 1 would be as freely as these vary.
_DEVIATION = 0.5


def fit_learned(rows: LabelledLogits) -> Learned | None:
    """The learned rule of some rows, with threshold 0.

    Args:
        rows: the rows; their labels are not used.

    Returns:
        The rule; None if fewer than 5 answers at early exits differ from the last answer, or fewer
        than 5 agree with it.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    require("calibrate")
    from sklearn.linear_model import LogisticRegression

    # Evenly spaced, since a file may be sorted.
    used = np.linspace(0, len(rows) - 1, min(len(rows), _MOST_ROWS)).round().astype(np.intp)
    rows = rows.take(used)
    changes = _changes(rows)
    if not _LEAST_CHANGES <= changes.sum() <= changes.size - _LEAST_CHANGES:
        return None
    inputs, predicted = _inputs(rows)
    exits, count, size = inputs.shape
    # The first feature is the constant 1 of the bias, which is not standardized.
    mean, scale = inputs.mean(axis=(0, 1)), np.maximum(inputs.std(axis=(0, 1)), 1e-6)
    mean[0], scale[0] = 0.0, 1.0
    standard = (inputs - mean) / scale
    own = np.zeros((exits, count, exits, size))
    for number in range(exits):
        own[number, :, number] = _DEVIATION * standard[number]
    design = np.concatenate(
        [standard[..., 1:], predicted, own.reshape(exits, count, -1)], axis=-1
    ).reshape(exits * count, -1)
    model = LogisticRegression(solver="newton-cholesky").fit(design, changes.ravel())
    found = model.coef_[0]
    common = np.concatenate([model.intercept_, found[: size - 1]])
    of_labels, own_found = np.split(found[size - 1 :], [predicted.shape[-1]])
    weights = (common + _DEVIATION * own_found.reshape(exits, size)) / scale
    weights[:, 0] -= weights[:, 1:] @ mean[1:]
    return Learned(
        threshold=0.0,
        weights=tuple(_rounded(weights.ravel())),
        label_weights=tuple(_rounded(of_labels)),
    )


def out_of_fold_scores(rows: LabelledLogits, parts: NDArray[np.intp]) -> Array | None:
    """The scores of rules that are fitted to the other parts of the rows.

    Args:
        rows: the rows.
        parts: `[rows]` the part of each row.

    Returns:
        The scores `[exits, rows]` from exit 1 on; None if the rows outside of a part have too few
        changed answers.
    """
    scores = np.zeros((rows.exits[-1], len(rows)))
    for part in np.unique(parts):
        rule = fit_learned(rows.take(np.flatnonzero(parts != part)))
        if rule is None:
            return None
        here = np.flatnonzero(parts == part)
        scores[:, here] = scores_of(rule, rows.take(here))
    return scores


def scores_of(rule: Learned, rows: LabelledLogits) -> Array:
    """The scores `[exits, rows]` of a learned rule, from exit 1 on."""
    pairs = _pairs(rows)
    return np.stack([rule.scores(number, *pair) for number, pair in enumerate(pairs, start=1)])


def _pairs(rows: LabelledLogits) -> list[tuple[Outputs | None, Outputs]]:
    """The outputs of each exit from exit 1 on, each after those of the exit before it."""
    found = [Outputs(z, rows.problem_type, rows.label_thresholds) for z in rows.logits]
    return list(zip([None, *found[:-1]], found, strict=True))[1 - rows.first_exit :]


def _inputs(rows: LabelledLogits) -> tuple[Array, Array]:
    """The features `[exits - 1, rows, FEATURES]` and the predicted labels `[.., rows, labels]`.

    They are those of the exits from exit 1 on, without the last one.
    """
    pairs = _pairs(rows)[:-1]
    found = [features(*pair) for pair in pairs]
    answers = np.stack([now.answers for _, now in pairs])
    single = rows.problem_type is ProblemType.SINGLE_LABEL
    predicted = np.eye(rows.logits.shape[2])[answers] if single else answers
    return np.stack(found), predicted.astype(np.float64)


def _changes(rows: LabelledLogits) -> Mask:
    """Whether the last exit gives another answer, from exit 1 on: `[exits - 1, rows]`."""
    answers = rows.answers()[1 - rows.first_exit :]
    return ~same_answers(answers[:-1], answers[-1], rows.problem_type)


def _rounded(values: Array) -> list[float]:
    """Six significant digits, as the manifest stores them."""
    return [float(f"{value:.6g}") for value in values]
