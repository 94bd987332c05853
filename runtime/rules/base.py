"""What all exit rules have in common.

After every exit from exit 1, a rule gives each row a *signal*: whether the answer looks settled. A
row stops after as many consecutive signals as the rule's patience; some rules can also stop a row
at once. Exit 0 is a bag of n-grams, whose outputs are not like those of a layer. Every rule treats
it the same: a row stops there if it is confident enough, and otherwise exit 1 is compared with it.

A rule answers every question about itself: its signals (`signal`), how calibration tries all
thresholds at once (`stop_scores`), and how far rounding can move its decisions (`shifted`,
`uses_labels`).
"""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np

from ..artifact.operating_point import RuleSettings
from ..errors import RuleError, whole_number
from .measures import Array, Mask, Measure, Outputs

Threshold = float | tuple[float, ...]
"""One threshold for all exits, or one for each exit; the last exit stops every row anyway."""


@dataclass(slots=True)
class Signal:
    """What a rule sees at one exit.

    Attributes:
        scores: `[rows]` float64, what the rule compares with its threshold; None if it has no
            score.
        agrees: `[rows]` bool, whether the answer looks settled at this exit.
        stop_now: `[rows]` bool, rows that stop regardless of their earlier signals; None if there
            are none.
    """

    scores: Array | None
    agrees: Mask
    stop_now: Mask | None = None


ScoresOf = Callable[["ExitRule"], Array]
"""Gives the scores `[exits, rows]` of a rule on a trace, with NaN where the rule has none."""


@dataclass(frozen=True, kw_only=True)
class ExitRule(ABC):
    """Base class of the exit rules, which decide for each row which exit answers.

    A rule is made with keyword arguments and never changes.

    Attributes:
        min_exit: the first exit at which a row may stop. Signals count from exit 1 on.
        max_exit: every row that reaches this exit stops there; None means the last exit.
        exit_0_threshold: a row stops at exit 0 if its confidence there, see `Outputs.confidence`,
            is at least this number; None means that no row does. Models without exit 0 allow None
            only.

    Raises:
        RuleError: a setting has the wrong type or value. Exits are whole numbers from 0, patience
            from 1, thresholds are finite numbers, that of exit 0 from 0 to 2, and a measure is a
            `Measure` or its value.

    Example:
        >>> from fpabee.runtime import ExitRule, FPabee
        >>> rule = FPabee(threshold=0.25, patience=2, min_exit=3)
        >>> rule.to_dict()
        {'name': 'fpabee', 'min_exit': 3, 'threshold': 0.25, 'measure': 'jskd', 'patience': 2}
        >>> ExitRule.from_dict(rule.to_dict()) == rule
        True
    """

    name: ClassVar[str]
    """The name of the rule in commands and in the manifest."""
    compares_exits: ClassVar[bool] = False
    """Whether a signal needs the exit before; `signal` is then not called without one."""
    uses_labels: ClassVar[bool] = False
    """Whether the rule compares predicted labels, so that a near tie of labels can move an exit."""
    sign: ClassVar[int] = 1
    """-1 if rows stop above the threshold, not below it: then stop scores are negated."""

    min_exit: int = 0
    max_exit: int | None = None
    exit_0_threshold: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic | np.ndarray):
                value = value.tolist()
            if isinstance(value, list | tuple):
                value = tuple(v.item() if isinstance(v, np.generic) else v for v in value)
            kind, hint = _SETTINGS.get(field.name) or _SETTINGS.get(str(field.type), (Any, ""))
            try:
                object.__setattr__(self, field.name, msgspec.convert(value, kind))
            except msgspec.ValidationError:
                raise RuleError(f"{self.name}: {field.name} is {value!r}", hint) from None
        if self.max_exit is not None and self.max_exit < self.min_exit:
            raise RuleError(
                f"{self.name}: max_exit {self.max_exit} is before min_exit {self.min_exit}",
                "give a larger max_exit",
            )

    @abstractmethod
    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """Scores and signals of some rows at an exit; each row depends on its own outputs only.

        Args:
            exit_number: from 1.
            earlier: outputs of the previous exit for the same rows; None if there is none.
            now: outputs of this exit.
        """

    @property
    def ends_at_exit_0(self) -> bool:
        """Whether every row stops at exit 0."""
        return self.max_exit == 0

    def stops_at_exit_0(self, now: Outputs) -> Mask | None:
        """Which rows stop at exit 0, `[rows]`; None if no row does.

        Args:
            now: outputs of exit 0.
        """
        if self.ends_at_exit_0:
            return np.ones(len(now.logits), np.bool_)
        if self.exit_0_threshold is None:
            return None
        return np.asarray(now.confidence() >= self.exit_0_threshold)

    def check_exits(self, exits: range) -> None:
        """Check that the rule fits a model.

        Args:
            exits: the numbers of the exits of the model.

        Raises:
            RuleError: a setting names an exit that the model does not have, or is given for
                another number of exits.
        """
        if self.exit_0_threshold is not None and 0 not in exits:
            raise RuleError(
                f"rule {self.name} has a threshold for exit 0, but the model has no exit 0",
                "leave out `exit_0_threshold`, or train exit 0",
            )
        for field in ("exit", "min_exit", "max_exit"):
            value = getattr(self, field, None)
            if value is None or value in exits or (field == "min_exit" and value == 0):
                continue
            raise RuleError(
                f"rule {self.name}: {field} is {value}, but the exits of the model are "
                f"{exits[0]} to {exits[-1]}",
                f"give a number from {exits[0]} to {exits[-1]}",
            )

    @property
    def signals_needed(self) -> int:
        """How many consecutive signals stop a row."""
        return int(getattr(self, "patience", 1))

    def stop_scores(self, scores_of: ScoresOf) -> Array:
        """Everything about the rule from exit 1 on but its threshold, as a score for each row.

        A row stops at the first exit whose stop score is below the threshold. A score of infinity
        never stops the row, and a score of minus infinity always does. Rules without a threshold
        behave as if it were 0.5.

        Args:
            scores_of: the scores of any rule on the trace, from exit 1 on.

        Returns:
            `[exits, rows]` float64, from exit 1 on.
        """
        scores = self._stop_scores(scores_of)
        scores = np.where(np.isnan(scores), np.inf, scores)
        scores[: max(0, self.min_exit - 1)] = np.inf
        last = len(scores) if self.max_exit is None else self.max_exit
        scores[max(0, last - 1) :] = -np.inf
        return scores

    def _stop_scores(self, scores_of: ScoresOf) -> Array:
        """The largest of the last `patience` scores: if it is below the threshold, all are.

        NaN means that the rule cannot stop the row there.
        """
        # Settings that do not change the scores get the same value, so that scores are shared.
        plain: dict[str, Any] = {
            **{"min_exit": 0, "max_exit": None, "exit_0_threshold": None},
            **{"patience": 1, "threshold": 0.0},
        }
        bare = dataclasses.replace(self, **{k: v for k, v in plain.items() if hasattr(self, k)})
        scores, patience = self.sign * scores_of(bare), self.signals_needed
        largest = np.full_like(scores, np.nan)
        if patience <= len(scores):
            windows = np.lib.stride_tricks.sliding_window_view(scores, patience, axis=0)
            largest[patience - 1 :] = windows.max(axis=-1)
        return largest

    @property
    def stop_thresholds(self) -> Array:
        """What stop scores are compared with: `[exits]` from exit 1, or `[1]` for all exits."""
        return np.full(1, 0.5)

    def with_stop_threshold(self, threshold: float | Sequence[float]) -> ExitRule:
        """This rule with another threshold for its stop scores.

        Args:
            threshold: one number, or one for each exit. Rules without a threshold ignore it.
        """
        return self

    def shifted(self, by: float) -> ExitRule:
        """This rule with all its thresholds moved by `by`.

        A row whose scores change by less than `by` stops no earlier and no later than under the
        rule shifted down and the rule shifted up.
        """
        if self.exit_0_threshold is None:
            return self
        # A confidence is from 0 to 1, so nothing changes beyond the limits of the setting.
        moved = min(max(self.exit_0_threshold - self.sign * by, 0.0), 2.0)
        return dataclasses.replace(self, exit_0_threshold=moved)

    def capped(self, max_exit: int) -> ExitRule:
        """This rule, except that no row goes beyond an exit.

        Args:
            max_exit: that exit. A lower `max_exit` of the rule stays; a higher `min_exit` is
                lowered.

        Raises:
            RuleError: the exit is not a whole number from 0.
        """
        max_exit = whole_number("max_exit", max_exit, RuleError, least=0)
        if self.max_exit is not None:
            max_exit = min(max_exit, self.max_exit)
        return dataclasses.replace(self, min_exit=min(self.min_exit, max_exit), max_exit=max_exit)

    def to_dict(self) -> RuleSettings:
        """The rule's name and settings, as the manifest stores them; `from_dict` reads them."""
        left_out = {"min_exit": 0, "max_exit": None, "exit_0_threshold": None}
        settings = {
            key: value.value if isinstance(value, Enum) else value
            for key, value in dataclasses.asdict(self).items()
            if key not in left_out or value != left_out[key]
        }
        return {"name": self.name, **settings}

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> ExitRule:
        """The rule that a dictionary with `name` and settings describes.

        Args:
            settings: as `to_dict` returns them; measures are given by their values.

        Raises:
            RuleError: the rule or a setting does not exist, a setting is missing, or it has a
                wrong value.
        """
        from .rules import RULES  # that module imports this one

        given = dict(settings)
        name = given.pop("name", None)
        kind = RULES.get(name) if isinstance(name, str) else None
        if kind is None:
            raise RuleError(f"exit rule {name!r} does not exist", f"choose from {', '.join(RULES)}")
        fields = {field.name: field for field in dataclasses.fields(kind)}
        known = f"its settings are: {', '.join(fields)}"
        unknown = sorted(set(given) - set(fields))
        if unknown:
            raise RuleError(f"rule {name} does not take {', '.join(unknown)}", known)
        for field in fields.values():
            if field.default is dataclasses.MISSING and field.name not in given:
                raise RuleError(f"rule {name} needs {field.name}", f"give `{field.name}`; {known}")
        return kind(**given)


@dataclass(frozen=True, kw_only=True)
class ThresholdRule(ExitRule):
    """Base class of the rules that compare a score with a threshold.

    Attributes:
        threshold: one for all exits, or one for each exit from exit 1.
    """

    threshold: Threshold

    @abstractmethod
    def scores(self, earlier: Outputs | None, now: Outputs) -> Array:
        """The scores `[rows]` of some rows at an exit.

        Args:
            earlier: outputs of the previous exit; None if there is none.
            now: outputs of this exit.
        """

    def signal(self, exit_number: int, earlier: Outputs | None, now: Outputs) -> Signal:
        """The answer looks settled where the score is strictly beyond the threshold."""
        scores = self.scores(earlier, now)
        return Signal(scores, self._passes(exit_number, scores))

    def _passes(self, exit_number: int, scores: Array) -> Mask:
        threshold = self.threshold_at(exit_number)
        return scores < threshold if self.sign > 0 else scores > threshold

    def check_exits(self, exits: range) -> None:
        """Check that the rule fits a model, see `ExitRule`."""
        super().check_exits(exits)
        if isinstance(self.threshold, tuple) and len(self.threshold) != exits[-1]:
            raise RuleError(
                f"rule {self.name} has {len(self.threshold)} thresholds, but the model has "
                f"{exits[-1]} exits after a layer",
                f"give one number, or {exits[-1]}: one for each of these exits",
            )

    def threshold_at(self, exit_number: int) -> float:
        """The threshold at an exit from 1."""
        numbers = self.threshold
        return numbers[exit_number - 1] if isinstance(numbers, tuple) else numbers

    @property
    def stop_thresholds(self) -> Array:
        """What stop scores are compared with: `[exits]` from exit 1, or `[1]` for all exits."""
        return self.sign * np.array(self.threshold, np.float64).reshape(-1)

    def with_stop_threshold(self, threshold: float | Sequence[float]) -> ExitRule:
        """This rule with another threshold for its stop scores, see `ExitRule`."""
        numbers = self.sign * np.asarray(threshold, np.float64)
        return dataclasses.replace(self, threshold=numbers.tolist())

    def shifted(self, by: float) -> ExitRule:
        """This rule with its threshold moved by `by`, see `ExitRule`."""
        moved = super().shifted(by)
        assert isinstance(moved, ThresholdRule)
        return dataclasses.replace(moved, threshold=(np.asarray(self.threshold) + by).tolist())


_Finite = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
_Exit = Annotated[int, msgspec.Meta(ge=0)]
# What a setting must be, and what to give, by the name of the setting or its annotation. A rule may
# check other types itself.
_SETTINGS: dict[str, tuple[Any, str]] = {
    "exit": (_Exit, "give a whole number from 0"),
    "min_exit": (_Exit, "give a whole number from 0"),
    "max_exit": (_Exit | None, "give a whole number from 0"),
    "exit_0_threshold": (
        Annotated[float, msgspec.Meta(ge=0, le=2)] | None,
        "give a share from 0 to 1, or 2 for never",
    ),
    "int": (Annotated[int, msgspec.Meta(ge=1)], "give a whole number from 1"),
    "Threshold": (
        _Finite | Annotated[tuple[_Finite, ...], msgspec.Meta(min_length=1)],
        "give a finite number, or one for each exit",
    ),
    "Measure": (Measure, f"choose from {', '.join(measure.value for measure in Measure)}"),
}
