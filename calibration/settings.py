"""Settings that may be chosen, what each of them gives, and the best of them for every goal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import InputError
from ..runtime.rules.measures import Array
from ..runtime.rules.rules import ExitRule

PER_EXIT = " per exit"
"""The end of the kind of a rule that has one fitted threshold for each exit."""


@dataclass(frozen=True)
class Candidate:
    """A setting that may be chosen.

    Attributes:
        rule: the rule.
        fitted: whether it has one threshold for each exit, fitted to rows.
    """

    rule: ExitRule
    fitted: bool = False

    @property
    def kind(self) -> str:
        """The rule's name, with a suffix if it has a threshold for each exit."""
        return self.rule.name + PER_EXIT if self.fitted else self.rule.name


@dataclass(frozen=True)
class Settings:
    """Settings, and what each of them gives on some rows.

    Attributes:
        sums: `[settings, terms]` over the rows, see `StoppingCosts.terms`.
        costs: `[settings]` mean seconds of a row.
        drops: `[settings]` estimated drop, as a share.
        full_cost: mean seconds of a row at full depth.
        candidate: gives a setting by its number.
    """

    sums: Array
    costs: Array
    drops: Array
    full_cost: float
    candidate: Callable[[int], Candidate]

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

    def within(self, limit: float) -> Candidate | None:
        """The cheapest setting whose bound is at most a limit, as a share."""
        count = int(np.searchsorted(self.bounds, limit, side="right"))
        return self.settings.candidate(int(self.numbers[count - 1])) if count else None

    def as_fast_as(self, speedup: float) -> Candidate:
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
        return self.settings.candidate(int(self.numbers[fast[0]]))
