"""Choose a setting for a goal on average, and judge a choice on rows that did not take part."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.operating_point import Goal
from ..runtime.errors import InputError
from ..runtime.rules.measures import Array, Integers
from ..runtime.rules.rules import Budget, ExitRule
from .costs import StoppingCosts
from .search import Family, exits_of, make_families

# The estimated drop must stay below the goal by `_RESERVE / rows ** _RESERVE_POWER`, which is 0.085
# points at 1,000 rows, but by at most the share `_MOST_RESERVE` of it: the fastest of many settings
# was lucky with the rows that chose it, the more so the fewer they are.
_RESERVE = 6.75
_RESERVE_POWER = 1.3
_MOST_RESERVE = 0.9
PARTS = 5
"""How many parts rows are dealt into: each part is judged with what the others choose."""


Make = Callable[[StoppingCosts], list[Family]]
"""Makes the settings that compete on some rows."""


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
    def _settings(self) -> tuple[list[ExitRule], list[str], Array, Array, Array]:
        """Of full depth and of all settings: rules, kinds, mean costs, drops, and drops for goals.

        An estimate that falls from a cautious setting to a bolder one of its family is taken for
        luck: for goals, the larger one counts for both.
        """
        costs = self.stopping_costs
        families = self.families
        drops = [costs.drops(family.exits) for family in families]
        means = [costs.mean_costs(family.exits) for family in families]
        full_depth = Budget(exit=costs.rows.exits[-1])
        return (
            [full_depth, *(rule for family in families for rule in family.rules)],
            ["budget", *(family.kind for family in families for _ in family.rules)],
            np.concatenate([[self._full_cost], *means]),
            np.concatenate([[0.0], *drops]),
            np.concatenate([[0.0], *map(np.maximum.accumulate, drops)]),
        )

    def choose(self, goal: Goal, kinds: Collection[str] = ()) -> ExitRule | None:
        """The best setting for a goal.

        For a drop, this is the fastest setting whose estimated drop is at most the goal, less a
        reserve (`_RESERVE`).

        Args:
            goal: what is asked for; whether it is guaranteed makes no difference here.
            kinds: the kinds of settings to choose from, see `kind_of`; empty means all.

        Returns:
            The setting; None for full depth, if no faster setting qualifies.

        Raises:
            InputError: no setting is as fast as the goal demands.
        """
        rules, names, costs, drops, worst = self._settings
        if kinds:
            costs = np.where(np.isin(names, list(kinds)), costs, np.inf)
        if goal.speedup is None:
            assert goal.max_drop is not None
            allowed = goal.max_drop / 100
            reserve = _RESERVE / len(self.stopping_costs.rows) ** _RESERVE_POWER
            allowed -= min(reserve, _MOST_RESERVE * allowed)
            costs = np.where(worst <= allowed + 1e-12, costs, np.inf)
            place = int(costs.argmin())
        else:
            fast = np.flatnonzero(costs <= self._full_cost / goal.speedup)
            if not len(fast):
                fastest = int(costs.argmin())
                raise InputError(
                    f"no setting is {goal.speedup:g} times as fast here: the fastest is "
                    f"{self._full_cost / costs[fastest]:.2f} times as fast, with an estimated drop "
                    f"of {100 * drops[fastest]:.1f} points",
                    "ask for a smaller speed-up, or train a model with an earlier exit",
                )
            place = int(fast[np.lexsort((costs[fast], drops[fast]))[0]])
        return rules[place] if costs[place] < self._full_cost else None

    @cached_property
    def _folds(self) -> list[Search]:
        """The same on all rows but those of one part, for each part."""
        parts = deal(len(self.stopping_costs.rows))
        costs = self.stopping_costs
        return [
            Search(costs.take(np.flatnonzero(parts != part)), self._make) for part in range(PARTS)
        ]

    def held_out(self, choose: Callable[[Search], ExitRule | None]) -> Integers:
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


def deal(rows: int) -> NDArray[np.intp]:
    """The part of each row, `[rows]` from 0: `PARTS` parts of equal size, dealt at random."""
    return np.random.default_rng(0).permutation(np.arange(rows) % PARTS)
