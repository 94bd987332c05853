"""What a user asks of a calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.artifact.operating_point import Certificate, Goal, Promise
from ..runtime.errors import InputError
from ..runtime.files import ReadOptions
from ..runtime.rules.rules import RULES

_POINT_NAMES = {"drop": "risk", "changed_answers": "changed"}
DEFAULT_RULE = "confidence"
"""The rule that is calibrated if none is named: in the study no other rule saves clearly more."""
GUARANTEED_RULES = ("confidence", "entropy")
"""The rules whose lists of settings are known before any row is seen, which a guarantee needs."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A guarantee on new texts from the same source: all that is promised holds together.

    It is given by Learn then Test with fixed-sequence testing (arXiv 2110.01052).

    Attributes:
        confidence: probability, over the choice of calibration rows, that every promise holds.
        drop: largest drop of the metric, as a share of texts (0.01 is one point); it needs labels.
        changed_answers: largest share of texts whose decision differs from that at full depth. The
            decision is the answer; or with `thresholds`, in a model with one label for each text,
            which of the named labels are flagged.
        missed: of the texts for which full depth flags a label, the largest share for which it is
            not flagged. Every label in `thresholds` has a promise of its own.
        false_alarms: of the other texts, the largest share for which the label is flagged.
        thresholds: the probability above which a label is flagged, by label.

    Raises:
        InputError: a number is out of its range, nothing is promised, or missed texts or false
            alarms are bounded without a threshold.

    Example:
        >>> from fpabee.calibration import Bound
        >>> print(Bound(changed_answers=0.01))
        at most 1 % changed answers, with 95 % confidence
        >>> print(Bound(changed_answers=0.01, missed=0.02, thresholds={"attack": 0.7}))
        at most 1 % changed answers and at most 2 % missed of 'attack', with 95 % confidence
    """

    confidence: float = 0.95
    drop: float | None = None
    changed_answers: float | None = None
    missed: float | None = None
    false_alarms: float | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # With less confidence, the bound would more probably be wrong than right.
        limits = {"confidence": self.confidence, **self.shares}
        for name, value in limits.items():
            least = 0.5 if name == "confidence" else 0.0
            if not least < value < 1:
                raise InputError(
                    f"{name} is {100 * value:g} %",
                    f"give `{name}` more than {100 * least:g} and less than 100 %",
                )
        for label, threshold in self.thresholds.items():
            if not 0 < threshold < 1:
                raise InputError(
                    f"the threshold of {label!r} is {threshold:g}", "give a number between 0 and 1"
                )
        if not self.shares:
            raise InputError(
                "nothing is promised", "give `drop`, `changed_answers` or another bound"
            )
        if not self.thresholds and {"missed", "false_alarms"} & {*self.shares}:
            raise InputError(
                "missed texts and false alarms need to know what is flagged",
                "give `thresholds`, such as 0.5 for one label",
            )

    @property
    def shares(self) -> dict[str, float]:
        """What is bounded, as shares by name."""
        names = ("drop", "changed_answers", "missed", "false_alarms")
        every = {name: getattr(self, name) for name in names}
        return {name: value for name, value in every.items() if value is not None}

    @property
    def point(self) -> str:
        """The usual name of an operating point with this bound, such as `changed-1-missed-2`."""
        names = {kind: _POINT_NAMES.get(kind, kind.replace("_", "-")) for kind in self.shares}
        return "-".join(f"{names[kind]}-{100 * share:g}" for kind, share in self.shares.items())

    @property
    def promises(self) -> list[Promise]:
        """One promise for everything that is bounded, and for every label that it is about."""
        return [
            Promise(of=name, at_most=100 * share, label=label)
            for name, share in self.shares.items()
            for label in (self.thresholds if name in ("missed", "false_alarms") else (None,))
        ]

    def __str__(self) -> str:
        return str(Certificate(confidence=100 * self.confidence, promises=tuple(self.promises)))


DEFAULT_GOALS: dict[str, Goal | Bound] = {
    "safe": Bound(drop=0.005),
    "balanced": Goal(max_drop=0.5),
    "fast": Goal(max_drop=2.0),
}
"""The operating points with no goal given; `balanced` becomes the default."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate for, and how.

    Attributes:
        goals: what each operating point has to meet, by its name: on average, or guaranteed. The
            default is `DEFAULT_GOALS`.
        default: the point that runs if none is named; the first one if there is no such point.
        metric: for single-label tasks `accuracy`, `macro_f1` or `matthews`; for multi-label tasks
            `exact_match`, `micro_f1` or `macro_f1`; for both `agreement` with full depth, which
            needs no labels. None means the first of these, or agreement if there are only
            guarantees, and only on decisions.
        rules: names of the exit rules to choose from, of `runtime.RULES`; for what is guaranteed,
            one of confidence and entropy.
        target: a built target; None means the default of the manifest.
        quick_target: a faster target of the folder, in which texts run first; those that are still
            in doubt at its last exit run again, all layers, in `target`. Guarantees only.
        test: a file with more rows to report the points on, instead of cross-validation.
        reading: how the files of rows are read.
        batch_size: the batch size, in rows, whose measured times settings are chosen by.
        threads: CPU threads; None means the default of `runtime.Engine.load`.
        force: whether a point without a certificate may replace one of the same name that has one.

    Raises:
        InputError: a goal sets neither or both of its fields, a rule does not exist or cannot be
            guaranteed, guarantees have different thresholds, or a number is out of its range.

    Example:
        ```python
        from fpabee.calibration import Bound, CalibrationOptions, Goal

        goals = {"close": Goal(max_drop=0.5), "twice": Goal(speedup=2.0)}
        two_points = CalibrationOptions(goals=goals, default="close")

        no_labels = CalibrationOptions(goals={"sure": Bound(changed_answers=0.02, confidence=0.95)})
        ```
    """

    goals: Mapping[str, Goal | Bound] = field(default_factory=lambda: dict(DEFAULT_GOALS))
    default: str = "balanced"
    metric: str | None = None
    rules: tuple[str, ...] = (DEFAULT_RULE,)
    target: str | None = None
    quick_target: str | None = None
    test: str | Path | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    batch_size: int = 32
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if not self.goals:
            raise InputError("no goal is given", "give `goals`")
        for name, goal in self.goals.items():
            if not (name and name.isprintable()):  # people read and type it
                raise InputError(
                    f"an operating point is named {name!a}",
                    "give a name that can be read and typed",
                )
            if isinstance(goal, Goal):
                _check_goal(name, goal)
        if not self.rules:
            raise InputError("no exit rule is given", "give `rules`, or leave it out")
        for rule in self.rules:
            if rule not in RULES:
                raise InputError(
                    f"exit rule {rule!r} does not exist", f"choose from {', '.join(RULES)}"
                )
        # A guarantee tests a list of thresholds that is known before any row is seen.
        if self.bounds and self.rules not in [(rule,) for rule in GUARANTEED_RULES]:
            name = next(name for name, goal in self.goals.items() if isinstance(goal, Bound))
            raise InputError(
                f"{name!r} is guaranteed, so it cannot choose from {', '.join(self.rules)}: its "
                "rule and its list of thresholds must be known before any row is seen",
                f"give one of {' and '.join(GUARANTEED_RULES)}, or `max_drop` or `speedup`, which "
                "guarantee nothing",
            )
        if any(bound.thresholds != self.thresholds for bound in self.bounds):
            raise InputError(
                "guarantees have different thresholds, but a text has one decision",
                "give them to separate calibrations",
            )
        if self.rules == ("entropy",) and self.thresholds:
            raise InputError(
                "entropy knows nothing of the thresholds of labels",
                "leave out `rules`, or give confidence",
            )
        if self.quick_target is not None and len(self.bounds) < len(self.goals):
            name = next(name for name, goal in self.goals.items() if isinstance(goal, Goal))
            raise InputError(
                f"{name!r} is a goal on average, and a quick pass needs a guarantee",
                "leave out `quick_target`, or give bounds",
            )
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}", "give a number from 1")

    @property
    def bounds(self) -> list[Bound]:
        """What is guaranteed."""
        return [goal for goal in self.goals.values() if isinstance(goal, Bound)]

    @property
    def thresholds(self) -> Mapping[str, float]:
        """The `Bound.thresholds` of all guarantees."""
        return self.bounds[0].thresholds if self.bounds else {}


def _check_goal(name: str, goal: Goal) -> None:
    values = [value for value in (goal.max_drop, goal.speedup) if value is not None]
    if len(values) != 1:
        raise InputError(
            f"the goal {name!r} has {len(values)} of max_drop and speedup",
            "give one of `max_drop` and `speedup`",
        )
    (value,) = values
    low, high = (0.0, 100.0) if goal.speedup is None else (1.0, math.inf)
    if not (low <= value <= high and math.isfinite(value)):
        raise InputError(
            f"the goal {name!r} is {value:g}",
            "give `max_drop` in points, 0 to 100, or `speedup` of at least 1",
        )
