"""How far two sets of logits of the same rows agree: values, labels and exits. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .artifact.manifest import ProblemType, Task
from .rules.measures import Answers, Outputs
from .rules.rules import ExitRule
from .rules.runner import simulate

# What a target in another precision than fp32 must reach: labels, exits. int8 is another
# model rather than another rounding: its thresholds are to be calibrated for it.
_BARS = {"fp32": (0.999, 0.99), "fp16": (0.999, 0.99), "bf16": (0.999, 0.99), "int8": (0.99, 0.9)}

TIES = {"fp32": 1e-3, "fp16": 0.01, "bf16": 0.08, "int8": 0.25}
"""By precision, how close two logits are to be a tie that rounding may break either way."""


@dataclass(frozen=True)
class Agreement:
    """How a target in some precision agrees with the fp32 model.

    Attributes:
        rows: how many rows were compared.
        difference: largest absolute difference of a logit; NaN if one is not a number.
        labels: share of (exit, row) with the same labels, near ties left out.
        exits: share of rows with the same exit, near ties left out.
        near_ties: rows that were left out of either share.
        bars: what the two shares must reach.
        first_bad: the first exit whose logits are not numbers or whose labels differ, from 1;
            None if there is none.
    """

    rows: int
    difference: float
    labels: float
    exits: float
    near_ties: int
    bars: tuple[float, float]
    first_bad: int | None

    @property
    def passed(self) -> bool:
        """Whether labels and exits reach their bars."""
        return (
            bool(np.isfinite(self.difference))
            and self.labels >= self.bars[0]
            and self.exits >= self.bars[1]
        )

    def __str__(self) -> str:
        return (
            f"logits differ by {self.difference:.2e}, labels agree for {self.labels:.2%} "
            f"(bar {self.bars[0]:.1%}), exits for {self.exits:.2%} (bar {self.bars[1]:.0%})"
        )


def agree(
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    rule: ExitRule,
    task: Task,
    precision: str,
) -> Agreement:
    """Compare a target with the fp32 model.

    Args:
        found: `[exits, rows, labels]` of the target.
        expected: the same of the model.
        rule: whose exits are compared.
        task: what the labels are, and the cuts they are decided by.
        precision: of the target; says what is a tie.
    """
    tie = TIES[precision]
    finite = np.isfinite(found)
    logits = np.where(finite, found, 0.0).astype(np.float32)
    ties = near_ties(expected, task, tie)
    same = answers(logits, task) == answers(expected, task)
    same = (same if same.ndim == 2 else same.all(axis=-1)) & finite.all(axis=-1)
    exits, unsure = exit_agreement(logits, expected, rule, task, tie)
    exits &= finite.all(axis=(0, 2))
    wrong = (~finite.all(axis=-1) | (~same & ~ties)).any(axis=1)
    counted = ~ties | ~finite.all(axis=-1)
    return Agreement(
        rows=found.shape[1],
        difference=float(largest(found, expected).max()),
        labels=float(same[counted].mean()) if counted.any() else 1.0,
        exits=float(exits[~unsure].mean()) if (~unsure).any() else 1.0,
        near_ties=int((ties.any(axis=0) | unsure).sum()),
        bars=_BARS[precision],
        first_bad=int(np.argmax(wrong)) + 1 if wrong.any() else None,
    )


def largest(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest absolute difference at each exit; NaN where one is not a number."""
    return np.asarray(np.abs(found - expected).max(axis=(1, 2), initial=0.0))


def answers(logits: NDArray[np.float32], task: Task) -> Answers:
    """Predicted labels: `[exits, rows]`, or `[exits, rows, labels]`."""
    return np.stack([Outputs(z, task.problem_type, task.label_thresholds).answers for z in logits])


def near_ties(logits: NDArray[np.float32], task: Task, tolerance: float) -> NDArray[np.bool_]:
    """`[exits, rows]`: where a difference within tolerance can change the labels."""
    if task.problem_type is ProblemType.MULTI_LABEL:
        margins = np.abs(logits - _cut_logits(task))
        return np.asarray((margins <= tolerance).any(axis=-1))
    if logits.shape[-1] == 1:
        return np.asarray((np.abs(logits) <= tolerance).any(axis=-1))
    top = np.sort(logits, axis=-1)
    return np.asarray(top[..., -1] - top[..., -2] <= 2 * tolerance)


def exit_agreement(
    found: NDArray[np.float32],
    expected: NDArray[np.float32],
    rule: ExitRule,
    task: Task,
    tolerance: float,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows with the same exit, and rows whose exit is too close to call."""
    one, two = (
        simulate(logits, rule, task.problem_type, label_thresholds=task.label_thresholds)
        for logits in (found, expected)
    )
    # A score moves by at most a few times what the logits move.
    low, high = (
        simulate(
            expected, rule.shifted(by), task.problem_type, label_thresholds=task.label_thresholds
        ).exits
        for by in (-10 * tolerance, 10 * tolerance)
    )
    unsure = np.not_equal(low, high)
    if rule.uses_labels:
        unsure |= near_ties(expected, task, tolerance).any(axis=0)
    return np.equal(one.exits, two.exits), np.asarray(unsure)


def _cut_logits(task: Task) -> NDArray[np.float64]:
    """`[labels]` where each label is decided: the logits of the cuts."""
    label_thresholds = np.asarray(task.label_thresholds or 0.5, np.float64)
    with np.errstate(divide="ignore"):  # a cut of 0 or 1 is never near
        return np.asarray(np.log(label_thresholds) - np.log1p(-label_thresholds))
