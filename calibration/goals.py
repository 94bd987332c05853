"""What a user asks of a calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.artifact.operating_point import Goal
from ..runtime.errors import InputError
from ..runtime.files import ReadOptions
from ..runtime.rules.rules import RULES
from .families import DEFAULT_RULES
from .risk import Bound

DEFAULT_GOALS = {
    "safe": Goal(max_drop=0.5, guaranteed=True),
    "balanced": Goal(max_drop=0.5),
    "fast": Goal(max_drop=2.0),
}
"""The operating points with no goal given; `balanced` becomes the default."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate for, and how.

    Attributes:
        goals: operating points by name; the default is `DEFAULT_GOALS`.
        bound: a guarantee instead of goals; it makes a single point.
        name: the name of that point.
        default: the point that runs if none is named; the first one if there is no such point.
        metric: for single-label tasks `accuracy`, `macro_f1` or `matthews`; for multi-label tasks
            `exact_match`, `micro_f1` or `macro_f1`; for both `agreement` with full depth. None
            means the first of these, or agreement if labels are not used or if the bound is on
            disagreement.
        rules: names of the exit rules to choose from, of `runtime.RULES`; empty means
            `DEFAULT_RULES`, or entropy for what is guaranteed.
        target: a built target; None means the default of the manifest.
        test: a file with more rows to report the points on, instead of cross-validation.
        reading: how the files of rows are read.
        unlabelled: ignore labels, and compare answers with those at full depth.
        batch_size: the batch size, in rows, whose measured times settings are chosen by.
        threads: CPU threads; None means the default of `runtime.Engine.load`.
        compare: also evaluate the best setting of up to six kinds of rules.

    Raises:
        InputError: a goal sets neither or both of its fields, a rule does not exist, or a number
            is out of its range.

    Example:
        ```python
        from fpabee.calibration import Bound, CalibrationOptions, RiskOf, Goal

        goals = {"close": Goal(max_drop=0.5), "twice": Goal(speedup=2.0)}
        two_points = CalibrationOptions(goals=goals, default="close")

        bound = Bound(risk=0.02, confidence=0.95, risk_of=RiskOf.DISAGREEMENT)
        no_labels = CalibrationOptions(bound=bound, name="sure", unlabelled=True)
        ```
    """

    goals: dict[str, Goal] = field(default_factory=lambda: dict(DEFAULT_GOALS))
    bound: Bound | None = None
    name: str = "risk"
    default: str = "balanced"
    metric: str | None = None
    rules: tuple[str, ...] = ()
    target: str | None = None
    test: str | Path | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    unlabelled: bool = False
    batch_size: int = 32
    threads: int | None = None
    compare: bool = False

    def __post_init__(self) -> None:
        if not self.goals and self.bound is None:
            raise InputError("no goal is given", "give `goals` or `bound`")
        for name in self.asked:
            if not is_name(name):
                raise InputError(
                    f"an operating point is named {name!a}",
                    "give a name that can be read and typed",
                )
        for name, goal in self.goals.items():
            _check_goal(name, goal)
        for rule in self.rules:
            if rule not in RULES:
                raise InputError(
                    f"exit rule {rule!r} does not exist", f"choose from {', '.join(RULES)}"
                )
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}", "give a number from 1")

    @property
    def competing(self) -> tuple[str, ...]:
        """Names of the rules that compete."""
        return self.rules or DEFAULT_RULES

    @property
    def asked(self) -> dict[str, Goal | Bound]:
        """What each operating point is asked to meet, by its name."""
        return dict(self.goals) if self.bound is None else {self.name: self.bound}


def is_name(name: str) -> bool:
    """Whether an operating point can have this name: people read and type it."""
    return bool(name) and name.isprintable()


def _check_goal(name: str, goal: Goal) -> None:
    given = [value for value in (goal.max_drop, goal.speedup) if value is not None]
    if len(given) != 1:
        raise InputError(
            f"the goal {name!r} has {len(given)} of max_drop and speedup",
            "give one of `max_drop` and `speedup`",
        )
    if goal.guaranteed and goal.max_drop is None:
        raise InputError(
            f"the goal {name!r} is a guaranteed speed-up, but only a drop can be guaranteed",
            "give `max_drop`, or a goal that is not guaranteed",
        )
    (value,) = given
    low, high = (0.0, 100.0) if goal.speedup is None else (1.0, math.inf)
    if not (low <= value <= high and math.isfinite(value)):
        raise InputError(
            f"the goal {name!r} is {value:g}",
            "give `max_drop` in points, 0 to 100, or `speedup` of at least 1",
        )
