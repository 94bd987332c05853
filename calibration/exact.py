"""Exact tests and intervals of shares, for any number of rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..runtime.rules.measures import Array, Integers

_log_factorial = np.vectorize(lambda count: math.lgamma(count + 1))
# More gains than these count as these.
_MOST_GAINS = 100
# Rows are enough for a good chance if a setting with half of the allowed losses passes this often.
_GOOD_CHANCE = 0.8


def useful_rows(rows: int, share: float, level: float) -> int:
    """The fewest rows that allow as many losses as all rows do, see `most_losses`.

    Further rows could only show further losses.
    """
    most = int(most_losses(rows, share, level)[0])
    while most >= 0 and binomial_tail(most, rows - 1, share) <= level:
        rows -= 1
    return rows


@functools.lru_cache
def most_losses(
    rows: int, share: float, level: float, with_gains: bool = False
) -> NDArray[np.int64]:
    """With how many losses a promise passes at most, by the number of gains; -1 if never.

    Of independent rows, each is a loss, a gain or neither. The hypothesis is that losses are more
    probable than gains by `share` or more; how probable gains are is not known. Barnard's exact
    test: results (losses, gains) are put in order, and as many of them pass as together have a
    probability of at most `level`, *however* probable gains are. The order is that of p-values with
    the probability of gains that fits a result best under the hypothesis, for the score of
    Miettinen and Nurminen (estimation and maximization, Lloyd 2008). Without gains, this is the
    binomial test, and results without gains come first, so they pass as they do there.

    Args:
        rows: how many rows there are.
        share: what is allowed.
        level: the probability of passing wrongly.
        with_gains: whether rows can gain.

    Returns:
        `[gains + 1]`, up to 100 gains; more count as these. Only `[1]` without gains.
    """
    columns = min(_MOST_GAINS, rows) + 1 if with_gains else 1
    if not rows:
        return np.full(columns, -1)
    allowed = rows * share
    losses, gains = np.ogrid[: min(rows, int(allowed) + columns) + 1, :columns]
    # Probabilities of a gain, in eighths of the root of the expected number of gains.
    rates = np.maximum((np.arange(12 * math.isqrt(columns - 1) + 1) / 8) ** 2, 1e-9) / rows
    rates = rates[rates < (1 - share) / 2, None, None]
    by_losses = _binomial(losses, rows, share + rates)
    chances = by_losses * _binomial(gains, rows - losses, rates / (1 - share - rates))
    # The last column stands for as many gains or more.
    chances[..., -1:] = by_losses - chances[..., :-1].sum(axis=-1, keepdims=True)
    shape = chances.shape[1:]
    chances = chances.reshape(len(rates), -1)
    # The expected number of gains that fits best, for Poisson counts.
    more = 2 * allowed - losses - gains
    fitting = (np.sqrt(more**2 + 8 * gains * allowed) - more) / 4
    score = (allowed + gains - losses) / np.sqrt(allowed + 2 * fitting)
    order = np.argsort(-score, axis=None, kind="stable")
    nearest = np.minimum(np.rint(8 * np.sqrt(fitting)), len(rates) - 1).astype(int).flat[order]
    p_values = chances[:, order].cumsum(axis=1)[nearest, np.arange(len(order))]
    p_values[(order % columns == 0) & (p_values <= level)] = 0.0
    order = order[np.argsort(p_values, kind="stable")]
    passing = chances[:, order].cumsum(axis=1).max(axis=0) <= level
    passes = np.zeros(shape, np.bool_)
    passes.flat[order[: passing.argmin()]] = True
    return np.asarray(np.logical_and.accumulate(passes).sum(axis=0) - 1)


def _binomial(counts: Integers, rows: Integers | int, chance: Array | float) -> Array:
    """The probabilities of counts among rows, exactly."""
    rest = np.maximum(rows - counts, 0)
    ways = _log_factorial(rows) - _log_factorial(counts) - _log_factorial(rest)
    chances = np.exp(ways + counts * np.log(chance) + rest * np.log1p(-chance))
    return np.where(counts <= rows, chances, 0.0)


def binomial_tail(count: int, rows: int, risk: float) -> float:
    """P(Binomial(rows, risk) <= count), exactly."""
    return float(_binomial(np.arange(count + 1), rows, risk).sum())


def share_interval(count: int, rows: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share (Clopper and Pearson, 1934).

    Args:
        count: how many of the rows have it.
        rows: how many rows there are.
        level: the confidence level.
    """
    tail = (1 - level) / 2

    def share_where(is_below: Callable[[float], bool]) -> float:
        low = 0.0
        high = 1.0
        for _ in range(50):
            middle = (low + high) / 2
            if is_below(middle):
                low = middle
            else:
                high = middle
        return high

    low = 0.0
    high = 1.0
    if count > 0:
        low = share_where(lambda share: 1 - binomial_tail(count - 1, rows, share) < tail)
    if count < rows:
        high = share_where(lambda share: binomial_tail(count, rows, share) > tail)
    return low, high


def rows_needed(share: float, level: float) -> tuple[int, int]:
    """How many rows a promise needs: at the least, without any loss; and for a good chance.

    The chance is good if a setting with half of the allowed losses passes in 80 % of all cases.

    Args:
        share: what is allowed.
        level: the largest p-value that passes.
    """
    least = rows = math.ceil(math.log(level) / math.log1p(-share))
    count = 0
    while binomial_tail(count, rows, share / 2) < _GOOD_CHANCE:
        count += 1
        while binomial_tail(count, rows, share) > level:
            rows += max(1, rows // 1000)
    return least, math.ceil(rows / 20) * 20
