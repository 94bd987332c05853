"""Fit one threshold for each exit.

A single threshold treats a score at exit 2 like the same score at exit 9, although an early exit
is less reliable at the same score and saves more. What is varied here is the *price* of a lost row,
in seconds: every threshold lies where stopping pays at that price, given what becomes of the row if
it goes on. One number moves all thresholds, so a list of prices gives a list of settings, just as a
list of thresholds does. As many thresholds as exits still fit the rows that made them better than
other rows, so the settings of a price are judged on rows that their thresholds were not fitted to.

With the thresholds of the later exits known, the best threshold of an exit is found on one sorted
list of its rows. Going from the last exit to the first, repeatedly until nothing changes, is
coordinate descent on time + price x expected losses. Expected losses instead of observed ones keep
it from fitting the luck of a few rows, see `stopping_costs`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..runtime.rules.base import ExitRule
from ..runtime.rules.measures import Array
from .stopping_costs import StoppingCosts
from .sweep import Family, rounded

_PRICES = 30
_ROUNDS = 6


def fit_path(rule: ExitRule, scores: Array, costs: Array, losses: Array) -> Iterator[ExitRule]:
    """Rules with a threshold for each exit, one for each price, from low prices to high ones.

    Args:
        rule: the rule, with patience 1.
        scores: `[exits, rows]` its stop scores.
        costs: `[exits, rows]` seconds of a row that stops at an exit.
        losses: `[exits, rows]` its expected losses.
    """
    order = np.argsort(scores, axis=1, kind="stable")
    for price in np.geomspace(0.3, 300.0, _PRICES) * costs[-1].mean():
        thresholds = _descend(scores, order, costs + price * losses)
        yield rule.with_stop_threshold([rounded(threshold) for threshold in thresholds])


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
        ahead = totals[-1].copy()  # what a row adds if it goes on
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
    """Rules with a threshold for each exit, fitted to parts of the rows.

    Args:
        stopping_costs: the rows and what they cost.
        parts: `[rows]` the part of each row.
    """

    def __init__(self, stopping_costs: StoppingCosts, parts: NDArray[np.intp]) -> None:
        self._stopping_costs = stopping_costs
        self._parts = parts
        self._judged: dict[tuple[ExitRule, frozenset[int]], dict[ExitRule, Array]] = {}
        self._fits: dict[tuple[ExitRule, frozenset[int]], list[ExitRule]] = {}

    def settings(self, family: Family, using: frozenset[int]) -> dict[ExitRule, Array]:
        """Rules that are fitted to some parts of the rows, and sums `[terms]` over these parts.

        The sums are cross-fitted: on each part they belong to the thresholds that the same price
        gives on the other parts.
        """
        key = family.rule, using
        if key not in self._judged:
            sums = np.sum([self._judge(family, using, part) for part in using], axis=0)
            found = self._judged[key] = {}
            for rule, row in zip(self._fit(family, using), sums, strict=True):
                found.setdefault(rule, row)
        return self._judged[key]

    def _judge(self, family: Family, using: frozenset[int], part: int) -> Array:
        """Sums `[prices, terms]` over one part, with thresholds fitted to the other parts."""
        numbers = np.flatnonzero(self._parts == part)
        terms, scores = self._stopping_costs.terms[:, numbers], family.scores[:, numbers]
        sums = []
        for rule in self._fit(family, using - {part} or using):
            stops = scores < rule.stop_thresholds
            stops[-1] = True
            sums.append(terms[stops.argmax(axis=0), np.arange(len(numbers))].sum(axis=0))
        return np.array(sums)

    def _fit(self, family: Family, using: frozenset[int]) -> list[ExitRule]:
        """A rule for each price, fitted to some parts of the rows."""
        key = family.rule, using
        if key not in self._fits:
            numbers = np.flatnonzero(np.isin(self._parts, list(using)))
            every = family.scores, self._stopping_costs.costs, self._stopping_costs.losses
            scores, costs, losses = (values[:, numbers] for values in every)
            self._fits[key] = list(fit_path(family.rule, scores, costs, losses))
        return self._fits[key]
