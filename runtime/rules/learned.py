"""The learned rule: an estimate of the probability that later exits will change the answer.

Calibration fits its weights. At run time it is a dot product of a few numbers that the other
rules use one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import RuleError
from .base import MOST_LABELS, ExitRule, ThresholdRule
from .measures import ARRAYS, FLOATS, MEASURES, Array, Measure, Outputs, RowOutputs, per_row

FEATURES = ("bias", "entropy", "confidence", "jskd", "jsd")
"""What the weights of an exit are for, in this order; `features` computes them."""

_COMPARED = (MEASURES[Measure.JSKD], MEASURES[Measure.JSD])


def features(earlier: Outputs | None, now: Outputs) -> Array:
    """The features of some rows at an exit, see `FEATURES`: `[rows, features]` float64.

    They are 1, the scores of the rules `entropy` and `confidence`, and the measures `jskd` and
    `jsd` to the previous exit. The first exit is compared with itself. For multi-label tasks,
    entropies and measures are summed over labels.

    Args:
        earlier: outputs of the previous exit; None if there is none.
        now: outputs of this exit.
    """
    q = now.distributions
    p = q if earlier is None else earlier.distributions
    compared = [per_row(measure(ARRAYS, p, q)) for measure in _COMPARED]
    ones = np.ones(len(q))
    return np.stack([ones, now.entropy(), now.confidence(), *compared], axis=-1)


@dataclass(frozen=True, kw_only=True)
class Learned(ThresholdRule):
    """The probability that later exits change the answer is below the threshold.

    It is a logistic regression on `features` and on the predicted labels. This rule is the
    project's own; learned exits are known from BERxiT (EACL 2021), which trains them with the
    model.

    Attributes:
        threshold: a probability; one for all exits, or one for each exit.
        weights: `len(FEATURES)` numbers for each exit from exit 1 but the last, one exit after
            another.
        label_weights: one number for each label, which is added where the label is predicted.
    """

    name: ClassVar[str] = "learned"
    uses_labels: ClassVar[bool] = True

    weights: tuple[float, ...]
    label_weights: tuple[float, ...]

    def check_exits(self, exits: range) -> None:
        """Check that the weights are for this number of exits, see `ExitRule`."""
        super().check_exits(exits)
        expected = (exits[-1] - 1) * len(FEATURES)
        if len(self.weights) != expected:
            raise RuleError(
                f"rule learned has {len(self.weights)} weights, but a model whose last "
                f"exit is exit {exits[-1]} needs {expected}",
                "calibrate the rule on this model",
            )

    def scores(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Array:
        """The probability that a later exit changes the answer; 0 at the last exit."""
        labels = now.logits.shape[-1]
        self._check_labels(labels)
        weights = self._weights_at(exit_number)
        if not weights:
            return np.zeros(len(now.logits))
        answers = now.answers
        if answers.ndim == 1:
            of_labels = np.take(self.label_weights, answers)
        else:
            of_labels = np.add.reduce(answers * self.label_weights, axis=-1)
        # No matrix products, because they round differently in batches of different sizes.
        odds = np.add.reduce(features(earlier, now) * weights, axis=-1) + of_labels
        return np.asarray(0.5 + 0.5 * np.tanh(0.5 * odds))

    def row_signal(
        self, exit_number: int, earlier: RowOutputs | None, now: RowOutputs
    ) -> bool | None:
        """Whether the probability is below the threshold; for one of up to 16 labels only."""
        weights, q = self._weights_at(exit_number), now.distributions
        if len(q) > 1 or len(now.logits) > MOST_LABELS or not weights:
            return None
        self._check_labels(len(now.logits))
        (now_q,) = q
        (now_p,) = q if earlier is None else earlier.distributions
        compared = [measure(FLOATS, now_p, now_q) for measure in _COMPARED]
        values = (1.0, FLOATS.cross_entropy(now_q, now_q), max(now_q), *compared)
        odds = sum([w * v for w, v in zip(weights, values, strict=True)])
        odds += self.label_weights[now.logits.index(max(now.logits))]
        return self._row_passes(exit_number, 0.5 + 0.5 * math.tanh(0.5 * odds))

    def shifted(self, by: float) -> ExitRule:
        """This rule with its threshold moved, see `ExitRule`.

        If every feature moves by 1, a score moves by at most a quarter of the sum of the absolute
        weights: a quarter is the steepest slope of the logistic function.
        """
        size = len(FEATURES)
        starts = range(0, len(self.weights), size)
        sums = [sum(map(abs, self.weights[start + 1 : start + size])) for start in starts]
        return super().shifted(by * max(1.0, 0.25 * max(sums, default=0.0)))

    def _weights_at(self, exit_number: int) -> tuple[float, ...]:
        start = (exit_number - 1) * len(FEATURES)
        return self.weights[start : start + len(FEATURES)]

    def _check_labels(self, labels: int) -> None:
        if len(self.label_weights) != labels:
            raise RuleError(
                f"rule learned has weights for {len(self.label_weights)} labels, but the model "
                f"has {labels}",
                "calibrate the rule on this model",
            )
