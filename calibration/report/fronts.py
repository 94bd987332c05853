"""Score against speed-up: what the rules that matter give at every speed, on held-out rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...runtime.artifact.operating_point import Goal
from ...runtime.errors import InputError
from ...runtime.progress import Progress
from ...runtime.rules.base import ExitRule
from ..calibrate import SHOWN_RULES
from ..choose import Selector
from ..outcome import exits_of, outcome
from ..result import Calibration
from ..scoring import Scorer

MOST_CURVES = 6
_SPEEDS = 16


@dataclass(frozen=True)
class FrontSetting:
    """The setting with the smallest drop among those that are fast enough.

    Attributes:
        curve: the kind of rule.
        wished_speedup: the speed-up that was asked for.
        rule: the setting that all rows choose.
        estimated_speedup: by measured times of the segments, on rows that did not choose.
        drop: in points, on the same rows.
        mean_depth: in layers, on the same rows.
    """

    curve: str
    wished_speedup: float
    rule: ExitRule
    estimated_speedup: float
    drop: float
    mean_depth: float


def rule_fronts(result: Calibration, progress: Progress) -> list[FrontSetting]:
    """A curve for each rule that is always shown, and for the winners."""
    selector = result.selector
    everything = selector.settings(selector.kinds)
    fastest = everything.full_cost / float(everything.costs.min())
    speeds = np.geomspace(1.0, fastest * (1 - 1e-9), _SPEEDS).tolist()
    wanted = [*SHOWN_RULES, *(point.kind for point in result.points)]
    wanted += [comparison.kind for comparison in result.comparisons]
    kinds = [kind for kind in dict.fromkeys(wanted) if kind in selector.kinds][:MOST_CURVES]
    found = []
    for number, kind in enumerate(kinds):
        progress(f"report: {kind}", number, len(kinds))
        found += list(_curve(result, kind, selector, speeds))
    return found


def _curve(
    result: Calibration, kind: str, selector: Selector, speeds: list[float]
) -> Iterator[FrontSetting]:
    rows = result.rows if result.test is None else result.test
    scorer = Scorer(rows, selector.stopping_costs.scorer.metric)
    costs = result.costs[-1].row_costs(rows.lengths)
    for speed in speeds:
        goal = Goal(speedup=speed)
        try:
            rule = selector.choose(goal, [kind])
            if rule is None:
                return
            exits = exits_of(rule, rows) if result.test else selector.held_out(goal, [kind])
        except InputError:  # no setting of this kind is fast enough
            return
        held = outcome(scorer, exits, rows.lengths, costs, result.layers)
        yield FrontSetting(kind, speed, rule, held.estimated, held.drop, held.mean_depth)
