"""Choose a setting for a goal on average, and judge a choice on rows that did not take part."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from functools import cached_property

import numpy as np

from ..runtime.artifact.operating_point import Goal
from ..runtime.errors import InputError
from ..runtime.rules.measures import Array, Integers
from ..runtime.rules.rules import ExitRule
from .costs import StoppingCosts
from .search import PARTS, Family, deal, exits_of, make_families

# The estimated drop must stay below the goal by `_RESERVE / rows ** _RESERVE_POWER`, which is 0.085
# points at 1,000 rows, but by at most the share `_MOST_RESERVE` of it: the fastest of many settings
# was lucky with the rows that chose it, the more so the fewer they are.
_RESERVE, _RESERVE_POWER, _MOST_RESERVE = 6.75, 1.3, 0.75


Make = Callable[[StoppingCosts], list[Family]]
"""Makes the settings that compete on some rows."""

Choice = Callable[["Search"], ExitRule | None]
"""Chooses a rule among the settings on some rows; None means full depth."""


class Search:
    """All settings that compete on some rows, with what they cost and lose.

    Args:
        costs: the rows, and what they cost and lose.
        make: makes the settings.
    """

    def __init__(self, costs: StoppingCosts, make: Make = make_families) -> None:
        self.stopping_costs = costs
        self._make = make
        self._full_cost = float(costs.costs[-1].mean())

    @cached_property
    def families(self) -> list[Family]:
        """The settings."""
        return self._make(self.stopping_costs)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rules that there are, see `kind_of`."""
        return tuple(dict.fromkeys(family.kind for family in self.families))

    @cached_property
    def _known(self) -> list[tuple[Array, Array]]:
        """Estimated drops and mean costs `[settings]` of each family."""
        costs = self.stopping_costs
        return [(costs.drops(each.exits), costs.mean_costs(each.exits)) for each in self.families]

    def choose(self, goal: Goal, kinds: Collection[str] = ()) -> ExitRule | None:
        """The best setting for a goal.

        For a drop, this is the fastest setting whose estimated drop is at most the goal, less a
        reserve (`_RESERVE`). An estimate that falls from a cautious setting to a bolder one of its
        family is taken for luck, so the larger one counts for both.

        Args:
            goal: what is asked for; whether it is guaranteed makes no difference here.
            kinds: the kinds of settings to choose from, see `kind_of`; empty means all.

        Returns:
            The setting; None for full depth, if no faster setting qualifies.

        Raises:
            InputError: no setting is as fast as the goal demands.
        """
        chosen = [n for n, family in enumerate(self.families) if not kinds or family.kind in kinds]
        rules = [rule for number in chosen for rule in self.families[number].rules]
        none = np.empty(0)
        costs = np.concatenate([none, *(self._known[number][1] for number in chosen)])
        drops = [self._known[number][0] for number in chosen]
        if goal.speedup is not None:
            place = self._as_fast_as(goal.speedup, np.concatenate([none, *drops]), costs)
            return rules[place] if costs[place] < self._full_cost else None
        assert goal.max_drop is not None
        allowed = goal.max_drop / 100
        reserve = _RESERVE / len(self.stopping_costs.rows) ** _RESERVE_POWER
        allowed -= min(reserve, _MOST_RESERVE * allowed)
        worst = np.concatenate([none, *map(np.maximum.accumulate, drops)])
        within = np.where(worst <= allowed + 1e-12, costs, np.inf)
        found = within.min(initial=np.inf) < self._full_cost
        return rules[int(within.argmin())] if found else None

    def _as_fast_as(self, speedup: float, drops: Array, costs: Array) -> int:
        """The setting with the smallest drop among those that reach a speed-up."""
        if not len(costs):
            raise InputError("no setting stops a row early", "choose among other rules")
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

    @cached_property
    def _folds(self) -> list[Search]:
        """The same on all rows but those of one part, for each part."""
        parts, costs = deal(len(self.stopping_costs.rows)), self.stopping_costs
        return [
            Search(costs.take(np.flatnonzero(parts != part)), self._make) for part in range(PARTS)
        ]

    def held_out(self, choose: Choice) -> Integers:
        """The exits `[rows]`: in each part by the setting that is chosen on the other parts.

        Args:
            choose: chooses on some rows. None, or an error since nothing qualifies, means full
                depth.
        """
        rows = self.stopping_costs.rows
        exits = np.full(len(rows), rows.exits[-1], np.int64)
        parts = deal(len(rows))
        for part, search in enumerate(self._folds):
            with suppress(InputError):
                if (rule := choose(search)) is not None:
                    numbers = np.flatnonzero(parts == part)
                    exits[numbers] = exits_of(rule, rows.take(numbers))
        return exits
