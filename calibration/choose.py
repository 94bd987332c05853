"""Choose a setting for a goal on average, and judge a choice on rows that did not take part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.operating_point import Goal
from ..runtime.errors import InputError
from ..runtime.rules.measures import Array, Integers
from ..runtime.rules.rules import Budget, ExitRule
from .costs import StoppingCosts
from .settings import StopScores, exits_of

# The estimated drop must stay below the goal by `_RESERVE / rows ** _RESERVE_POWER`, which is 0.085
# points at 1,000 rows, but by at most the share `_MOST_RESERVE` of it: the fastest of many settings
# was lucky with the rows that chose it, the more so the fewer they are.
_RESERVE = 6.75
_RESERVE_POWER = 1.3
_MOST_RESERVE = 0.9
PARTS = 5
"""How many parts rows are dealt into: each part is judged with what the others choose."""


@dataclass(frozen=True)
class Tried:
    """What a list of settings gives on some rows.

    Attributes:
        settings: the settings, from cautious to bold.
        costs: `[settings]` mean seconds of a row.
        drops: `[settings]` estimated drops of the metric as shares.
    """

    settings: Sequence[ExitRule]
    costs: Array
    drops: Array


class Search:
    """Lists of settings on some rows, with what they cost and lose.

    Args:
        costs: the rows, and what they cost and lose.
        lists: the settings, each list from cautious to bold, see `settings_lists`.
    """

    def __init__(self, costs: StoppingCosts, lists: Sequence[Sequence[ExitRule]]) -> None:
        self.stopping_costs = costs
        self._lists = lists

    @cached_property
    def tried(self) -> list[Tried]:
        """What each list gives."""
        costs = self.stopping_costs
        stop = StopScores(costs.rows)
        tried = []
        for settings in self._lists:
            exits = stop.exits(settings)
            mean_costs = np.array([costs.mean_cost(each) for each in exits])
            drops = np.array([costs.drop(each) for each in exits])
            tried.append(Tried(settings, mean_costs, drops))
        return tried

    def choose(self, goal: Goal) -> ExitRule | None:
        """The best setting for a goal.

        For a drop, this is the fastest setting whose estimated drop is at most the goal, less a
        reserve (`_RESERVE`). An estimate that falls from a cautious setting to a bolder one of its
        list is taken for luck: the larger one counts for both. For a speed-up, it is the setting
        with the smallest estimated drop among those that are fast enough.

        Args:
            goal: what is asked for.

        Returns:
            The setting; None for full depth, if no faster setting qualifies.

        Raises:
            InputError: no setting is as fast as the goal demands.
        """
        rows = self.stopping_costs.rows
        full_cost = self.stopping_costs.mean_cost(np.full(len(rows), rows.exits[-1]))
        full_depth = Tried([Budget(exit=rows.exits[-1])], np.array([full_cost]), np.zeros(1))
        tried = [full_depth, *self.tried]
        settings = [setting for each in tried for setting in each.settings]
        costs = np.concatenate([each.costs for each in tried])
        drops = np.concatenate([each.drops for each in tried])
        if goal.speedup is None:
            assert goal.max_drop is not None
            allowed = goal.max_drop / 100
            reserve = _RESERVE / len(rows) ** _RESERVE_POWER
            allowed -= min(reserve, _MOST_RESERVE * allowed)
            worst = np.concatenate([np.maximum.accumulate(each.drops) for each in tried])
            place = int(np.where(worst <= allowed + 1e-12, costs, np.inf).argmin())
        else:
            fast = np.flatnonzero(costs <= full_cost / goal.speedup)
            if not len(fast):
                fastest = int(costs.argmin())
                raise InputError(
                    f"no setting is {goal.speedup:g} times as fast here: the fastest is "
                    f"{full_cost / costs[fastest]:.2f} times as fast, with an estimated drop "
                    f"of {100 * drops[fastest]:.1f} points",
                    "ask for a smaller speed-up, or train a model with an earlier exit",
                )
            place = int(fast[np.lexsort((costs[fast], drops[fast]))[0]])
        return settings[place] if costs[place] < full_cost else None

    @cached_property
    def _folds(self) -> list[Search]:
        """The same on all rows but those of one part, for each part."""
        parts = deal(len(self.stopping_costs.rows))
        costs = self.stopping_costs
        return [
            Search(costs.take(np.flatnonzero(parts != part)), self._lists) for part in range(PARTS)
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
