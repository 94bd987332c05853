"""Choose a setting for a goal, and judge the choice on rows that did not take part in it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.operating_point import Goal
from ..runtime.rules.measures import Answers, Measure
from ..runtime.rules.rules import RULES, ExitRule
from .outcome import drop_interval, exits_of
from .per_exit import PerExit
from .scoring import Scorer
from .settings import Candidate, Front, Settings
from .stopping_costs import COST, StoppingCosts
from .sweep import Family, StopScores, Sweep, families

PARTS = 5
"""How many parts rows are dealt into for cross-fitting."""

ALL = frozenset(range(PARTS))
# How many settings are tried if the upper bound of a metric needs a bootstrap.
_TRIED = 60
# Shares of the allowed drop that the estimate may reach; the first is taken whose choices hold.
_SHARES = tuple(np.linspace(1.0, 0.0, 9))
# Measures that are also fitted per exit, since that takes long.
_FITTED_MEASURES = (Measure.JSKD, Measure.REKD)


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
        self._sweeps = [Sweep(family, family.grid) for family in families]
        self._sums = [sweep.sums(stopping_costs.terms, self.parts) for sweep in self._sweeps]
        self._fronts: dict[tuple[frozenset[str], frozenset[int], bool], Front] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rules that there are, see `Candidate.kind`."""
        swept = [Candidate(sweep.family.rule) for sweep in self._sweeps]
        fitted = [Candidate(family.rule, fitted=True) for family in self._fitted]
        return tuple(dict.fromkeys(candidate.kind for candidate in [*swept, *fitted]))

    def choose(
        self, goal: Goal, kinds: Collection[str], using: frozenset[int] = ALL
    ) -> Candidate | None:
        """The best setting for a goal.

        A drop is accepted if *choosing* keeps to it: each part of the rows is scored with the
        setting that is chosen on the other parts. Thousands of settings compete, and the best of
        them was lucky with the rows that chose it, so its estimate must be smaller until that
        holds.

        Args:
            goal: what is asked for.
            kinds: the kinds of settings to choose from, see `Candidate.kind`.
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

        def cost(chosen: Candidate) -> float:
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
        sweeps = []
        for sweep, each in zip(self._sweeps, self._sums, strict=True):
            if sweep.family.rule.name in kinds:
                sweeps.append(sweep)
                sums.append(each[list(using)].sum(axis=0))
        starts = np.cumsum([0, *(len(sweep.grid) for sweep in sweeps)])
        fitted: list[ExitRule] = []
        for family in self._fitted:
            if Candidate(family.rule, fitted=True).kind in kinds:
                found = self._per_exit.settings(family, using)
                fitted += found
                sums.append(np.array(list(found.values())))

        def candidate(number: int) -> Candidate:
            if number >= starts[-1]:
                return Candidate(fitted[number - starts[-1]], fitted=True)
            which = int(np.searchsorted(starts, number, side="right")) - 1
            sweep = sweeps[which]
            threshold = float(sweep.grid[number - starts[which]])
            return Candidate(sweep.family.with_threshold(threshold))

        together = np.concatenate(sums)
        return Settings(
            sums=together,
            costs=together[:, COST] / len(rows),
            drops=self.stopping_costs.drops(together, rows),
            full_cost=float(self.stopping_costs.costs[-1][rows].mean()),
            candidate=candidate,
        )

    def _within_drop(
        self, goal: Goal, kinds: Collection[str], using: frozenset[int]
    ) -> Candidate | None:
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

    def _exits(self, chosen: Candidate | None, numbers: NDArray[np.intp]) -> Answers:
        """The exits of some rows; full depth if nothing is chosen."""
        rows = self.stopping_costs.rows
        if chosen is None:
            return np.full(len(numbers), rows.exits, np.int64)
        return exits_of(chosen.rule, rows.take(numbers))

    def _bootstrapped(
        self, limit: float, kinds: Collection[str], using: frozenset[int]
    ) -> Candidate | None:
        """The first setting whose bootstrap bound is within the limit, if there is one."""
        settings = self.settings(kinds, using)
        fits = np.flatnonzero(settings.drops <= limit)
        fits = fits[np.lexsort((settings.drops[fits], settings.costs[fits]))]
        rows = self.stopping_costs.rows.take(self.rows_of(using))
        scorer = Scorer(rows, self.stopping_costs.scorer.metric)
        for number in fits[:_TRIED]:
            candidate = settings.candidate(int(number))
            exits = exits_of(candidate.rule, rows)
            bound = drop_interval(scorer, exits, level=0.9)[1]
            if candidate.fitted:  # to these rows: the bound is as much too low as their drop
                own = scorer.full_depth - scorer.score(exits)
                bound += 100 * max(0.0, float(settings.drops[number]) - own)
            if bound <= 100 * limit:
                return candidate
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
    swept = families(stop, rules, measures, first_exits)
    fitted_rules = [name for name in rules if RULES[name].fits_per_exit]
    fitted_measures = [measure for measure in _FITTED_MEASURES if measure in measures]
    fitted = families(stop, fitted_rules, fitted_measures, patiences=[1])
    return Selector(stopping_costs, list(swept), list(fitted), seed)
