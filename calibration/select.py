"""Choose a setting for a wish, and judge it on rows that did not choose it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from itertools import compress

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..runtime.distributions import Answers, Measure
from ..runtime.operating_point import Wish
from .outcome import drop_interval, exits_of
from .per_exit import PerExit
from .scoring import Scorer
from .settings import PER_EXIT, Candidate, Front, Settings
from .stopping import Family, StopScores, families
from .sweep import Sweep
from .weighing import COST, Weighing

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
        weighing: the rows and what they cost.
        families: rules whose thresholds are swept.
        fitted: rules that also get a threshold for each exit.
        seed: of the parts that rows are dealt into.
    """

    def __init__(
        self,
        weighing: Weighing,
        families: Sequence[Family],
        fitted: Sequence[Family] = (),
        seed: int = 0,
    ) -> None:
        self.weighing = weighing
        self._families = list(families)
        rows = len(weighing.rows)
        self.parts = np.random.default_rng(seed).permutation(np.arange(rows) % PARTS)
        self._per_exit = PerExit(weighing, fitted, self.parts)
        self._sweeps = [Sweep(family, family.grid) for family in self._families]
        sizes = [len(sweep.grid) for sweep in self._sweeps]
        self._starts = np.cumsum([0, *sizes])
        self._kinds = np.repeat([family.rule.name for family in self._families], sizes)
        self._sums = np.concatenate(
            [sweep.sums(weighing.terms, self.parts) for sweep in self._sweeps], axis=1
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
        self, wish: Wish, kinds: Collection[str], using: frozenset[int] = ALL
    ) -> Candidate | None:
        """The best setting for a wish.

        A drop is granted if *choosing* keeps to it: with each part of the rows by the setting
        that the other parts choose. Thousands of settings compete, and the best of them was
        lucky with the rows that chose it; so less is asked of the estimate until that holds.

        Args:
            wish: what is asked for.
            kinds: of the settings to choose from, see `Candidate.kind`.
            using: the parts of the rows that choose.

        Returns:
            The setting; None if only full depth grants the wish.

        Raises:
            InputError: nothing is so fast.
        """
        if wish.max_drop is None:
            assert wish.speedup is not None
            return self._front(kinds, using, wish).as_fast_as(wish.speedup)
        found = [self._granted(wish, kinds, using)]
        sure = msgspec.structs.replace(wish, surely=True)
        if self.weighing.is_summed(sure) and not wish.surely:
            # What is sure to be granted is granted, and may be faster.
            found.append(self._granted(sure, kinds, using))
        rows = self.rows_of(using)

        def cost(chosen: Candidate) -> float:
            return float(self.weighing.costs[self._exits(chosen, rows) - 1, rows].mean())

        return min((chosen for chosen in found if chosen is not None), key=cost, default=None)

    def _granted(
        self, wish: Wish, kinds: Collection[str], using: frozenset[int]
    ) -> Candidate | None:
        """The fastest setting within so much of a drop that choosing it keeps to the wish."""
        assert wish.max_drop is not None
        limit = wish.max_drop / 100
        if not self.weighing.is_summed(wish):
            return self._surely(limit, kinds, using)
        for share in _SHARES:
            if self._keeps(wish, share * limit, kinds, using):
                return self._front(kinds, using, wish).within(share * limit)
        return None

    def held_out(self, wish: Wish, kinds: Collection[str]) -> Answers:
        """The exits `[rows]`, each part's by the setting that the other parts choose."""
        exits = np.full(len(self.weighing.rows), self.weighing.rows.exits, np.int64)
        for part in ALL:
            numbers = self.rows_of(frozenset({part}))
            exits[numbers] = self._exits(self.choose(wish, kinds, ALL - {part}), numbers)
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
            drops=self.weighing.drops(sums, rows),
            full_cost=float(self.weighing.costs[-1][rows].mean()),
            candidate=candidate,
        )

    def _front(self, kinds: Collection[str], using: frozenset[int], wish: Wish) -> Front:
        """The settings that serve wishes like this one."""
        key = frozenset(kinds), using, wish.surely
        if key not in self._fronts:
            settings = self.settings(kinds, using)
            bounds = self.weighing.bounds(wish, settings.sums, self.rows_of(using))
            self._fronts[key] = Front.of(settings, bounds)
        return self._fronts[key]

    def _keeps(
        self, wish: Wish, limit: float, kinds: Collection[str], using: frozenset[int]
    ) -> bool:
        """Whether choosing within a limit grants the wish on rows that did not choose."""
        assert wish.max_drop is not None
        terms = self.weighing.terms
        sums = np.zeros(terms.shape[2])
        for part in using:
            numbers = self.rows_of(frozenset({part}))
            chosen = self._front(kinds, using - {part}, wish).within(limit)
            sums += terms[self._exits(chosen, numbers) - 1, numbers].sum(axis=0)
        bound = self.weighing.bounds(wish, sums[None], self.rows_of(using))[0]
        return bool(bound <= wish.max_drop / 100)

    def _exits(self, chosen: Candidate | None, numbers: NDArray[np.intp]) -> Answers:
        """The exits of some rows."""
        rows = self.weighing.rows
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
        rows = self.weighing.rows.take(self.rows_of(using))
        scorer = Scorer(rows, self.weighing.scorer.metric)
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
    weighing: Weighing, rules: Sequence[str], measures: Sequence[Measure], seed: int = 0
) -> Selector:
    """All settings of some rules, with a threshold for each exit where that may win.

    Args:
        weighing: the rows and what they cost.
        rules: names of exit rules.
        measures: similarity measures of `fpabee` and `either`.
        seed: of the parts that rows are dealt into.
    """
    stop = StopScores(weighing.rows)
    firsts = range(1, max(2, weighing.rows.exits))
    swept = families(stop, rules, measures, firsts)
    fitted = families(
        stop,
        [name for name in _FITTED_RULES if name in rules],
        [measure for measure in _FITTED_MEASURES if measure in measures],
        patiences=[1],
    )
    return Selector(weighing, list(swept), list(fitted), seed)
