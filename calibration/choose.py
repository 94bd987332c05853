"""Choose a setting for a wish, and judge it on rows that did not choose it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from itertools import compress

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.operating_point import Goal
from ..runtime.rules.measures import Answers, Measure
from .outcome import drop_interval, exits_of
from .per_exit import PerExit
from .scoring import Scorer
from .settings import PER_EXIT, Candidate, Front, Settings
from .stop_scores import Family, StopScores, families
from .stopping_costs import COST, StoppingCosts
from .sweep import Sweep

PARTS = 5
"""Parts that rows are dealt into for cross-fitting."""

ALL = frozenset(range(PARTS))
# Of settings that wish for a sure bound on a metric without a formula, how many are tried.
_TRIED = 60
# Shares of the drop wished for that are asked of the estimate, until choosing keeps to the wish.
_SHARES = tuple(np.linspace(1.0, 0.0, 9))

_FITTED_RULES = ("entropy", "energy", "fpabee")
_FITTED_MEASURES = (Measure.JSKD, Measure.REKD)


class Selector:
    """All settings of some families, ready to be chosen from.

    Args:
        stopping_costs: the rows and what they cost.
        families: rules whose thresholds are swept.
        fitted: rules that also get a threshold for each exit.
        seed: of the parts that rows are dealt into.
    """

    def __init__(
        self,
        stopping_costs: StoppingCosts,
        families: Sequence[Family],
        fitted: Sequence[Family] = (),
        seed: int = 0,
    ) -> None:
        self.stopping_costs = stopping_costs
        self._families = list(families)
        rows = len(stopping_costs.rows)
        self.parts = np.random.default_rng(seed).permutation(np.arange(rows) % PARTS)
        self._per_exit = PerExit(stopping_costs, fitted, self.parts)
        self._sweeps = [Sweep(family, family.grid) for family in self._families]
        sizes = [len(sweep.grid) for sweep in self._sweeps]
        self._starts = np.cumsum([0, *sizes])
        self._kinds = np.repeat([family.rule.name for family in self._families], sizes)
        self._sums = np.concatenate(
            [sweep.sums(stopping_costs.terms, self.parts) for sweep in self._sweeps], axis=1
        )
        self._fronts: dict[tuple[frozenset[str], frozenset[int], bool], Front] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of rules there are, see `Candidate.kind`."""
        fitted = [family.rule.name + PER_EXIT for family in self._per_exit.families]
        return tuple(dict.fromkeys([*map(str, self._kinds), *fitted]))

    def narrowed(self, keep: Callable[[Candidate], bool]) -> Selector:
        """The same rows and parts with fewer settings; thresholds are not looked at."""
        kept = [keep(Candidate(family.rule)) for family in self._families]
        sizes = [len(sweep.grid) for sweep in self._sweeps]
        settings = np.repeat(kept, sizes)
        other = copy.copy(self)
        other._families = list(compress(self._families, kept))
        other._per_exit = self._per_exit.narrowed(keep)
        other._sweeps = list(compress(self._sweeps, kept))
        other._starts = np.cumsum([0, *compress(sizes, kept)])
        other._kinds, other._sums = self._kinds[settings], self._sums[:, settings]
        other._fronts = {}
        return other

    def choose(
        self, goal: Goal, kinds: Collection[str], using: frozenset[int] = ALL
    ) -> Candidate | None:
        """The best setting for a wish.

        A drop is granted if *choosing* keeps to it: with each part of the rows by the setting
        that the other parts choose. Thousands of settings compete, and the best of them was
        lucky with the rows that chose it; so less is asked of the estimate until that holds.

        Args:
            goal: what is asked for.
            kinds: of the settings to choose from, see `Candidate.kind`.
            using: the parts of the rows that choose.

        Returns:
            The setting; None if only full depth grants the wish.

        Raises:
            InputError: nothing is so fast.
        """
        if goal.max_drop is None:
            assert goal.speedup is not None
            return self._front(kinds, using, goal).as_fast_as(goal.speedup)
        found = [self._granted(goal, kinds, using)]
        sure = msgspec.structs.replace(goal, guaranteed=True)
        if self.stopping_costs.is_summed(sure) and not goal.guaranteed:
            # What is sure to be granted is granted, and may be faster.
            found.append(self._granted(sure, kinds, using))
        rows = self.rows_of(using)

        def cost(chosen: Candidate) -> float:
            return float(self.stopping_costs.costs[self._exits(chosen, rows) - 1, rows].mean())

        return min((chosen for chosen in found if chosen is not None), key=cost, default=None)

    def _granted(
        self, goal: Goal, kinds: Collection[str], using: frozenset[int]
    ) -> Candidate | None:
        """The fastest setting within so much of a drop that choosing it keeps to the wish."""
        assert goal.max_drop is not None
        limit = goal.max_drop / 100
        if not self.stopping_costs.is_summed(goal):
            return self._surely(limit, kinds, using)
        for share in _SHARES:
            if self._keeps(goal, share * limit, kinds, using):
                return self._front(kinds, using, goal).within(share * limit)
        return None

    def held_out(self, goal: Goal, kinds: Collection[str]) -> Answers:
        """The exits `[rows]`, each part's by the setting that the other parts choose."""
        exits = np.full(len(self.stopping_costs.rows), self.stopping_costs.rows.exits, np.int64)
        for part in ALL:
            numbers = self.rows_of(frozenset({part}))
            exits[numbers] = self._exits(self.choose(goal, kinds, ALL - {part}), numbers)
        return exits

    def rows_of(self, parts: frozenset[int]) -> NDArray[np.intp]:
        """Numbers of the rows of some parts."""
        return np.flatnonzero(np.isin(self.parts, list(parts)))

    def settings(self, kinds: Collection[str], using: frozenset[int] = ALL) -> Settings:
        """Every setting of some kinds, and what it gives on some parts of the rows."""
        fitted, fitted_sums = self._per_exit.settings(using)
        rows = self.rows_of(using)
        swept = np.flatnonzero(np.isin(self._kinds, list(kinds)))
        kept = [number for number, candidate in enumerate(fitted) if candidate.kind in kinds]
        sums = np.concatenate(
            [np.sum([self._sums[part, swept] for part in using], axis=0), fitted_sums[kept]]
        )

        def candidate(number: int) -> Candidate:
            if number >= len(swept):
                return fitted[kept[number - len(swept)]]
            return self._swept(int(swept[number]))

        return Settings(
            sums=sums,
            costs=sums[:, COST] / len(rows),
            drops=self.stopping_costs.drops(sums, rows),
            full_cost=float(self.stopping_costs.costs[-1][rows].mean()),
            candidate=candidate,
        )

    def _front(self, kinds: Collection[str], using: frozenset[int], goal: Goal) -> Front:
        """The settings that serve wishes like this one."""
        key = frozenset(kinds), using, goal.guaranteed
        if key not in self._fronts:
            settings = self.settings(kinds, using)
            bounds = self.stopping_costs.bounds(goal, settings.sums, self.rows_of(using))
            self._fronts[key] = Front.of(settings, bounds)
        return self._fronts[key]

    def _keeps(
        self, goal: Goal, limit: float, kinds: Collection[str], using: frozenset[int]
    ) -> bool:
        """Whether choosing within a limit grants the wish on rows that did not choose."""
        assert goal.max_drop is not None
        terms = self.stopping_costs.terms
        sums = np.zeros(terms.shape[2])
        for part in using:
            numbers = self.rows_of(frozenset({part}))
            chosen = self._front(kinds, using - {part}, goal).within(limit)
            sums += terms[self._exits(chosen, numbers) - 1, numbers].sum(axis=0)
        bound = self.stopping_costs.bounds(goal, sums[None], self.rows_of(using))[0]
        return bool(bound <= goal.max_drop / 100)

    def _exits(self, chosen: Candidate | None, numbers: NDArray[np.intp]) -> Answers:
        """The exits of some rows."""
        rows = self.stopping_costs.rows
        if chosen is None:
            return np.full(len(numbers), rows.exits, np.int64)
        return exits_of(chosen.rule, rows.take(numbers))

    def _surely(
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
            if candidate.fitted:  # to these rows: as much too low as their drop is
                own = scorer.full_depth - scorer.score(exits)
                bound += 100 * max(0.0, float(settings.drops[number]) - own)
            if bound <= 100 * limit:
                return candidate
        return None

    def _swept(self, number: int) -> Candidate:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        sweep = self._sweeps[which]
        threshold = float(sweep.grid[number - self._starts[which]])
        return Candidate(sweep.family.with_threshold(threshold))


def every_setting(
    stopping_costs: StoppingCosts, rules: Sequence[str], measures: Sequence[Measure], seed: int = 0
) -> Selector:
    """All settings of some rules, with a threshold for each exit where that may win.

    Args:
        stopping_costs: the rows and what they cost.
        rules: names of exit rules.
        measures: similarity measures of `fpabee` and `either`.
        seed: of the parts that rows are dealt into.
    """
    stop = StopScores(stopping_costs.rows)
    firsts = range(1, max(2, stopping_costs.rows.exits))
    swept = families(stop, rules, measures, firsts)
    fitted = families(
        stop,
        [name for name in _FITTED_RULES if name in rules],
        [measure for measure in _FITTED_MEASURES if measure in measures],
        patiences=[1],
    )
    return Selector(stopping_costs, list(swept), list(fitted), seed)
