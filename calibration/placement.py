"""Choose which exits to keep, from a trace and measured times: no model runs again.

Every exit costs its head, and one more place where rows are regrouped; and rules that
compare neighbours compare others when an exit is gone. So the rule is chosen anew on what
is left. Exits are dropped one by one, each time the one whose loss serves the wish best
(backward elimination), down to the last exit, which always stays: it is full depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.distributions import Measure
from ..runtime.errors import InputError
from ..runtime.exit_rules import Budget, ExitRule
from ..runtime.operating_point import Wish
from ..runtime.shown import Progress
from .costs import CostModel
from .outcome import exits_of
from .scoring import Rows
from .select import every_setting
from .weighing import Weighing

# Fewer exits are taken as long as they cost no more than this share: an exit also costs what
# the segments' times do not hold.
_TIE = 1e-3


@dataclass(frozen=True)
class Step:
    """What some exits can give.

    Attributes:
        exits: those kept, counted from 1.
        rule: the best rule for the wish on them; None: it cannot be granted.
        seconds: mean estimated time of a row with it.
        drop: its estimated drop in points.
    """

    exits: tuple[int, ...]
    rule: ExitRule | None
    seconds: float
    drop: float


@dataclass(frozen=True)
class Placement:
    """Which exits to keep.

    Attributes:
        exits: those, counted from 1.
        steps: what was found for every number of exits, all of them first.
    """

    exits: tuple[int, ...]
    steps: tuple[Step, ...]


def choose_exits(
    rows: Rows,
    metric: str,
    wish: Wish,
    rule: ExitRule,
    costs: CostModel,
    progress: Progress = lambda what, done, total: None,
) -> Placement:
    """Choose exits for a wish.

    Args:
        rows: labelled rows at full depth.
        metric: see `scoring.METRICS`.
        wish: what is asked for.
        rule: whose kind and measure stay; its other settings are chosen anew.
        costs: measured times of the segments.
        progress: called with (what, done, total).
    """
    search = _Search(rows, metric, wish, rule, costs)
    kept = tuple(range(1, rows.exits + 1))
    steps = [search.step(kept)]
    while len(kept) > 1:
        progress("place exits", rows.exits - len(kept), rows.exits - 1)
        tried = [
            search.step(tuple(other for other in kept if other != number)) for number in kept[:-1]
        ]
        steps.append(min(tried, key=search.worth))
        kept = steps[-1].exits
    progress("place exits", rows.exits - 1, rows.exits - 1)
    best = min(map(search.worth, steps))
    good = [step for step in steps if search.is_as_good(step, best)]
    return Placement(good[-1].exits, tuple(steps))


class _Search:
    """Finds the best rule on some exits."""

    def __init__(
        self, rows: Rows, metric: str, wish: Wish, rule: ExitRule, costs: CostModel
    ) -> None:
        self.rows = rows
        self.metric = metric
        self.wish = wish
        self.name = rule.name
        measure = getattr(rule, "measure", None)
        self.measures: Sequence[Measure] = tuple(Measure) if measure is None else (measure,)
        self.costs = costs

    def step(self, exits: tuple[int, ...]) -> Step:
        """What exits can give."""
        rows = self.rows.keep_exits(exits)
        costs = self.costs.keep_exits(exits).row_costs(rows.lengths)
        if len(exits) == 1:
            is_fast = self.wish.max_drop is not None or self.wish.speedup == 1
            full_depth = Step(exits, Budget(exit=1), float(costs[-1].mean()), 0.0)
            return full_depth if is_fast else _refused(exits)
        weighing = Weighing(rows, self.metric, costs)
        selector = every_setting(weighing, [self.name], self.measures)
        try:
            chosen = selector.choose(self.wish, selector.kinds)
        except InputError:  # not as fast as was wished for
            return _refused(exits)
        rule = Budget(exit=len(exits)) if chosen is None else chosen.rule
        stops, every = exits_of(rule, rows), np.arange(len(rows))
        sums = weighing.terms[stops - 1, every].sum(axis=0)
        drop = weighing.drops(sums[None], every)[0]
        return Step(exits, rule, float(costs[stops - 1, every].mean()), 100 * float(drop))

    def worth(self, step: Step) -> tuple[float, float]:
        """Less is better: time where a drop is wished for, the drop where a time is."""
        if self.wish.max_drop is None:
            return step.drop, step.seconds
        return step.seconds, step.drop

    def is_as_good(self, step: Step, best: tuple[float, float]) -> bool:
        """Whether a step is the best one or hardly worse."""
        if self.wish.max_drop is None:
            return step.drop <= best[0] and step.seconds <= best[1] * (1 + _TIE)
        return step.seconds <= best[0] * (1 + _TIE)


def _refused(exits: tuple[int, ...]) -> Step:
    return Step(exits, None, np.inf, np.inf)
