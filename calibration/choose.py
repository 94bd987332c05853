"""Choose a setting for a goal, and judge the choice on rows that did not take part in it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.operating_point import Goal
from ..runtime.errors import InputError
from ..runtime.rules.measures import Array, Integers, Measure
from ..runtime.rules.rules import ExitRule
from .families import PARTS, Family, deal, make_families
from .outcome import exits_of, resampled
from .stopping_costs import StoppingCosts

# How many samples are drawn from the rows to estimate how much a choice owes to luck.
_SAMPLES = 60
# A bootstrap hides part of the luck, since it takes the rows for the truth. The constants below
# make up for that. They were tuned on populations of the calibration study, with other seeds.
# A sample has `_SAMPLE_SIZE / noise ** _NOISE_POWER` times as many rows as there are, which may be
# more than all rows: the noisier the losses, the smaller the sample.
_SAMPLE_SIZE, _NOISE_POWER = 0.42, 1.5
# The choices of samples must stay below the allowed drop by `_RESERVE / rows ** _RESERVE_POWER`,
# which is 0.085 points at 1,000 rows, but by at most the share `_MOST_RESERVE` of it.
_RESERVE, _RESERVE_POWER, _MOST_RESERVE = 6.75, 1.3, 0.75
# Where no row is lost, samples do not vary, although new rows will. So a standard deviation counts
# as at least this many lost rows.
_LEAST_LOST_ROWS = 0.7
# Margins to try, as multiples of the standard deviation of a drop over the samples.
_MARGINS = np.linspace(0.0, 6.0, 97)


class Search:
    """All settings that compete, with what they cost and lose.

    Args:
        costs: the rows, and what they cost and lose.
        families: the settings.
        seed: of the samples.
    """

    def __init__(self, costs: StoppingCosts, families: Sequence[Family], seed: int = 0) -> None:
        self.stopping_costs = costs
        self.families = list(families)
        rows = len(costs.rows)
        size = max(1, round(rows * _SAMPLE_SIZE / costs.noise**_NOISE_POWER))
        drawn = resampled(rows, _SAMPLES, np.random.default_rng(seed), size) * (rows / size)
        # First the rows themselves, then samples of them.
        self._weights = np.concatenate([np.ones((1, rows)), drawn]).T
        self._full_cost = float(costs.costs[-1].mean())

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rules that there are, see `kind_of`."""
        return tuple(dict.fromkeys(family.kind for family in self.families))

    def choose(self, goal: Goal, kinds: Collection[str]) -> ExitRule | None:
        """The best setting for a goal.

        For a drop, this is the fastest setting whose drop, plus a margin, is at most the allowed
        drop. A setting's drop is the largest estimate among it and the more cautious settings of
        its family. The fastest of many settings was lucky with the rows that chose it, which is
        what the margin is for. It is a multiple of the standard deviation of the drop over samples
        of the rows, since a setting whose drop varies more owes more to luck. The multiple is found
        with the bootstrap (Efron 1979): samples choose with the same multiple, and the mean drop of
        what they choose, on all rows, must be at most the allowed drop, less a reserve
        (`_RESERVE`). Settings by which exit 0 answers rows owe more to luck than others, so both
        kinds have a margin of their own, and the faster of the two choices counts.

        Args:
            goal: what is asked for; whether it is guaranteed makes no difference here.
            kinds: the kinds of settings to choose from, see `kind_of`.

        Returns:
            The setting; None for full depth, if no faster setting qualifies.

        Raises:
            InputError: no setting is as fast as the goal demands.
        """
        chosen = [number for number, family in enumerate(self.families) if family.kind in kinds]
        groups = [chosen]
        if goal.max_drop is not None:
            by_exit_0 = [number for number in chosen if (self.families[number].exits == 0).any()]
            groups = [[number for number in chosen if number not in by_exit_0], by_exit_0]
        elif not chosen and goal.speedup is not None and goal.speedup > 1:
            raise InputError("no setting stops a row early", "choose among other rules")
        found = [self._choose(goal, group) for group in groups if group]
        cost, rule = min(found, key=lambda each: each[0], default=(self._full_cost, None))
        return rule if cost < self._full_cost else None

    def _choose(self, goal: Goal, chosen: Sequence[int]) -> tuple[float, ExitRule | None]:
        """The cost and rule of the best setting of some families; None stands for full depth."""
        drops = np.concatenate([self._known[number][0] for number in chosen])
        costs = np.concatenate([self._known[number][1] for number in chosen])
        place: int | None
        if goal.max_drop is None:
            assert goal.speedup is not None
            place = self._as_fast_as(goal.speedup, drops[:, 0], costs[:, 0])
        else:
            # An estimate that falls from a cautious setting to a bolder one is taken for luck.
            worst = [np.maximum.accumulate(self._known[number][0]) for number in chosen]
            place = self._within(goal.max_drop / 100, np.concatenate(worst), costs)
        if place is None:
            return self._full_cost, None
        rules = [rule for number in chosen for rule in self.families[number].rules]
        return float(costs[place, 0]), rules[place]

    @cached_property
    def _known(self) -> list[tuple[Array, Array]]:
        """Drops and costs `[settings, 1 + samples]` of each family."""
        costs, weights = self.stopping_costs, self._weights
        return [
            (costs.drops(family.exits, weights), costs.mean_costs(family.exits, weights))
            for family in self.families
        ]

    def _as_fast_as(self, speedup: float, drops: Array, costs: Array) -> int:
        """The setting with the smallest drop among those that reach a speed-up."""
        fast = np.flatnonzero(costs <= self._full_cost / speedup)
        if not len(fast):
            fastest = int(costs.argmin())
            raise InputError(
                f"no setting is {speedup:g} times as fast here: the fastest is "
                f"{self._full_cost / costs[fastest]:.2f} times as fast, with an estimated drop of "
                f"{100 * drops[fastest]:.1f} points",
                "ask for a smaller speed-up, or train a model with an earlier exit",
            )
        return int(fast[np.lexsort((costs[fast], drops[fast]))[0]])

    def _within(self, allowed: float, drops: Array, costs: Array) -> int | None:
        """The place of the fastest setting, with the smallest margin that keeps samples in bounds.

        Args:
            allowed: the allowed drop, as a share.
            drops: `[settings, 1 + samples]`, first on all rows; never falling within a family.
            costs: `[settings, 1 + samples]`.
        """
        rows = len(self.stopping_costs.rows)
        errors = np.maximum(drops[:, 1:].std(axis=1, keepdims=True), _LEAST_LOST_ROWS / rows)
        reserve = min(_RESERVE / rows**_RESERVE_POWER, _MOST_RESERVE * allowed)
        for margin in _MARGINS:
            within = np.where(drops + margin * errors <= allowed + 1e-12, costs, np.inf)
            numbers, found = within.argmin(axis=0), np.isfinite(within.min(axis=0))
            # A sample for which no setting qualifies chooses full depth, which loses nothing.
            if np.where(found, drops[numbers, 0], 0.0)[1:].mean() <= allowed - reserve + 1e-12:
                return int(numbers[0]) if found[0] else None
        return None


@dataclass(eq=False)
class Selector:
    """Chooses settings on rows, and on parts of them to judge the choice on the other parts.

    Attributes:
        stopping_costs: the rows, and what they cost and lose.
        rules: names of the rules that compete.
        measures: similarity measures that compete.
        seed: deals the rows into parts, and draws samples.
    """

    stopping_costs: StoppingCosts
    rules: Sequence[str]
    measures: Sequence[Measure]
    seed: int = 0

    @cached_property
    def search(self) -> Search:
        """The settings on all rows."""
        return self._search(self.stopping_costs)

    @cached_property
    def _folds(self) -> list[tuple[NDArray[np.intp], Search]]:
        """The numbers of each part's rows, and the settings on the rows of the other parts."""
        parts = deal(len(self.stopping_costs.rows), self.seed)
        return [
            (
                np.flatnonzero(parts == part),
                self._search(self.stopping_costs.take(np.flatnonzero(parts != part))),
            )
            for part in range(PARTS)
        ]

    def _search(self, costs: StoppingCosts) -> Search:
        families = make_families(costs, self.rules, self.measures, self.seed)
        return Search(costs, families, self.seed)

    def held_out(self, goal: Goal, kinds: Collection[str]) -> Integers:
        """The exits `[rows]`: in each part by the setting that is chosen on the other parts.

        If the other parts have no setting that is fast enough, the choice on all rows stands in.
        """
        rows = self.stopping_costs.rows
        exits = np.full(len(rows), rows.exits[-1], np.int64)
        for numbers, search in self._folds:
            try:
                rule = search.choose(goal, kinds)
            except InputError:
                rule = self.search.choose(goal, kinds)
            if rule is not None:
                exits[numbers] = exits_of(rule, rows.take(numbers))
        return exits
