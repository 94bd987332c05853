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

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..runtime.rules.measures import Array
from ..runtime.rules.rules import ExitRule
from ..runtime.rules.words import rounded
from .stopping_costs import StoppingCosts
from .sweep import NEVER, exits_below, with_exit_0

_PRICES = 30
_ROUNDS = 6


def _fit(scores: Array, costs: Array, losses: Array) -> Array:
    """Thresholds `[prices, exits]`, from high prices to low ones.

    Args:
        scores: `[exits, rows]` stop scores, those of exit 0 included.
        costs: `[exits, rows]` seconds of a row that stops at an exit.
        losses: `[exits, rows]` its expected losses.
    """
    order = [
        queue[np.isfinite(row[queue])]
        for row, queue in zip(scores, np.argsort(scores, axis=1, kind="stable"), strict=True)
    ]
    prices = np.geomspace(300.0, 0.3, _PRICES) * costs[-1].mean()
    return np.stack([_descend(scores, order, costs + price * losses) for price in prices])


def _descend(scores: Array, order: Sequence[NDArray[np.intp]], totals: Array) -> Array:
    """Thresholds `[exits]` that make the sum of `totals` at the exits small.

    Args:
        scores: `[exits, rows]` stop scores.
        order: for each exit, the rows with a finite score in the order of their scores.
        totals: `[exits, rows]` what a row that stops at an exit adds to the sum.
    """
    exits, rows = scores.shape
    never = _below(scores)
    thresholds = never.copy()
    stops = np.zeros((exits, rows), np.bool_)
    stops[-1] = True
    for _ in range(_ROUNDS):
        before = thresholds.copy()
        ahead = totals[-1]  # what a row adds if it goes on
        gone = np.logical_or.accumulate(stops, axis=0)
        for number in range(exits - 2, -1, -1):
            queue = order[number]
            if number:
                queue = queue[~gone[number - 1][queue]]
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
    """A threshold for each exit that stops no row: below its lowest finite score."""
    lowest = np.where(np.isfinite(scores), scores, np.inf).min(axis=1)
    return np.where(np.isfinite(lowest), np.minimum(lowest, 0.0) - 1e-3, 0.0)


def _between(ascending: Array, last: int) -> float:
    """A threshold between a score and the next one."""
    here = float(ascending[last])
    there = float(ascending[last + 1]) if last + 1 < len(ascending) else here + 1e-3
    return (here + there) / 2


def fit_per_exit(
    rule: ExitRule, scores: Array, costs: StoppingCosts, parts: NDArray[np.intp]
) -> tuple[list[ExitRule], NDArray[np.int16]]:
    """Rules with a threshold for each exit, one for each price.

    Args:
        rule: the rule, with patience 1.
        scores: `[exits, rows]` its stop scores, those of exit 0 included; if exit 0 has infinite
            ones only, it gets no threshold.
        costs: the rows, and what they cost and lose.
        parts: `[rows]` the part of each row.

    Returns:
        The rules; and the exits of the rows, `[rules, rows]`, in each part under the thresholds
        that the same price gives on the other parts.
    """
    first = costs.rows.first_exit
    exits = np.zeros((_PRICES, len(parts)), np.int16)
    for part in np.unique(parts):
        others, here = parts != part, parts == part
        fitted = _fit(scores[:, others], costs.costs[:, others], costs.losses[:, others])
        exits[:, here] = exits_below(scores[:, here], fitted, first)
    fitted = _fit(scores, costs.costs, costs.losses)
    rules = [rule.with_stop_threshold([*map(rounded, row[1 - first :])]) for row in fitted]
    if first == 0:
        # A threshold that stops none of these rows could stop others.
        limits = np.where(fitted[:, 0] > scores[0].min(), fitted[:, 0], NEVER)
        rules = [with_exit_0(rule, limit) for rule, limit in zip(rules, limits, strict=True)]
    return rules, exits
