"""The outputs of an exit as distributions, and measures of how similar two exits are.

Logarithms are natural, and their arguments are at least 1e-12. Divergences are never negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import ProblemType
from ..errors import RuleError

Floats = NDArray[np.floating[Any]]
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Integers = NDArray[np.int64]

TINY = 1e-12
"""The smallest argument of a logarithm."""


def _sum(values: Array) -> Array:
    # The ufunc itself: `values.sum` calls it through two Python functions.
    sums: Array = np.add.reduce(values, axis=-1)
    return sums


def _log(values: Array) -> Array:
    return np.log(np.maximum(values, TINY))


def _cross_entropy(p: Array, q: Array) -> Array:
    """-sum p log q."""
    return -_sum(p * _log(q))


def _divergence(p: Array, q: Array) -> Array:
    """Sum p log(p/q), never negative."""
    return np.maximum(_sum(p * (_log(p) - _log(q))), 0.0)


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


def _mean_entropy(p: Array, q: Array) -> Array:
    m = (p + q) / 2
    return _cross_entropy(m, m)


def _jensen_shannon(p: Array, q: Array) -> Array:
    m = (p + q) / 2
    return (_divergence(p, m) + _divergence(q, m)) / 2


MEASURES: dict[Measure, Callable[[Array, Array], Array]] = {
    Measure.KD: _cross_entropy,
    Measure.REKD: lambda p, q: _cross_entropy(q, p),
    Measure.SYMKD: lambda p, q: _cross_entropy(p, q) + _cross_entropy(q, p),
    Measure.JSKD: _mean_entropy,
    Measure.KL: _divergence,
    Measure.REKL: lambda p, q: _divergence(q, p),
    Measure.SYMKL: lambda p, q: _divergence(p, q) + _divergence(q, p),
    Measure.JSD: _jensen_shannon,
}
"""The formula of each measure, for arrays `[..., outcomes]` of distributions p and q."""


class Outputs:
    """The outputs of one exit for some rows; everything but the logits is computed when needed.

    Args:
        logits: `[rows, labels]` of any floating-point type.
        problem_type: the type of the task.
        label_thresholds: for multi-label tasks, see `Task.label_thresholds`; empty means 0.5.

    Attributes:
        logits: `[rows, labels]` float64.
    """

    logits: Array
    # What makes outputs of the same kind, besides the logits.
    _settings: tuple[Any, ...] = ()

    def __new__(
        cls, logits: Floats, problem_type: ProblemType, label_thresholds: Sequence[float] = ()
    ) -> Outputs:
        """Outputs of the kind that goes with the type of the task."""
        return outputs_of(problem_type, label_thresholds)(logits)

    @staticmethod
    def _softmax(z: Array) -> Array:
        """The softmax along the last axis, without overflow."""
        powers: Array = np.exp(z - np.maximum.reduce(z, axis=-1, keepdims=True))
        powers /= np.add.reduce(powers, axis=-1, keepdims=True)
        return powers

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.logits, *self._settings

    @property
    def distributions(self) -> Array:
        """The softmax `[rows, labels]`, or for multi-label tasks `[rows, labels, 2]`; float64.

        The latter holds both outcomes of each label's binary distribution, so that the measures
        apply to every label. It is the softmax of the logit and 0.
        """
        raise NotImplementedError

    @property
    def probabilities(self) -> Array:
        """The softmax, or for multi-label tasks the sigmoid of each logit: `[rows, labels]`."""
        raise NotImplementedError

    @property
    def answers(self) -> Integers:
        """Class indices `[rows]`, or for multi-label tasks `[rows, labels]` of 0 and 1; int64."""
        raise NotImplementedError

    def decisions(self, label_thresholds: Sequence[float] = ()) -> Integers:
        """The decisions: the answers, or which labels are above thresholds.

        Args:
            label_thresholds: as in `margins`; empty: the answer is the decision.

        Returns:
            As `answers`, or with thresholds `[rows, labels]` of 0 and 1; int64.
        """
        if not label_thresholds:
            return self.answers
        return (self.margins(label_thresholds) > 0).astype(np.int64)

    def take(self, rows: NDArray[np.intp] | Mask) -> Outputs:
        """The outputs of some of the rows, given by their numbers or as a mask."""
        return type(self)(self.logits[rows], *self._settings)

    @staticmethod
    def join(parts: Sequence[Outputs]) -> Outputs:
        """The outputs of several groups of rows; at least one group."""
        logits = np.concatenate([part.logits for part in parts])
        return type(parts[0])(logits, *parts[0]._settings)

    def entropy(self) -> Array:
        """Entropy `[rows]` in nats; for multi-label tasks the sum of the binary entropies."""
        return per_row(_cross_entropy(self.distributions, self.distributions))

    def normalised_entropy(self) -> Array:
        """Entropy `[rows]` over its largest value; for multi-label tasks the mean over labels."""
        *labels, outcomes = self.distributions.shape[1:]
        return self.entropy() / (math.prod(labels) * math.log(max(2, outcomes)))

    def uncertainty(self, label_thresholds: Sequence[float] = ()) -> Array:
        """1 - max p, `[rows]`; for multi-label tasks the largest of all labels.

        It is the sum of the other probabilities, which stays exact where max p rounds to 1.

        Args:
            label_thresholds: if what has to be certain is which labels are above these
                probabilities: 1 - max(q, 1 - q) with q = sigmoid(margin), see `margins`; the
                largest of all labels.
        """
        if label_thresholds:
            margins = np.abs(self.margins(label_thresholds))
            small: Array = np.exp(-np.minimum.reduce(margins, axis=-1))
            return small / (1 + small)
        others = _sum(np.sort(self.distributions, axis=-1)[..., :-1])
        # With several distributions in a row, the least certain one counts.
        return others if others.ndim == 1 else np.maximum.reduce(others, axis=-1)

    def confidence(self) -> Array:
        """The largest probability `[rows]`; for multi-label tasks the smallest of all labels."""
        return 1 - self.uncertainty()

    def margins(self, label_thresholds: Sequence[float]) -> Array:
        """How far labels are from their thresholds, logit p - logit t: `[rows, labels]`, float64.

        A label is flagged where this is above 0. Nothing cancels if p is close to 1.

        Args:
            label_thresholds: `[labels]` probabilities, 1 for labels that decide nothing, which get
                minus infinity.

        Raises:
            RuleError: there is not one threshold for each label.
        """
        z = self.logits
        if len(label_thresholds) != z.shape[-1]:
            raise RuleError(
                f"there are {len(label_thresholds)} label thresholds, but {z.shape[-1]} labels",
                "give one for each label, 1 for labels that decide nothing",
            )
        margins = np.full(z.shape, -np.inf)
        for label, threshold in enumerate(label_thresholds):
            if threshold < 1:
                margins[:, label] = self.margin(label, threshold)
        return margins

    def margin(self, label: int, threshold: float) -> Array:
        """How far one label is from its threshold, see `margins`: `[rows]`."""
        raise NotImplementedError

    def unchanged(self, earlier: Outputs) -> Mask:
        """Whether the answer is the same as at an earlier exit: `[rows]`."""
        raise NotImplementedError


class Softmax(Outputs):
    """One distribution over all labels; the most probable label is the answer.

    Like `Sigmoid`, it is made in `__new__` alone, because `Outputs` has one.

    Args:
        logits: `[rows, labels]` of any floating-point type.
        label_thresholds: not used, because no label is predicted by itself.
    """

    def __new__(cls, logits: Floats, label_thresholds: Sequence[float] = ()) -> Softmax:
        """Keep the logits."""
        self = object.__new__(cls)
        self.logits = logits.astype(np.float64, copy=False)
        return self

    @cached_property
    def distributions(self) -> Array:
        """The softmax `[rows, labels]`."""
        return self._softmax(self.logits)

    @property
    def probabilities(self) -> Array:
        """The softmax `[rows, labels]`."""
        return self.distributions

    @cached_property
    def answers(self) -> Integers:
        """Class indices `[rows]`; int64."""
        classes: Integers = self.logits.argmax(axis=-1)
        return classes

    def margin(self, label: int, threshold: float) -> Array:
        """The logit of p is that of the label minus the logarithm of the powers of the others."""
        others = np.delete(self.logits, label, axis=-1)
        top = np.maximum.reduce(others, axis=-1)
        powers = np.exp(others - top[:, None])
        logit: Array = self.logits[:, label] - top - np.log(np.add.reduce(powers, axis=-1))
        shift: Array = np.log(threshold / (1 - threshold))
        return logit - shift

    def unchanged(self, earlier: Outputs) -> Mask:
        """Whether the class is the same: `[rows]`."""
        same: Mask = self.answers == earlier.answers
        return same


class Sigmoid(Outputs):
    """A distribution over yes and no for each label; the answer is all labels that are predicted.

    Args:
        logits: `[rows, labels]` of any floating-point type.
        label_thresholds: `[labels]` the probabilities above which labels are predicted; empty means
            0.5.
    """

    def __new__(cls, logits: Floats, label_thresholds: Sequence[float] = ()) -> Sigmoid:
        """Keep the logits and the thresholds."""
        self = object.__new__(cls)
        self.logits = logits.astype(np.float64, copy=False)
        self._settings = (label_thresholds,)
        return self

    @cached_property
    def distributions(self) -> Array:
        """Both outcomes of each label, `[rows, labels, 2]`: the softmax of the logit and 0."""
        return self._softmax(self.logits[..., None] * (1.0, 0.0))

    @property
    def probabilities(self) -> Array:
        """The sigmoid of each logit: `[rows, labels]`."""
        return self.distributions[..., 0]

    @cached_property
    def answers(self) -> Integers:
        """Which labels are predicted, `[rows, labels]` of 0 and 1; int64."""
        (label_thresholds,) = self._settings
        thresholds = label_thresholds if len(label_thresholds) else 0.5
        return (self.probabilities > thresholds).astype(np.int64)

    def margin(self, label: int, threshold: float) -> Array:
        """The logit of p is that of the label."""
        logit: Array = self.logits[:, label]
        shift: Array = np.log(threshold / (1 - threshold))
        return logit - shift

    def unchanged(self, earlier: Outputs) -> Mask:
        """Whether the whole set of labels is the same: `[rows]`."""
        same: Mask = np.logical_and.reduce(self.answers == earlier.answers, axis=-1)
        return same


_KINDS: dict[ProblemType, type[Softmax] | type[Sigmoid]] = {
    ProblemType.SINGLE_LABEL: Softmax,
    ProblemType.MULTI_LABEL: Sigmoid,
    ProblemType.RANKING: Sigmoid,
}
"""The kind of outputs of each type of task."""


def outputs_of(
    problem_type: ProblemType, label_thresholds: Sequence[float] = ()
) -> Callable[[Floats], Outputs]:
    """The constructor of the outputs of rows at an exit, from their logits `[rows, labels]`.

    Args:
        problem_type: the type of the task.
        label_thresholds: see `Outputs`.
    """
    return partial(_KINDS[problem_type], label_thresholds=label_thresholds)


def per_row(values: Array) -> Array:
    """The sum over labels, if there is one value for each label."""
    return values if values.ndim == 1 else _sum(values)
