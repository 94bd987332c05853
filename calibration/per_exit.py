"""Fit a threshold for each exit.

One threshold for all exits treats a score at exit 2 like the same score at exit 9, though
an early exit is less reliable at the same score, and saves more. What is fitted is a
*price* of a lost row, in time: every threshold lies where stopping is worth it at that
price, given what becomes of the row if it goes on. One number moves all thresholds, so a
list of prices is a path of settings, as a list of thresholds is. As many thresholds as exits
still fit the rows that made them better than others: what a price gives is therefore judged
on parts of the rows that its thresholds were not fitted to.

With the thresholds of later exits known, the best one of an exit is found on one sorted
list of its rows. Going from the last exit to the first and again until nothing changes is
coordinate descent on time + price x expected losses. Expected losses (`losses.py`), not
observed ones, are what keeps it from fitting the luck of a few rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from ..runtime.rules.measures import Answers, Array
from ..runtime.rules.rules import ExitRule
from .settings import Candidate
from .stop_scores import Family
from .stopping_costs import StoppingCosts

_PRICES = 30
_ROUNDS = 6


def fit_path(family: Family, costs: Array, losses: Array) -> Iterator[ExitRule]:
    """Rules with a threshold for each exit, one for each price, from cheap losses to dear ones.

    Args:
        family: the rule; one that counts no streaks, or patience 1.
        costs: `[exits, rows]` of a row that stops at an exit.
        losses: `[exits, rows]` expected.
    """
    total = costs[-1].mean()
    order = np.argsort(family.scores, axis=1, kind="stable")
    for price in np.geomspace(0.3, 300.0, _PRICES) * total:
        thresholds = _descend(family.scores, order, costs + price * losses)
        yield family.with_threshold([float(f"{value:.4g}") for value in thresholds])


def _descend(scores: Array, order: NDArray[np.intp], totals: Array) -> Array:
    """Thresholds `[exits]` that make the sum of `totals` at the exits small.

    Args:
        scores: `[exits, rows]` stop scores.
        order: `[exits, rows]` what sorts them.
        totals: `[exits, rows]` what a row that stops at an exit adds to the sum.
    """
    exits, rows = scores.shape
    never = _below(scores)
    thresholds = never.copy()
    stops = np.zeros((exits, rows), np.bool_)
    stops[-1] = True
    for _ in range(_ROUNDS):
        before = thresholds.copy()
        ahead = totals[-1].copy()  # what a row adds that goes on
        for number in range(exits - 2, -1, -1):
            gone = np.logical_or.reduce(stops[:number], axis=0)
            queue = order[number][~np.broadcast_to(gone, rows)[order[number]]]
            queue = queue[np.isfinite(scores[number][queue])]
            thresholds[number] = never[number]
            if len(queue):
                sums = np.cumsum((totals[number] - ahead)[queue])
                best = int(sums.argmin())
                if sums[best] < 0:
                    thresholds[number] = _between(scores[number][queue], best)
            stops[number] = scores[number] < thresholds[number]
            ahead = np.where(stops[number], totals[number], ahead)
        if np.array_equal(before, thresholds):
            break
    thresholds[-1] = thresholds[-2] if exits > 1 else 0.0
    return thresholds


def _below(scores: Array) -> Array:
    """A threshold for each exit that stops no row: just below its lowest finite score."""
    lowest = np.where(np.isfinite(scores), scores, np.inf).min(axis=1)
    return np.where(np.isfinite(lowest), np.minimum(lowest, 0.0) - 1e-3, 0.0)


def _between(ascending: Array, last: int) -> float:
    """A threshold between a score and the next one."""
    here = float(ascending[last])
    there = float(ascending[last + 1]) if last + 1 < len(ascending) else here + 1e-3
    return (here + there) / 2


class PerExit:
    """Settings with a threshold for each exit, fitted to some parts of the rows.

    Args:
        stopping_costs: the rows and what they cost.
        families: rules that get thresholds.
        parts: `[rows]` the part of each row.
    """

    def __init__(
        self, stopping_costs: StoppingCosts, families: Sequence[Family], parts: NDArray[np.intp]
    ) -> None:
        self.families = list(families)
        self._stopping_costs = stopping_costs
        self._parts = parts
        self._paths: dict[frozenset[int], tuple[list[Candidate], Array]] = {}
        self._fits: dict[tuple[ExitRule, frozenset[int]], list[ExitRule]] = {}

    def narrowed(self, keep: Callable[[Candidate], bool]) -> PerExit:
        """The same with fewer rules."""
        other = copy.copy(self)
        other.families = [f for f in self.families if keep(Candidate(f.rule, fitted=True))]
        other._paths = {}
        for using, (candidates, sums) in self._paths.items():
            kept = [keep(candidate) for candidate in candidates]
            other._paths[using] = list(compress(candidates, kept)), sums[np.array(kept, bool)]
        return other

    def settings(self, using: frozenset[int]) -> tuple[list[Candidate], Array]:
        """Settings fitted to some parts of the rows, and sums `[settings, terms]` over them.

        The sums are cross-fitted: each part's are those of the thresholds that the same price
        makes on the other parts.
        """
        if using not in self._paths:
            found: dict[ExitRule, Array] = {}
            for family in self.families:
                sums = np.sum([self._judged(family, using, part) for part in using], axis=0)
                for rule, row in zip(self._rules(family, using), sums, strict=True):
                    found.setdefault(rule, row)
            candidates = [Candidate(rule, fitted=True) for rule in found]
            width = self._stopping_costs.terms.shape[2]
            rows = np.array(list(found.values())).reshape(len(candidates), width)
            self._paths[using] = candidates, rows
        return self._paths[using]

    def _judged(self, family: Family, using: frozenset[int], part: int) -> Array:
        """`[prices, terms]` over one part, with thresholds fitted to the others."""
        numbers = np.flatnonzero(self._parts == part)
        terms, every = self._stopping_costs.terms[:, numbers], np.arange(len(numbers))
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
            numbers = np.flatnonzero(np.isin(self._parts, list(using)))
            costs, losses = (
                self._stopping_costs.costs[:, numbers],
                self._stopping_costs.losses[:, numbers],
            )
            part = Family(family.rule, family.scores[:, numbers])
            self._fits[key] = list(fit_path(part, costs, losses))
        return self._fits[key]


def _stops(family: Family, rule: ExitRule) -> Answers:
    """The exits of a fitted rule, by its family's stop scores."""
    below = family.scores < rule.stop_thresholds
    below[-1] = True
    return np.asarray(below.argmax(axis=0) + 1)
