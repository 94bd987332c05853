"""Exit rules: after each exit, which rows stop. Pure numpy, per row, at any batch size.

Every rule has one shape: at each exit a row may give a *sign* that its answer is settled;
it stops after `patience` signs in a row. Some rules also stop at once on confidence. The
`score` is what a rule compares with its threshold, which is one number or one for each exit.

Sources: F-PABEE (arXiv 2305.11916), PABEE (2006.04152), DeeBERT (2004.12993), Shallow-Deep
Networks (1810.07052), COSEE (2412.13236), PCEE-BERT, FastBERT (2004.02178), EPEE
(2503.02053). Logarithms are natural, and their arguments are clamped at 1e-12.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import numpy as np

from ..arguments import whole_number
from ..artifact.operating_point import RuleSettings
from ..errors import RuleError
from .measures import ARRAYS, MEASURES, Array, Mask, Measure, Outputs, per_row

Threshold = float | tuple[float, ...]
"""One threshold for all exits, or one for each: the last exit stops every row whatever it is."""


@dataclass(slots=True)
class Signal:
    """What a rule sees at one exit.

    Attributes:
        scores: `[rows]` float64, what is compared with the threshold; None: the rule has none.
        agrees: `[rows]` bool, where the exit gives a sign that the answer is settled.
        stop_now: `[rows]` bool, which rows stop whatever their signs; None: no row.
    """

    scores: Array | None
    agrees: Mask
    stop_now: Mask | None = None


@dataclass(frozen=True, kw_only=True)
class ExitRule(ABC):
    """Base of the rules: per row, which exit answers.

    At each exit a row may give a sign that its answer is settled; after as many signs in a row
    as `signals_needed` it stops. A rule is made with keyword arguments, and is never changed.

    Attributes:
        min_exit: stopping is allowed from this exit on; signs count from exit 1.
        max_exit: a row that gets here stops; None is the last exit.

    Raises:
        RuleError: a setting is not of its kind: exits and patience are whole numbers from 1,
            thresholds are finite, a measure is a `Measure` or its value.

    Example:
        >>> from fpabee.runtime import ExitRule, FPabee
        >>> rule = FPabee(threshold=0.25, patience=2, min_exit=3)
        >>> rule.to_dict()
        {'name': 'fpabee', 'min_exit': 3, 'threshold': 0.25, 'measure': 'jskd', 'patience': 2}
        >>> ExitRule.from_dict(rule.to_dict()) == rule
        True
    """

    name: ClassVar[str]
    """What it is called in commands and in the manifest."""

    min_exit: int = 1
    max_exit: int | None = None

    def __post_init__(self) -> None:
        self._take_plain_values()
        for field in ("min_exit", "max_exit", "patience", "exit"):
            value = getattr(self, field, 1)
            if field == "max_exit" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RuleError(f"{self.name}: {field} is {value!r}", "give a whole number from 1")
        for field in ("threshold", "agreement"):
            self._check_threshold(field, getattr(self, field, 0.0))
        if self.max_exit is not None and self.max_exit < self.min_exit:
            raise RuleError(
                f"{self.name}: max_exit {self.max_exit} is before min_exit {self.min_exit}",
                "give a larger max_exit",
            )

    def _take_plain_values(self) -> None:
        """Numbers of numpy become Python's, lists tuples, and the name of a measure the measure."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic | np.ndarray):
                value = value.tolist()
            if isinstance(value, list):
                value = tuple(value)
            if field.name == "measure":
                try:
                    value = Measure(value)
                except ValueError:
                    raise RuleError(
                        f"measure {value!r} does not exist",
                        f"choose from {', '.join(m.value for m in Measure)}",
                    ) from None
            object.__setattr__(self, field.name, value)

    def _check_threshold(self, field: str, value: Any) -> None:
        numbers = value if isinstance(value, tuple) and field == "threshold" else (value,)
        for number in numbers or (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                hint = "give a number" + (", or one for each exit" if field == "threshold" else "")
                raise RuleError(f"{self.name}: {field} is {value!r}", hint)
            if not math.isfinite(number):
                raise RuleError(f"{self.name}: {field} is {value}", "give a finite number")

    def threshold_at(self, exit_number: int) -> float:
        """The threshold at an exit, counted from 1; only for rules that have one."""
        threshold: Threshold = vars(self)["threshold"]
        return threshold[exit_number - 1] if isinstance(threshold, tuple) else threshold

    @abstractmethod
    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Scores and signs of rows at an exit, each by its own outputs only.

        Args:
            exit_number: from 1; at least `first_exit_with_signal`.
            earlier: outputs of the exit before; None at exit 1.
            now: outputs of this exit, of the same rows.
        """

    @property
    def first_exit_with_signal(self) -> int:
        """The first exit that can give a sign; those before it are not asked."""
        return 1

    @property
    def signals_needed(self) -> int:
        """How many signs in a row stop a row."""
        return int(getattr(self, "patience", 1))

    def capped(self, max_exit: int) -> ExitRule:
        """This rule, with every row stopped at an exit at the latest.

        Args:
            max_exit: that exit, counted from 1; `min_exit` is lowered to it.

        Raises:
            RuleError: the exit is no whole number from 1.
        """
        max_exit = whole_number("max_exit", max_exit, RuleError)
        return dataclasses.replace(
            self,
            min_exit=min(self.min_exit, max_exit),
            max_exit=min(self.max_exit or max_exit, max_exit),
        )

    def to_dict(self) -> RuleSettings:
        """Name and settings, as in the manifest; `from_dict` reads them."""
        settings = {
            key: value.value if isinstance(value, Enum) else value
            for key, value in dataclasses.asdict(self).items()
            if not (key == "max_exit" and value is None) and not (key == "min_exit" and value == 1)
        }
        return {"name": self.name, **settings}

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> ExitRule:
        """The rule that a dictionary with `name` and settings describes.

        Args:
            settings: as `to_dict` gives them; measures are named by their values.

        Raises:
            RuleError: unknown rule or setting, a setting missing or of a wrong value.
        """
        given = dict(settings)
        name = given.pop("name", None)
        kind = RULES.get(name) if isinstance(name, str) else None
        if kind is None:
            raise RuleError(f"exit rule {name!r} does not exist", f"choose from {', '.join(RULES)}")
        fields = {field.name: field for field in dataclasses.fields(kind)}
        unknown = sorted(set(given) - set(fields))
        required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
        missing = sorted(set(required) - set(given))
        if unknown or missing:
            what = f"does not take {', '.join(unknown)}" if unknown else f"needs {missing[0]}"
            give = "" if unknown else f"give {missing[0]}; "
            raise RuleError(f"rule {name} {what}", f"{give}its settings are: {', '.join(fields)}")
        return kind(**given)


@dataclass(frozen=True, kw_only=True)
class Budget(ExitRule):
    """Every row stops at one exit ("Budgeted-Exit" in F-PABEE's Table 1).

    Attributes:
        exit: the exit, counted from 1.
    """

    name: ClassVar[str] = "budget"

    exit: int

    @property
    def first_exit_with_signal(self) -> int:
        """The given exit."""
        return self.exit

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """No score: the rows are settled."""
        return Signal(None, np.ones(len(now.logits), np.bool_))


@dataclass(frozen=True, kw_only=True)
class FPabee(ExitRule):
    """F-PABEE (arXiv 2305.11916): neighbours are similar `patience` times in a row.

    The measure of the distributions of two neighbouring exits is below the threshold. Exit 1 has
    no neighbour, so no row stops before exit `patience` + 1.

    Attributes:
        threshold: in the measure's unit, nats; one for all exits, or one for each.
        measure: how similarity is measured; multi-label: summed over labels.
        patience: signs in a row that stop a row.
    """

    name: ClassVar[str] = "fpabee"

    threshold: Threshold
    measure: Measure = Measure.JSKD
    patience: int = 1

    @property
    def first_exit_with_signal(self) -> int:
        """Exit 2: it takes two to compare."""
        return 2

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Score: the measure, summed over labels. Settled: strictly below the threshold."""
        assert earlier is not None
        measure = MEASURES[self.measure]
        scores = per_row(measure(ARRAYS, earlier.distributions, now.distributions))
        return Signal(scores, scores < self.threshold_at(exit_number))


@dataclass(frozen=True, kw_only=True)
class Pabee(ExitRule):
    """PABEE (arXiv 2006.04152): the answer stays the same `patience` times in a row.

    Multi-label: the whole set of labels stays the same. No row stops before exit `patience` + 1.

    Attributes:
        patience: signs in a row that stop a row.
    """

    name: ClassVar[str] = "pabee"

    patience: int

    @property
    def first_exit_with_signal(self) -> int:
        """Exit 2: it takes two to compare."""
        return 2

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Score: 0 if the answer is that of the exit before, else 1."""
        assert earlier is not None
        same = now.unchanged(earlier)
        return Signal(np.where(same, 0.0, 1.0), same)


@dataclass(frozen=True, kw_only=True)
class Entropy(ExitRule):
    """BranchyNet, DeeBERT (arXiv 2004.12993): entropy -sum p log p below the threshold.

    Attributes:
        threshold: in nats, not normalised; one for all exits, or one for each.
    """

    name: ClassVar[str] = "entropy"

    threshold: Threshold

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Score: entropy; multi-label: the sum of the binary entropies."""
        scores = now.entropy()
        return Signal(scores, scores < self.threshold_at(exit_number))


@dataclass(frozen=True, kw_only=True)
class Confidence(ExitRule):
    """Shallow-Deep Networks (arXiv 1810.07052), RightTool: largest probability above the threshold.

    Attributes:
        threshold: a probability; one for all exits, or one for each.
    """

    name: ClassVar[str] = "confidence"

    threshold: Threshold

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Score: max p; multi-label: the least of max(p, 1-p) over labels."""
        best = now.distributions.max(axis=-1)
        scores = best if best.ndim == 1 else best.min(axis=-1)
        return Signal(scores, scores > self.threshold_at(exit_number))


@dataclass(frozen=True, kw_only=True)
class Energy(ExitRule):
    """COSEE (arXiv 2412.13236): energy 1/(1 + sum exp z) of the logits z below the threshold.

    Attributes:
        threshold: from 0 to 1; one for all exits, or one for each.
    """

    name: ClassVar[str] = "energy"

    threshold: Threshold

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Score: 1/(1 + sum exp z), computed without overflow."""
        top = np.maximum(now.logits.max(axis=-1), 0.0)
        total = np.exp(now.logits - top[:, None]).sum(axis=-1)
        scores = np.exp(-top) / (np.exp(-top) + total)
        return Signal(scores, scores < self.threshold_at(exit_number))


@dataclass(frozen=True, kw_only=True)
class Pcee(ExitRule):
    """PCEE-BERT: normalised entropy below the threshold `patience` times in a row.

    Entropy over its largest value, the logarithm of the number of classes; multi-label: the mean
    over labels of the binary entropies over log 2. With patience 1 it is the rule of FastBERT
    (arXiv 2004.02178).

    Attributes:
        threshold: from 0 to 1; one for all exits, or one for each.
        patience: signs in a row that stop a row; they count from exit 1.
    """

    name: ClassVar[str] = "pcee"

    threshold: Threshold
    patience: int = 1

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Score: normalised entropy; signs count from exit 1."""
        scores = now.normalised_entropy()
        return Signal(scores, scores < self.threshold_at(exit_number))


@dataclass(frozen=True, kw_only=True)
class Epee(ExitRule):
    """EPEE (arXiv 2503.02053): normalised entropy is low, or the answer is settled.

    A row stops at once where its normalised entropy (as in `Pcee`) is below the threshold, or
    when its answer stayed the same `patience` times in a row (as in `Pabee`).

    Attributes:
        threshold: from 0 to 1; one for all exits, or one for each.
        patience: signs in a row that stop a row.
    """

    name: ClassVar[str] = "epee"

    threshold: Threshold
    patience: int

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Score: normalised entropy. Settled: the answer is unchanged."""
        scores = now.normalised_entropy()
        same = np.zeros(len(scores), np.bool_) if earlier is None else now.unchanged(earlier)
        return Signal(scores, same, scores < self.threshold_at(exit_number))


@dataclass(frozen=True, kw_only=True)
class Either(ExitRule):
    """Sure enough now, or in agreement with the exits before: DeeBERT's sign or F-PABEE's.

    A row stops if its entropy is below `threshold`, or if neighbouring distributions were
    similar (`measure` below `agreement`) `patience` times in a row. A rule of this project.

    Attributes:
        threshold: of the entropy, in nats; one for all exits, or one for each.
        agreement: of the measure, in nats; one for all exits.
        measure: how similarity is measured; multi-label: summed over labels.
        patience: exits in a row that must agree.
    """

    name: ClassVar[str] = "either"

    threshold: Threshold
    agreement: float
    measure: Measure = Measure.JSKD
    patience: int = 1

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Score: entropy, as in `entropy`. Settled: the measure is below `agreement`."""
        scores = now.entropy()
        if earlier is None:
            similar = np.zeros(len(scores), np.bool_)
        else:
            measure = MEASURES[self.measure]
            distance = per_row(measure(ARRAYS, earlier.distributions, now.distributions))
            similar = distance < self.agreement
        return Signal(scores, similar, scores < self.threshold_at(exit_number))


RULES: dict[str, type[ExitRule]] = {
    rule.name: rule
    for rule in (FPabee, Pabee, Entropy, Confidence, Energy, Pcee, Epee, Either, Budget)
}
"""The class of each rule by its name."""


def takes_threshold(name: str) -> bool:
    """Whether a rule has a threshold."""
    return any(field.name == "threshold" for field in dataclasses.fields(RULES[name]))
