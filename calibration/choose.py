"""Choose a setting for a goal, and judge the choice on rows that did not take part in it."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.operating_point import Goal
from ..runtime.errors import InputError
from ..runtime.rules.base import ExitRule, ThresholdRule
from ..runtime.rules.measures import Answers, Array, Measure
from ..runtime.rules.rules import RULES
from .outcome import drop_interval, exits_of
from .per_exit import PerExit
from .scoring import Scorer
from .stopping_costs import COST, StoppingCosts
from .sweep import Family, StopScores

PARTS = 5
"""How many parts rows are dealt into for cross-fitting."""

ALL = frozenset(range(PARTS))
# How many settings are tried if the upper bound of a metric needs a bootstrap.
_TRIED = 60
# Shares of the allowed drop that the estimate may reach; the first is taken whose choices hold.
_SHARES = tuple(np.linspace(1.0, 0.0, 9))
# Measures that are also fitted per exit, since that takes long.
_FITTED_MEASURES = (Measure.JSKD, Measure.REKD)

PER_EXIT = " per exit"
"""The end of the kind of a rule that has one fitted threshold for each exit."""


def kind_of(rule: ExitRule) -> str:
    """The name of a rule, with `PER_EXIT` after it if it has a threshold for each exit."""
    fitted = isinstance(rule, ThresholdRule) and isinstance(rule.threshold, tuple)
    return rule.name + PER_EXIT if fitted else rule.name


@dataclass(frozen=True)
class Settings:
    """Settings, and what each of them gives on some rows.

    Attributes:
        sums: `[settings, terms]` over the rows, see `StoppingCosts.terms`.
        costs: `[settings]` mean seconds of a row.
        drops: `[settings]` estimated drop, as a share.
        full_cost: mean seconds of a row at full depth.
        rule: gives a setting by its number.
    """

    sums: Array
    costs: Array
    drops: Array
    full_cost: float
    rule: Callable[[int], ExitRule]

    def front(self, bounds: Array) -> Front:
        """The settings that no other setting beats in both cost and bound.

        Args:
            bounds: `[settings]` bound of the drop as a share, such as `drops`.
        """
        order = np.lexsort((self.costs, bounds))
        cheapest = np.minimum.accumulate(self.costs[order])
        numbers = order[np.append(True, cheapest[1:] < cheapest[:-1])]
        return Front(self, numbers, bounds[numbers], self.costs[numbers])


@dataclass(frozen=True)
class Front:
    """Settings that no other setting beats: each is cheaper than all with a smaller bound.

    Attributes:
        settings: all settings.
        numbers: the numbers of those in the front.
        bounds: of their drops as shares, ascending.
        costs: mean seconds of a row, descending.
    """

    settings: Settings
    numbers: NDArray[np.intp]
    bounds: Array
    costs: Array

    def within(self, limit: float) -> ExitRule | None:
        """The cheapest setting whose bound is at most a limit, as a share."""
        count = int(np.searchsorted(self.bounds, limit, side="right"))
        return self.settings.rule(int(self.numbers[count - 1])) if count else None

    def as_fast_as(self, speedup: float) -> ExitRule:
        """The setting with the smallest drop among those that reach a speed-up.

        Raises:
            InputError: no setting is that fast.
        """
        full_cost = self.settings.full_cost
        fast = np.flatnonzero(self.costs <= full_cost / speedup)
        if not len(fast):
            raise InputError(
                f"no setting is {speedup:g} times as fast here: the fastest is "
                f"{full_cost / self.costs[-1]:.2f} times as fast, with an estimated drop of "
                f"{100 * self.bounds[-1]:.1f} points",
                "ask for a smaller speed-up, or train a model with an earlier exit",
            )
        return self.settings.rule(int(self.numbers[fast[0]]))


class Selector:
    """All settings of some families, ready to be chosen from.

    Args:
        stopping_costs: the rows and what they cost.
        families: rules whose thresholds are swept.
        fitted: rules that also get a threshold for each exit.
        seed: deals the rows into parts.
    """

    def __init__(
        self,
        stopping_costs: StoppingCosts,
        families: Sequence[Family],
        fitted: Sequence[Family] = (),
        seed: int = 0,
    ) -> None:
        self.stopping_costs = stopping_costs
        rows = len(stopping_costs.rows)
        self.parts = np.random.default_rng(seed).permutation(np.arange(rows) % PARTS)
        self._fitted = list(fitted)
        self._per_exit = PerExit(stopping_costs, self.parts)
        self._families = list(families)
        self._sums = [family.sums(stopping_costs.terms, self.parts) for family in families]
        self._fronts: dict[tuple[frozenset[str], frozenset[int], bool], Front] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rules that there are, see `kind_of`."""
        swept = [family.rule.name for family in self._families]
        fitted = [family.rule.name + PER_EXIT for family in self._fitted]
        return tuple(dict.fromkeys([*swept, *fitted]))

    def choose(
        self, goal: Goal, kinds: Collection[str], using: frozenset[int] = ALL
    ) -> ExitRule | None:
        """The best setting for a goal.

        A drop is accepted if *choosing* keeps to it: each part of the rows is scored with the
        setting that is chosen on the other parts. Thousands of settings compete, and the best of
        them was lucky with the rows that chose it, so its estimate must be smaller until that
        holds.

        Args:
            goal: what is asked for.
            kinds: the kinds of settings to choose from, see `kind_of`.
            using: the parts of the rows that choose.

        Returns:
            The setting; None if only full depth meets the goal.

        Raises:
            InputError: no setting is as fast as the goal demands.
        """
        if goal.max_drop is None:
            assert goal.speedup is not None
            return self._front(kinds, using, goal).as_fast_as(goal.speedup)
        found = [self._within_drop(goal, kinds, using)]
        guaranteed = msgspec.structs.replace(goal, guaranteed=True)
        if self.stopping_costs.is_summed(guaranteed) and not goal.guaranteed:
            # A guaranteed setting also meets the goal, and may be faster.
            found.append(self._within_drop(guaranteed, kinds, using))
        rows = self.rows_of(using)

        def cost(chosen: ExitRule) -> float:
            return float(self.stopping_costs.costs[self._exits(chosen, rows) - 1, rows].mean())

        return min((chosen for chosen in found if chosen is not None), key=cost, default=None)

    def held_out(self, goal: Goal, kinds: Collection[str]) -> Answers:
        """The exits `[rows]`: in each part by the setting that is chosen on the other parts."""
        exits = np.zeros(len(self.stopping_costs.rows), np.int64)
        for part in ALL:
            numbers = self.rows_of(frozenset({part}))
            exits[numbers] = self._exits(self.choose(goal, kinds, ALL - {part}), numbers)
        return exits

    def rows_of(self, parts: frozenset[int]) -> NDArray[np.intp]:
        """The numbers of the rows in some parts."""
        return np.flatnonzero(np.isin(self.parts, list(parts)))

    def settings(self, kinds: Collection[str], using: frozenset[int] = ALL) -> Settings:
        """Every setting of some kinds, and what it gives on some parts of the rows."""
        rows = self.rows_of(using)
        sums = [np.zeros((0, self.stopping_costs.terms.shape[2]))]
        swept = []
        for family, each in zip(self._families, self._sums, strict=True):
            if family.rule.name in kinds:
                swept.append(family)
                sums.append(each[list(using)].sum(axis=0))
        starts = [0, *itertools.accumulate(len(family.grid) for family in swept)]
        fitted: list[ExitRule] = []
        for family in self._fitted:
            if family.rule.name + PER_EXIT in kinds:
                found = self._per_exit.settings(family, using)
                fitted += found
                sums.append(np.array(list(found.values())))

        def rule(number: int) -> ExitRule:
            if number >= starts[-1]:
                return fitted[number - starts[-1]]
            which = bisect.bisect(starts, number) - 1
            return swept[which].setting(number - starts[which])

        together = np.concatenate(sums)
        return Settings(
            sums=together,
            costs=together[:, COST] / len(rows),
            drops=self.stopping_costs.drops(together, rows),
            full_cost=float(self.stopping_costs.costs[-1][rows].mean()),
            rule=rule,
        )

    def _within_drop(
        self, goal: Goal, kinds: Collection[str], using: frozenset[int]
    ) -> ExitRule | None:
        """The fastest setting within such a share of the allowed drop that choosing it holds."""
        assert goal.max_drop is not None
        limit = goal.max_drop / 100
        if not self.stopping_costs.is_summed(goal):
            return self._bootstrapped(limit, kinds, using)
        for share in _SHARES:
            if self._holds(goal, share * limit, kinds, using):
                return self._front(kinds, using, goal).within(share * limit)
        return None

    def _holds(
        self, goal: Goal, limit: float, kinds: Collection[str], using: frozenset[int]
    ) -> bool:
        """Whether choosing within a limit meets the goal on rows that did not choose."""
        assert goal.max_drop is not None
        terms = self.stopping_costs.terms
        sums = np.zeros((1, terms.shape[2]))
        for part in using:
            numbers = self.rows_of(frozenset({part}))
            chosen = self._front(kinds, using - {part}, goal).within(limit)
            sums += terms[self._exits(chosen, numbers) - 1, numbers].sum(axis=0)
        bounds = self.stopping_costs.bounds(goal, sums, self.rows_of(using))
        return bool(bounds[0] <= goal.max_drop / 100)

    def _front(self, kinds: Collection[str], using: frozenset[int], goal: Goal) -> Front:
        """The best settings for goals like this one."""
        key = frozenset(kinds), using, goal.guaranteed
        if key not in self._fronts:
            settings = self.settings(kinds, using)
            bounds = self.stopping_costs.bounds(goal, settings.sums, self.rows_of(using))
            self._fronts[key] = settings.front(bounds)
        return self._fronts[key]

    def _exits(self, chosen: ExitRule | None, numbers: NDArray[np.intp]) -> Answers:
        """The exits of some rows; full depth if nothing is chosen."""
        rows = self.stopping_costs.rows
        if chosen is None:
            return np.full(len(numbers), rows.exits, np.int64)
        return exits_of(chosen, rows.take(numbers))

    def _bootstrapped(
        self, limit: float, kinds: Collection[str], using: frozenset[int]
    ) -> ExitRule | None:
        """The first setting whose bootstrap bound is within the limit, if there is one."""
        settings = self.settings(kinds, using)
        fits = np.flatnonzero(settings.drops <= limit)
        fits = fits[np.lexsort((settings.drops[fits], settings.costs[fits]))]
        rows = self.stopping_costs.rows.take(self.rows_of(using))
        scorer = Scorer(rows, self.stopping_costs.scorer.metric)
        for number in fits[:_TRIED]:
            rule = settings.rule(int(number))
            exits = exits_of(rule, rows)
            bound = drop_interval(scorer, exits, level=0.9)[1]
            # Fitted to these rows, a rule has a bound that is as much too low as its drop.
            if kind_of(rule) != rule.name:
                own = scorer.full_depth - scorer.score(exits)
                bound += 100 * max(0.0, float(settings.drops[number]) - own)
            if bound <= 100 * limit:
                return rule
        return None


def every_setting(
    stopping_costs: StoppingCosts, rules: Sequence[str], measures: Sequence[Measure], seed: int = 0
) -> Selector:
    """All settings of some rules, with a threshold for each exit where the rule asks for it.

    Args:
        stopping_costs: the rows and what they cost.
        rules: names of exit rules.
        measures: similarity measures to try.
        seed: deals the rows into parts for cross-fitting.
    """
    stop = StopScores(stopping_costs.rows)
    first_exits = range(1, max(2, stopping_costs.rows.exits))
    swept = stop.families(rules, measures, first_exits)
    fitted_rules = [name for name in rules if RULES[name].fits_per_exit]
    fitted_measures = [measure for measure in _FITTED_MEASURES if measure in measures]
    fitted = stop.families(fitted_rules, fitted_measures, patiences=[1])
    return Selector(stopping_costs, list(swept), list(fitted), seed)
