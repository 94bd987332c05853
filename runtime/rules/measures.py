"""The outputs of an exit as distributions, and measures of how similar two exits are.

Logarithms are natural, and their arguments are at least 1e-12. Divergences are never negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import ProblemType

Floats = NDArray[np.floating[Any]]
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Integers = NDArray[np.int64]

TINY = 1e-12
"""The smallest argument of a logarithm."""


class _Arrays:
    """What the measures consist of, for arrays of distributions along the last axis."""

    def mean(self, p: Array, q: Array) -> Array:
        """The mean distribution."""
        return (p + q) / 2

    def cross_entropy(self, p: Array, q: Array) -> Array:
        """-sum p log q."""
        return -_sum(p * _log(q))

    def divergence(self, p: Array, q: Array) -> Array:
        """Sum p log(p/q), never negative."""
        return np.maximum(_sum(p * (_log(p) - _log(q))), 0.0)


ARRAYS = _Arrays()
"""For arrays `[..., outcomes]`."""


def _sum(values: Array) -> Array:
    # The ufunc itself: `values.sum` calls it through two Python functions.
    return np.asarray(np.add.reduce(values, axis=-1))


def _log(values: Array) -> Array:
    return np.log(np.maximum(values, TINY))


RowDistribution = tuple[float, ...]


class _Floats:
    """The same for one distribution as a tuple of floats, faster than numpy for a single row."""

    def mean(self, p: RowDistribution, q: RowDistribution) -> RowDistribution:
        return tuple([(a + b) / 2 for a, b in zip(p, q, strict=True)])

    def cross_entropy(self, p: RowDistribution, q: RowDistribution) -> float:
        return -sum([a * math.log(max(b, TINY)) for a, b in zip(p, q, strict=True)])

    def divergence(self, p: RowDistribution, q: RowDistribution) -> float:
        terms = [
            a * (math.log(max(a, TINY)) - math.log(max(b, TINY))) for a, b in zip(p, q, strict=True)
        ]
        return max(sum(terms), 0.0)


FLOATS = _Floats()
"""For tuples of floats."""


class Measure(str, Enum):
    """Similarity of the distributions p and q of two neighbouring exits (F-PABEE eq. 5-12).

    Measured in nats, where p belongs to the earlier exit. For multi-label tasks it is the measure
    of each label's binary distribution, summed over labels.
    """

    KD = "kd"
    """Cross-entropy -sum p log q."""
    REKD = "rekd"
    """Reversed cross-entropy -sum q log p."""
    SYMKD = "symkd"
    """kd + rekd."""
    JSKD = "jskd"
    """Entropy of the mean distribution m = (p+q)/2: small only if both agree and are confident."""
    KL = "kl"
    """Kullback-Leibler divergence sum p log(p/q)."""
    REKL = "rekl"
    """Reversed Kullback-Leibler divergence sum q log(q/p)."""
    SYMKL = "symkl"
    """kl + rekl."""
    JSD = "jsd"
    """Jensen-Shannon divergence (KL(p, m) + KL(q, m))/2: small also if both are uninformed."""


def _jensen_shannon(use: Any, p: Any, q: Any) -> Any:
    m = use.mean(p, q)
    return (use.divergence(p, m) + use.divergence(q, m)) / 2


def _mean_entropy(use: Any, p: Any, q: Any) -> Any:
    m = use.mean(p, q)
    return use.cross_entropy(m, m)


MEASURES: dict[Measure, Callable[[Any, Any, Any], Any]] = {
    Measure.KD: lambda use, p, q: use.cross_entropy(p, q),
    Measure.REKD: lambda use, p, q: use.cross_entropy(q, p),
    Measure.SYMKD: lambda use, p, q: use.cross_entropy(p, q) + use.cross_entropy(q, p),
    Measure.JSKD: _mean_entropy,
    Measure.KL: lambda use, p, q: use.divergence(p, q),
    Measure.REKL: lambda use, p, q: use.divergence(q, p),
    Measure.SYMKL: lambda use, p, q: use.divergence(p, q) + use.divergence(q, p),
    Measure.JSD: _jensen_shannon,
}
"""The formula of each measure: `MEASURES[measure](ARRAYS, p, q)`."""


class Outputs:
    """The outputs of one exit for some rows; everything but the logits is computed when needed.

    Args:
        logits: `[rows, labels]` of any floating-point type.
        problem_type: the type of the task.
        label_thresholds: for multi-label tasks, see `Task.label_thresholds`; empty means 0.5.

    Attributes:
        logits: `[rows, labels]` float64.
    """

    def __init__(
        self, logits: Floats, problem_type: ProblemType, label_thresholds: Sequence[float] = ()
    ) -> None:
        self.logits: Array = logits.astype(np.float64, copy=False)
        self._problem_type = problem_type
        self._label_thresholds = label_thresholds

    @cached_property
    def distributions(self) -> Array:
        """The softmax `[rows, labels]`, or for multi-label tasks `[rows, labels, 2]`; float64.

        The latter holds both outcomes of each label's binary distribution, so that the measures
        apply to every label.
        """
        z = self.logits
        if self._problem_type is ProblemType.SINGLE_LABEL:
            powers: Array = np.exp(z - np.maximum.reduce(z, axis=-1, keepdims=True))
            powers /= np.add.reduce(powers, axis=-1, keepdims=True)
            return powers
        # Both outcomes directly from the logit: 1 - p would lose the small one.
        small = np.exp(-np.abs(z))
        low, high = small / (1 + small), 1 / (1 + small)
        return np.stack([np.where(z >= 0, high, low), np.where(z >= 0, low, high)], axis=-1)

    @cached_property
    def answers(self) -> Integers:
        """Class indices `[rows]`, or for multi-label tasks `[rows, labels]` of 0 and 1; int64."""
        if self._problem_type is ProblemType.SINGLE_LABEL:
            return np.asarray(self.logits.argmax(axis=-1))
        thresholds = self._label_thresholds if len(self._label_thresholds) else 0.5
        return (self.probabilities > np.asarray(thresholds, np.float64)).astype(np.int64)

    @property
    def probabilities(self) -> Array:
        """The softmax, or for multi-label tasks the sigmoid of each logit: `[rows, labels]`."""
        single = self._problem_type is ProblemType.SINGLE_LABEL
        return self.distributions if single else self.distributions[..., 0]

    def take(self, rows: NDArray[np.intp] | Mask) -> Outputs:
        """The outputs of some of the rows, given by their numbers or as a mask."""
        taken = Outputs(self.logits[rows], self._problem_type, self._label_thresholds)
        for name in _COMPUTED & vars(self).keys():
            vars(taken)[name] = vars(self)[name][rows]
        return taken

    @staticmethod
    def join(parts: Sequence[Outputs]) -> Outputs:
        """The outputs of several groups of rows; at least one group."""
        first = parts[0]
        logits = np.concatenate([part.logits for part in parts])
        joined = Outputs(logits, first._problem_type, first._label_thresholds)
        for name in _COMPUTED.intersection(*(vars(part) for part in parts)):
            vars(joined)[name] = np.concatenate([vars(part)[name] for part in parts])
        return joined

    def entropy(self) -> Array:
        """Entropy `[rows]` in nats; for multi-label tasks the sum of the binary entropies."""
        return per_row(ARRAYS.cross_entropy(self.distributions, self.distributions))

    def normalised_entropy(self) -> Array:
        """Entropy `[rows]` over its largest value; for multi-label tasks the mean over labels."""
        outcomes = self.distributions.shape[-1]
        problems = 1 if self.distributions.ndim == 2 else self.distributions.shape[-2]
        return self.entropy() / (problems * math.log(max(2, outcomes)))

    def confidence(self) -> Array:
        """The largest probability `[rows]`; for multi-label tasks the smallest of all labels."""
        best = self.distributions.max(axis=-1)
        return np.asarray(best if best.ndim == 1 else best.min(axis=-1))

    def unchanged(self, earlier: Outputs) -> Mask:
        """Whether the answer is the same as at an earlier exit: `[rows]`."""
        same = self.answers == earlier.answers
        return np.asarray(same if same.ndim == 1 else same.all(axis=-1))


_COMPUTED = frozenset({"distributions", "answers"})


class RowOutputs:
    """The outputs of one exit for a single row, without numpy.

    Args:
        logits: one number for each label.
        problem_type: the type of the task.
    """

    def __init__(self, logits: Sequence[float], problem_type: ProblemType) -> None:
        self.logits = logits
        self._problem_type = problem_type

    @cached_property
    def distributions(self) -> list[RowDistribution]:
        """The softmax, or for multi-label tasks both outcomes of each label."""
        if self._problem_type is ProblemType.SINGLE_LABEL:
            top = max(self.logits)
            powers = [math.exp(z - top) for z in self.logits]
            total = sum(powers)
            return [tuple([power / total for power in powers])]
        both: list[RowDistribution] = []
        for z in self.logits:
            small = math.exp(-abs(z))
            low, high = small / (1 + small), 1 / (1 + small)
            both.append((high, low) if z >= 0 else (low, high))
        return both

    def confidence(self) -> float:
        """The largest probability; for multi-label tasks the smallest of all labels."""
        return min(map(max, self.distributions))


def per_row(values: Array) -> Array:
    """The sum over labels, if there is one value for each label."""
    return values if values.ndim == 1 else values.sum(axis=-1)
