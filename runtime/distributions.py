"""Distributions of an exit, and how similar those of two exits are.

Logarithms are natural, and their arguments are clamped at 1e-12; divergences are never
negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .manifest import ProblemType

Floats = NDArray[np.floating[Any]]
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Answers = NDArray[np.int64]

_TINY = 1e-12


def _log(values: Array) -> Array:
    return np.log(np.maximum(values, _TINY))


def _cross_entropy(p: Array, q: Array) -> Array:
    return np.asarray(-(p * _log(q)).sum(axis=-1))


def _divergence(p: Array, q: Array) -> Array:
    return np.asarray(np.maximum((p * (_log(p) - _log(q))).sum(axis=-1), 0.0))


def _jensen_shannon(p: Array, q: Array) -> Array:
    m = (p + q) / 2
    return (_divergence(p, m) + _divergence(q, m)) / 2


class Measure(str, Enum):
    """Similarity of the distributions p, q of two neighbouring exits (F-PABEE eq. 5-12)."""

    KD = "kd"
    """Cross-entropy -sum p log q."""
    REKD = "rekd"
    """Reversed cross-entropy -sum q log p."""
    SYMKD = "symkd"
    """kd + rekd."""
    JSKD = "jskd"
    """Entropy of the mean distribution: small only if both agree and are confident."""
    KL = "kl"
    """Kullback-Leibler divergence sum p log(p/q)."""
    REKL = "rekl"
    """Reversed Kullback-Leibler divergence."""
    SYMKL = "symkl"
    """kl + rekl."""
    JSD = "jsd"
    """Jensen-Shannon divergence: also small if both are equally uninformed."""


MEASURES: dict[Measure, Callable[[Array, Array], Array]] = {
    Measure.KD: _cross_entropy,
    Measure.REKD: lambda p, q: _cross_entropy(q, p),
    Measure.SYMKD: lambda p, q: _cross_entropy(p, q) + _cross_entropy(q, p),
    Measure.JSKD: lambda p, q: _cross_entropy((p + q) / 2, (p + q) / 2),
    Measure.KL: _divergence,
    Measure.REKL: lambda p, q: _divergence(q, p),
    Measure.SYMKL: lambda p, q: _divergence(p, q) + _divergence(q, p),
    Measure.JSD: _jensen_shannon,
}


@dataclass(frozen=True)
class Outputs:
    """What one exit says about some rows.

    Attributes:
        logits: `[rows, labels]` float64.
        distributions: `[rows, labels]` softmax, or `[rows, labels, 2]`: both outcomes of
            each label's binary problem, so that single-label measures apply per label.
        answers: `[rows]` class indices, or `[rows, labels]` of 0 and 1.
    """

    logits: Array
    distributions: Array
    answers: Answers

    @classmethod
    def of(cls, logits: Floats, problem_type: ProblemType, cuts: Sequence[float] = ()) -> Outputs:
        """Outputs of logits `[rows, labels]`; `cuts` are per-label decision probabilities."""
        z = logits.astype(np.float64)
        if problem_type is ProblemType.SINGLE_LABEL:
            powers = np.exp(z - z.max(axis=-1, keepdims=True))
            return cls(z, powers / powers.sum(axis=-1, keepdims=True), z.argmax(axis=-1))
        # Both outcomes directly from the logit: 1 - p would lose the small one.
        small = np.exp(-np.abs(z))
        low, high = small / (1 + small), 1 / (1 + small)
        positive = np.where(z >= 0, high, low)
        both = np.stack([positive, np.where(z >= 0, low, high)], axis=-1)
        cut = np.asarray(cuts, np.float64) if len(cuts) else 0.5
        return cls(z, both, (positive > cut).astype(np.int64))

    @property
    def probabilities(self) -> Array:
        """`[rows, labels]`: softmax, or the probability of each label."""
        return self.distributions if self.answers.ndim == 1 else self.distributions[..., 0]

    def take(self, rows: NDArray[np.intp]) -> Outputs:
        """The outputs of some of the rows."""
        return Outputs(self.logits[rows], self.distributions[rows], self.answers[rows])

    def entropy(self) -> Array:
        """Entropy `[rows]` in nats; multi-label: the sum of the binary entropies."""
        return per_row(_cross_entropy(self.distributions, self.distributions))

    def normalised_entropy(self) -> Array:
        """Entropy over its largest value, `[rows]`; multi-label: the mean over labels."""
        outcomes = self.distributions.shape[-1]
        problems = 1 if self.answers.ndim == 1 else self.distributions.shape[-2]
        return self.entropy() / (problems * math.log(max(2, outcomes)))

    def unchanged(self, earlier: Outputs) -> Mask:
        """Rows `[rows]` whose answer is that of the earlier exit."""
        same = self.answers == earlier.answers
        return np.asarray(same if same.ndim == 1 else same.all(axis=-1))


def per_row(values: Array) -> Array:
    """Sum over labels, if there is one value per label."""
    return values if values.ndim == 1 else values.sum(axis=-1)
