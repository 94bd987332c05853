"""Settings that may be chosen, what each gives, and the best of them for every wish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import InputError
from ..runtime.rules.measures import Array
from ..runtime.rules.rules import ExitRule

PER_EXIT = " per exit"
"""What the kind of a rule ends with that has a threshold fitted for each exit."""


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
        candidate: a setting by its number.
    """

    sums: Array
    costs: Array
    drops: Array
    full_cost: float
    candidate: Callable[[int], Candidate]

    def front(self, bounds: Array | None = None) -> NDArray[np.intp]:
        """Numbers of the settings that no other beats, by rising drop.

        Args:
            bounds: `[settings]` what counts in place of the drops.
        """
        order = np.lexsort((self.costs, self.drops if bounds is None else bounds))
        cheapest = np.minimum.accumulate(self.costs[order])
        return np.asarray(order[np.append(True, cheapest[1:] < cheapest[:-1])])


@dataclass(frozen=True)
class Front:
    """Settings that no other beats: each is cheaper than all with a smaller bound.

    Attributes:
        bounds: `[settings]` of the drop as a share, ascending.
        costs: `[settings]` mean time of a row, descending.
        full_cost: mean time of a row at full depth.
        candidates: the settings.
    """

    bounds: Array
    costs: Array
    full_cost: float
    candidates: Sequence[Candidate]

    @classmethod
    def of(cls, settings: Settings, bounds: Array) -> Front:
        """The front of settings, by the bounds of their drops."""
        numbers = settings.front(bounds)
        candidates = [settings.candidate(int(number)) for number in numbers]
        return cls(bounds[numbers], settings.costs[numbers], settings.full_cost, candidates)

    def within(self, limit: float) -> Candidate | None:
        """The cheapest setting whose bound is within a limit, as a share."""
        count = int(np.searchsorted(self.bounds, limit, side="right"))
        return self.candidates[count - 1] if count else None

    def as_fast_as(self, speedup: float) -> Candidate:
        """The setting with the least drop of those that are so fast.

        Raises:
            InputError: nothing is so fast.
        """
        fast = np.flatnonzero(self.costs <= self.full_cost / speedup)
        if not len(fast):
            raise InputError(
                f"nothing is {speedup:g} times as fast here: the most is "
                f"{self.full_cost / self.costs[-1]:.2f} times, with an estimated drop of "
                f"{100 * self.bounds[-1]:.1f} points",
                "wish for less, or train with an earlier exit",
            )
        return self.candidates[int(fast[0])]
