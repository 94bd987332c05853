"""The exit rules: for each its settings, its formula, and what calibration tries.

Sources: F-PABEE (arXiv 2305.11916), PABEE (2006.04152), DeeBERT (2004.12993), Shallow-Deep
Networks (1810.07052), COSEE (2412.13236), PCEE-BERT, FastBERT (2004.02178), EPEE (2503.02053).
Logarithms are natural, and their arguments are at least 1e-12.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import ExitRule, ScoresOf, Signal, ThresholdRule
from .measures import MEASURES, Array, Measure, Outputs, per_row


@dataclass(frozen=True, kw_only=True)
class FPabee(ThresholdRule):
    """F-PABEE (arXiv 2305.11916): neighbouring exits are similar `patience` times in a row.

    The measure of the distributions of two neighbouring exits is below the threshold. The first
    exit has no neighbour, so no row stops before exit `patience` + 1, or `patience` if the model
    has exit 0.

    Attributes:
        threshold: in nats, the unit of the measure; one for all exits, or one for each exit.
        measure: how similarity is measured; for multi-label tasks it is summed over labels.
        patience: how many consecutive signals stop a row.
    """

    name: ClassVar[str] = "fpabee"
    compares_exits: ClassVar[bool] = True

    measure: Measure = Measure.JSKD
    patience: int = 1

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The measure, summed over labels."""
        assert earlier is not None
        measure = MEASURES[self.measure]
        return per_row(measure(earlier.distributions, now.distributions))


@dataclass(frozen=True, kw_only=True)
class Pabee(ExitRule):
    """PABEE (arXiv 2006.04152): the answer stays the same `patience` times in a row.

    For multi-label tasks the whole set of labels must stay the same. No row stops before exit
    `patience` + 1, or `patience` if the model has exit 0.

    Attributes:
        patience: how many consecutive signals stop a row.
    """

    name: ClassVar[str] = "pabee"
    compares_exits: ClassVar[bool] = True
    uses_labels: ClassVar[bool] = True

    patience: int

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """The score is 0 if the previous exit gave the same answer, else 1."""
        assert earlier is not None
        same = now.unchanged(earlier)
        return Signal(np.where(same, 0.0, 1.0), same)


@dataclass(frozen=True, kw_only=True)
class Entropy(ThresholdRule):
    """BranchyNet, DeeBERT (arXiv 2004.12993): the entropy -sum p log p is below the threshold.

    Attributes:
        threshold: in nats, not normalised; one for all exits, or one for each exit.
    """

    name: ClassVar[str] = "entropy"

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The entropy; for multi-label tasks the sum of the binary entropies."""
        return now.entropy()


@dataclass(frozen=True, kw_only=True)
class Confidence(ThresholdRule):
    """Shallow-Deep Networks (arXiv 1810.07052), RightTool: max p is above the threshold.

    Attributes:
        threshold: a probability; one for all exits, or one for each exit.
    """

    name: ClassVar[str] = "confidence"
    sign: ClassVar[int] = -1

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The largest probability; for multi-label tasks the least max(p, 1 - p) of a label."""
        return now.confidence()


@dataclass(frozen=True, kw_only=True)
class Energy(ThresholdRule):
    """COSEE (arXiv 2412.13236): the energy 1/(1 + sum exp z) is below the threshold; z are logits.

    Attributes:
        threshold: from 0 to 1; one for all exits, or one for each exit.
    """

    name: ClassVar[str] = "energy"

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The energy, computed without overflow."""
        top = np.maximum(now.logits.max(axis=-1), 0.0)
        total = np.exp(now.logits - top[:, None]).sum(axis=-1)
        return np.asarray(np.exp(-top) / (np.exp(-top) + total))


@dataclass(frozen=True, kw_only=True)
class Pcee(ThresholdRule):
    """PCEE-BERT: the normalised entropy is below the threshold `patience` times in a row.

    Normalised means divided by the logarithm of the number of classes. For multi-label tasks it is
    the mean over labels of the binary entropies divided by log 2. With patience 1 this is the rule
    of FastBERT (arXiv 2004.02178).

    Attributes:
        threshold: from 0 to 1; one for all exits, or one for each exit.
        patience: how many consecutive signals stop a row; they count from exit 1 on.
    """

    name: ClassVar[str] = "pcee"

    patience: int = 1

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The normalised entropy."""
        return now.normalised_entropy()


@dataclass(frozen=True, kw_only=True)
class Epee(ThresholdRule):
    """EPEE (arXiv 2503.02053): the normalised entropy is low, or the answer stays the same.

    A row stops at once if its normalised entropy (as in `Pcee`) is below the threshold, or if its
    answer stayed the same `patience` times in a row (as in `Pabee`).

    Attributes:
        threshold: from 0 to 1; one for all exits, or one for each exit.
        patience: how many times in a row the answer must stay the same.
    """

    name: ClassVar[str] = "epee"
    uses_labels: ClassVar[bool] = True

    patience: int

    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The normalised entropy."""
        return now.normalised_entropy()

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """A row stops now if its entropy is low, and gives a signal if its answer is the same."""
        scores = self.scores(earlier, now)
        same = np.zeros(len(scores), np.bool_) if earlier is None else now.unchanged(earlier)
        return Signal(scores, same, stop_now=self._passes(exit_number, scores))

    def _stop_scores(self, scores_of: ScoresOf) -> Array:
        same = Pabee(patience=self.patience).stop_scores(scores_of) < 0.5
        return np.where(same, -np.inf, Pcee(threshold=0.0).stop_scores(scores_of))


@dataclass(frozen=True, kw_only=True)
class Budget(ExitRule):
    """Every row stops at the same exit ("Budgeted-Exit" in F-PABEE's Table 1).

    Attributes:
        exit: that exit.
    """

    name: ClassVar[str] = "budget"

    exit: int

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Every row gives its signal from that exit on; there is no score."""
        return Signal(None, np.full(len(now.logits), exit_number >= self.exit))

    @property
    def ends_at_exit_0(self) -> bool:
        """Whether exit 0 is that exit."""
        return self.exit == 0 or super().ends_at_exit_0

    def _stop_scores(self, scores_of: ScoresOf) -> Array:
        scores = np.full_like(scores_of(self), np.inf)
        scores[max(0, self.exit - 1) :] = -np.inf
        return scores


RULES: dict[str, type[ExitRule]] = {
    rule.name: rule for rule in (FPabee, Pabee, Entropy, Confidence, Energy, Pcee, Epee, Budget)
}
"""The class of each rule by its name."""
