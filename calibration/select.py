"""Choose a setting, and judge it on rows that did not choose it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.distributions import Answers, Array, Measure
from ..runtime.errors import InputError
from ..runtime.exit_rules import ExitRule
from ..runtime.operating_point import Wish
from .losses import expected_losses, observed_losses, shrunk, upper_bound
from .outcome import drop_interval, exits_of
from .per_exit import fit_path
from .scoring import AGREEMENT, Rows, Scorer
from .stopping import Family, StopScores, families
from .sweep import Sweep

PARTS = 5
"""Parts that rows are dealt into for cross-fitting."""

PER_EXIT = " per exit"
"""What the kind of a rule ends with that has a threshold fitted for each exit."""

ALL = frozenset(range(PARTS))
# Of settings that wish for a sure bound on a metric without a formula, how many are tried.
_TRIED = 60

_FITTED_RULES = ("entropy", "energy", "fpabee")
_FITTED_MEASURES = (Measure.JSKD, Measure.REKD)

# What is summed over rows for every setting.
_COST, _OBSERVED, _EXPECTED, _SQUARES, _LOST, _WON, _METRIC = range(7)


class Weighing:
    """What stopping a row at an exit costs and loses.

    Args:
        rows: the rows.
        metric: the score, see `scoring.METRICS`.
        costs: `[exits, rows]` time until an exit.

    Attributes:
        rows: the rows.
        scorer: the metric of them.
        costs: as given.
        losses: `[exits, rows]` that settings are fitted to: expected ones where the metric
            has them.
        terms: `[exits, rows, terms]` that settings are chosen by.
    """

    def __init__(self, rows: Rows, metric: str, costs: Array) -> None:
        self.rows = rows
        self.scorer = Scorer(rows, metric)
        self.costs = costs
        observed = observed_losses(self.scorer)
        if self.scorer.is_row_mean and metric != AGREEMENT:
            self.losses = expected_losses(rows, self.scorer)
        else:
            self.losses = observed
        terms = [
            costs,
            observed,
            self.losses,
            np.square(observed - self.losses),
            (observed > 0).astype(np.float64),
            (observed < 0).astype(np.float64),
        ]
        self.terms = np.concatenate([np.stack(terms, axis=-1), self.scorer.sums], axis=-1)

    def drops(self, sums: Array, rows: float) -> Array:
        """Estimated drops as shares, of sums `[settings, terms]` over some rows."""
        if self.scorer.is_row_mean:
            return shrunk(sums[:, _OBSERVED], sums[:, _EXPECTED], sums[:, _SQUARES], rows)
        return self.scorer.full_depth - self.scorer.value(sums[:, _METRIC:], rows)


@dataclass(frozen=True)
class Candidate:
    """A setting that may be chosen.

    Attributes:
        rule: the rule.
        fitted: whether its thresholds were fitted exit by exit.
    """

    rule: ExitRule
    fitted: bool = False

    @property
    def kind(self) -> str:
        """The rule's name, told apart if it has a threshold for each exit."""
        return self.rule.name + PER_EXIT if self.fitted else self.rule.name


@dataclass(frozen=True)
class Settings:
    """Settings, and what each gives on some rows.

    Attributes:
        sums: `[settings, terms]` over the rows.
        costs: `[settings]` mean time of a row.
        drops: `[settings]` estimated drop, as a share.
        full_cost: mean time of a row at full depth.
        rows: how many rows.
        candidate: a setting by its number.
    """

    sums: Array
    costs: Array
    drops: Array
    full_cost: float
    rows: int
    candidate: Callable[[int], Candidate]

    def front(self) -> NDArray[np.intp]:
        """Numbers of the settings that no other beats, by rising drop."""
        order = np.lexsort((self.costs, self.drops))
        cheapest = np.minimum.accumulate(self.costs[order])
        return np.asarray(order[np.append(True, cheapest[1:] < cheapest[:-1])])


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
        self._fitted = list(fitted)
        rows = len(weighing.rows)
        self.parts = np.random.default_rng(seed).permutation(np.arange(rows) % PARTS)
        self._sweeps = [Sweep(family, family.grid) for family in self._families]
        sizes = [len(sweep.grid) for sweep in self._sweeps]
        self._starts = np.cumsum([0, *sizes])
        self._kinds = np.repeat([family.rule.name for family in self._families], sizes)
        self._sums = np.concatenate(
            [sweep.sums(weighing.terms, self.parts) for sweep in self._sweeps], axis=1
        )
        self._paths: dict[frozenset[int], tuple[list[Candidate], Array]] = {}
        self._fits: dict[tuple[ExitRule, frozenset[int]], list[ExitRule]] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of rules there are, see `Candidate.kind`."""
        fitted = [family.rule.name + PER_EXIT for family in self._fitted]
        return tuple(dict.fromkeys([*map(str, self._kinds), *fitted]))

    def narrowed(self, keep: Callable[[Candidate], bool]) -> Selector:
        """The same rows and parts with fewer settings; thresholds are not looked at."""
        kept = [keep(Candidate(family.rule)) for family in self._families]
        sizes = [len(sweep.grid) for sweep in self._sweeps]
        settings = np.repeat(kept, sizes)
        other = copy.copy(self)
        other._families = list(compress(self._families, kept))
        other._fitted = [family for family in self._fitted if keep(Candidate(family.rule, True))]
        other._sweeps = list(compress(self._sweeps, kept))
        other._starts = np.cumsum([0, *compress(sizes, kept)])
        other._kinds, other._sums = self._kinds[settings], self._sums[:, settings]
        other._paths = {}
        for using, (candidates, sums) in self._paths.items():
            fitted = [keep(candidate) for candidate in candidates]
            other._paths[using] = list(compress(candidates, fitted)), sums[np.array(fitted, bool)]
        return other

    def choose(
        self, wish: Wish, kinds: Collection[str], using: frozenset[int] = ALL
    ) -> Candidate | None:
        """The best setting for a wish.

        Args:
            wish: what is asked for.
            kinds: of the settings to choose from, see `Candidate.kind`.
            using: the parts of the rows that choose.

        Returns:
            The setting; None if only full depth grants the wish.

        Raises:
            InputError: nothing is so fast.
        """
        settings = self.settings(kinds, using)
        chosen = self._best(wish, settings, using)
        return None if chosen is None else settings.candidate(chosen)

    def held_out(self, wish: Wish, kinds: Collection[str]) -> Answers:
        """The exits `[rows]`, each part's by the setting that the other parts choose."""
        exits = np.full(len(self.weighing.rows), self.weighing.rows.exits, np.int64)
        for part in ALL:
            chosen = self.choose(wish, kinds, ALL - {part})
            numbers = self.rows_of(frozenset({part}))
            if chosen is not None:
                exits[numbers] = exits_of(chosen.rule, self.weighing.rows.take(numbers))
        return exits

    def rows_of(self, parts: frozenset[int]) -> NDArray[np.intp]:
        """Numbers of the rows of some parts."""
        return np.flatnonzero(np.isin(self.parts, list(parts)))

    def settings(self, kinds: Collection[str], using: frozenset[int] = ALL) -> Settings:
        """Every setting of some kinds, and what it gives on some parts of the rows."""
        fitted, fitted_sums = self._path(using)
        rows = len(self.rows_of(using))
        sums = np.concatenate([self._sums[sorted(using)].sum(axis=0), fitted_sums])
        named = np.concatenate([self._kinds, [candidate.kind for candidate in fitted]])
        numbers = np.flatnonzero(np.isin(named, list(kinds)))
        full = self.weighing.costs[-1][self.rows_of(using)].mean()
        return Settings(
            sums=sums[numbers],
            costs=sums[numbers, _COST] / rows,
            drops=self.weighing.drops(sums[numbers], rows),
            full_cost=float(full),
            rows=rows,
            candidate=lambda number: self._candidate(int(numbers[number]), fitted),
        )

    def _path(self, using: frozenset[int]) -> tuple[list[Candidate], Array]:
        """Settings with thresholds for each exit, fitted to some parts of the rows.

        The sums are cross-fitted: each part's are those of the thresholds that the same price
        makes on the other parts.
        """
        if using not in self._paths:
            found: dict[ExitRule, Array] = {}
            for family in self._fitted:
                sums = np.sum([self._judged(family, using, part) for part in using], axis=0)
                for rule, row in zip(self._rules(family, using), sums, strict=True):
                    found.setdefault(rule, row)
            candidates = [Candidate(rule, fitted=True) for rule in found]
            width = self.weighing.terms.shape[2]
            rows = np.array(list(found.values())).reshape(len(candidates), width)
            self._paths[using] = candidates, rows
        return self._paths[using]

    def _judged(self, family: Family, using: frozenset[int], part: int) -> Array:
        """`[prices, terms]` over one part, with thresholds fitted to the others."""
        numbers = self.rows_of(frozenset({part}))
        terms, every = self.weighing.terms[:, numbers], np.arange(len(numbers))
        own = Family(family.rule, family.scores[:, numbers])
        return np.array(
            [
                terms[_stops(own, rule) - 1, every].sum(axis=0)
                for rule in self._rules(family, using - {part} or using)
            ]
        )

    def _rules(self, family: Family, using: frozenset[int]) -> list[ExitRule]:
        """A rule for each price, fitted to some parts of the rows."""
        key = family.rule, using
        if key not in self._fits:
            numbers = self.rows_of(using)
            costs, losses = self.weighing.costs[:, numbers], self.weighing.losses[:, numbers]
            part = Family(family.rule, family.scores[:, numbers])
            self._fits[key] = list(fit_path(part, costs, losses))
        return self._fits[key]

    def _best(self, wish: Wish, settings: Settings, using: frozenset[int]) -> int | None:
        costs, drops = settings.costs, settings.drops
        if wish.max_drop is None:
            assert wish.speedup is not None
            fast = np.flatnonzero(costs <= settings.full_cost / wish.speedup)
            if not len(fast):
                most = int(costs.argmin())
                raise InputError(
                    f"nothing is {wish.speedup:g} times as fast here: the most is "
                    f"{settings.full_cost / costs[most]:.2f} times, with an estimated drop of "
                    f"{100 * drops[most]:.1f} points",
                    "wish for less, or train with an earlier exit",
                )
            return int(fast[np.lexsort((costs[fast], drops[fast]))[0]])
        limit = wish.max_drop / 100
        row_mean = self.weighing.scorer.is_row_mean
        bounds = drops
        if wish.surely and row_mean:
            lost, won = settings.sums[:, _LOST], settings.sums[:, _WON]
            bounds = np.maximum(drops, upper_bound(won, lost, settings.rows))
        fits = np.flatnonzero(bounds <= limit)
        fits = fits[np.lexsort((drops[fits], costs[fits]))]
        if wish.surely and not row_mean:
            fits = self._sure(limit, settings, fits[:_TRIED], using)
        return int(fits[0]) if len(fits) else None

    def _sure(
        self,
        limit: float,
        settings: Settings,
        fits: NDArray[np.intp],
        using: frozenset[int],
    ) -> NDArray[np.intp]:
        """The first setting whose bootstrap bound is within the limit, if there is one."""
        rows = self.weighing.rows.take(self.rows_of(using))
        scorer = Scorer(rows, self.weighing.scorer.metric)
        for position, number in enumerate(fits):
            candidate = settings.candidate(int(number))
            exits = exits_of(candidate.rule, rows)
            bound = drop_interval(scorer, exits, level=0.9)[1]
            if candidate.fitted:  # to these rows: as much too low as their drop is
                own = scorer.full_depth - scorer.score(exits)
                bound += 100 * max(0.0, float(settings.drops[number]) - own)
            if bound <= 100 * limit:
                return fits[position : position + 1]
        return fits[:0]

    def _candidate(self, number: int, fitted: list[Candidate]) -> Candidate:
        swept = int(self._starts[-1])
        if number >= swept:
            return fitted[number - swept]
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


def _stops(family: Family, rule: ExitRule) -> Answers:
    """The exits of a fitted rule, by its family's stop scores."""
    numbers: Any = vars(rule)["threshold"]
    below = family.scores < family.sign * np.asarray(numbers)[:, None]
    below[-1] = True
    return np.asarray(below.argmax(axis=0) + 1)
