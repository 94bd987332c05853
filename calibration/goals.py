"""What to calibrate for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.artifact.operating_point import Goal
from ..runtime.errors import InputError
from ..runtime.files import ReadOptions
from ..runtime.rules.measures import Measure
from ..runtime.rules.rules import RULES
from .risk import Bound

DEFAULT_GOALS = {
    "safe": Goal(max_drop=0.5, guaranteed=True),
    "balanced": Goal(max_drop=0.5),
    "fast": Goal(max_drop=2.0),
}
"""The operating points that come when nothing is wished for; `balanced` becomes the default."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate for.

    Attributes:
        goals: operating points by name; default: `DEFAULT_GOALS`.
        bound: a guarantee instead of wishes; then `name` names the one point.
        name: of the point of a bound.
        default: the point that runs when none is named; if there is none of that name, the first.
        metric: single-label: `accuracy`, `macro_f1`, `matthews`; multi-label: `exact_match`,
            `micro_f1`, `macro_f1`; both: `agreement` with full depth. None: the first of these,
            or agreement if labels are left aside.
        rules: names of exit rules to choose from, see `runtime.RULES`; empty: all.
        measures: similarity measures of `fpabee` and `either`.
        target: a built target; None: the manifest's default.
        test: a file of more rows, which points are reported on instead of being cross-fitted.
        reading: how the files of rows are read.
        unlabelled: leave labels aside and hold the rule against full depth.
        tune_label_thresholds: also choose decision cuts (multi-label).
        batch_size: rows at a time that times are measured at and chosen by.
        output: folder for traces; None: `calibration/` in the engines folder.
        threads: CPU threads; None: as in `runtime.Engine.load`.
        seed: deals rows into the parts for cross-fitting; from 0.

    Raises:
        InputError: a wish that wishes for nothing or for two things, a rule that does not exist,
            or a number out of its range.

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
    measures: tuple[Measure, ...] = tuple(Measure)
    target: str | None = None
    test: str | Path | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    unlabelled: bool = False
    tune_label_thresholds: bool = False
    batch_size: int = 32
    output: str | Path | None = None
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.goals and self.bound is None:
            raise InputError("nothing is wished for", "give a wish or a bound")
        names = [self.name] if self.bound is not None else list(self.goals)
        for name in names:
            if not is_name(name):
                raise InputError(
                    f"an operating point is named {name!a}",
                    "give a name that can be read and typed",
                )
        for name, goal in self.goals.items():
            _check_wish(name, goal)
        for rule in self.rules:
            if rule not in RULES:
                raise InputError(f"there is no exit rule {rule!r}", f"choose of {', '.join(RULES)}")
        if not self.measures:
            raise InputError("no similarity measure is given", "give one, or leave measures out")
        for setting, least in (("batch_size", 1), ("seed", 0)):
            if getattr(self, setting) < least:
                raise InputError(
                    f"{setting} is {getattr(self, setting)}", f"give a number from {least}"
                )


def is_name(name: str) -> bool:
    """Whether an operating point may be called so: people read and type it."""
    return bool(name) and name.isprintable()


def _check_wish(name: str, goal: Goal) -> None:
    given = [value for value in (goal.max_drop, goal.speedup) if value is not None]
    if len(given) != 1:
        raise InputError(
            f"the wish {name!r} has {len(given)} of max_drop and speedup", "give it one of them"
        )
    low, high = (0.0, 100.0) if goal.speedup is None else (1.0, math.inf)
    if not low <= given[0] <= high or math.isinf(given[0]):
        raise InputError(
            f"the wish {name!r} is {given[0]:g}",
            "give max_drop in points, 0 to 100, or a speedup of at least 1",
        )
