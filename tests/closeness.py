"""The project's promises about logits and exits, which CONTRIBUTING.md states, as assertions.

Limits are those of `fpabee.runtime.check`, so that no test has a tolerance of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fpabee.runtime.artifact.manifest import Task
from fpabee.runtime.check import (
    BATCH_LIMIT,
    EXPORT_LIMIT,
    exits_near_ties,
    logit_differences,
    logit_sizes,
)
from fpabee.runtime.rules.rules import ExitRule
from fpabee.runtime.tasks import simulate, task_of

Mask = NDArray[np.bool_]


def assert_close(found: ArrayLike, expected: ArrayLike, limit: float = BATCH_LIMIT) -> None:
    """Logits `[..., labels]` of rows are those of the same rows in another batch of ONNX Runtime.

    NaN, as at exits that a row did not reach, must be in the same places.

    Args:
        found: the logits.
        expected: those of the other batch.
        limit: of `logit_differences`.
    """
    first = np.asarray(found, np.float32)
    second = np.asarray(expected, np.float32)
    assert first.shape == second.shape
    np.testing.assert_array_equal(np.isnan(first), np.isnan(second))
    apart = logit_differences(np.nan_to_num(first), np.nan_to_num(second))
    worst = apart.max(initial=0.0)
    assert worst <= limit, f"logits differ by {worst:.2e} of their size"


def assert_exported(found: ArrayLike, expected: ArrayLike) -> None:
    """Logits `[..., labels]` of an export are those of the PyTorch model.

    This is also how closely two ways to compute a model agree: two batches or two implementations
    in PyTorch, two batches in OpenVINO, or two libraries.
    """
    assert_close(found, expected, EXPORT_LIMIT)


def assert_probabilities(found: Sequence[float], expected: Any) -> None:
    """Probabilities are those of a `Prediction` for the same row in another batch.

    They move by at most half as much as the logits. Files hold six of their digits.
    """
    limit = BATCH_LIMIT * float(logit_sizes(np.array(expected.logits, np.float32))) / 2 + 1e-6
    np.testing.assert_allclose(found, expected.probabilities, rtol=0, atol=limit)


def exits_may_differ(
    logits: NDArray[np.float32], rule: ExitRule, task: Task, first_exit: int = 1
) -> Mask:
    """Rows `[rows]` whose exit may be another one in another batch.

    Args:
        logits: `[exits, rows, labels]` at full depth.
        rule: the rule.
        task: the task.
        first_exit: the exit of the first logits.
    """
    moved = BATCH_LIMIT * logit_sizes(logits)
    return exits_near_ties(logits, rule, task_of(task), moved, first_exit)


def labels_may_differ(logits: NDArray[np.float32], task: Task) -> Mask:
    """Where `[exits, rows]` the labels may be other ones in another batch."""
    return task_of(task).near_ties(logits, BATCH_LIMIT * logit_sizes(logits))


def assert_exits(
    found: ArrayLike,
    logits: NDArray[np.float32],
    rule: ExitRule,
    task: Task,
    first_exit: int = 1,
) -> None:
    """Exits `[rows]` are those of the same rows in another batch, except near ties.

    Args:
        found: the exits.
        logits: `[exits, rows, labels]` of the other batch at full depth.
        rule: the rule.
        task: the task.
        first_exit: the exit of the first logits.
    """
    thresholds = task.label_thresholds
    expected = simulate(logits, rule, task.problem_type, thresholds, first_exit).exits
    near = exits_may_differ(logits, rule, task, first_exit)
    assert near.mean() <= 0.1, "a test of near ties proves nothing"
    np.testing.assert_array_equal(np.asarray(found)[~near], expected[~near])
