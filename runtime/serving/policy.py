"""Which rows run next: pure functions of counts and lengths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..backends.shapes import Limits
from ..batching import RowNumbers
from ..rules.measures import Floats

# On a CPU, the fixed part of a segment takes about as long as so many tokens.
_CALL_TOKENS = 32


def segments_left(stopped: Sequence[int]) -> Floats:
    """How many more segments a row is expected to run, by the segment that it runs next.

    The numbers never rise from one segment to the next, even if the few rows that reach a late
    segment usually go to the end. Otherwise new rows would run before nearly finished ones; in a
    simulation, the time of an answer then reaches seconds.

    Args:
        stopped: how many rows have stopped after each segment so far.

    Returns:
        `[segments]` float64.
    """
    # As if one more row had run all segments.
    ran = 1 + np.cumsum(stopped[::-1])[::-1]
    left: Floats = np.minimum.accumulate(np.cumsum(ran[::-1])[::-1] / ran)
    return left


def worth(tokens: int, left: float, age: float, joins: bool) -> float:
    """The gain of running a group now.

    Where groups are joined, a small group takes about as long as a full one. Full groups therefore
    come first, and a small one waits until rows that follow have joined it. Tokens are counted
    instead of rows, because otherwise long texts would wait for all shorter ones that arrive in the
    meantime. Elsewhere waiting gains nothing, and the rows that are nearly finished come first.

    The age keeps rows from waiting for all that are worth a little more. In a simulation of a busy
    target, the slowest answers then come sooner, at the same mean.

    Args:
        tokens: tokens of its rows.
        left: segments that its rows are expected to run.
        age: seconds since the first of them arrived.
        joins: whether groups are joined, see `Backend`.
    """
    return age * (tokens if joins else 1) / left


def rows_with(head: int, lengths: Sequence[int], limits: Limits, joins: bool) -> RowNumbers:
    """A group of waiting rows that has a certain row and rows of similar length.

    It is the group that runs most tokens in a time, if the time is proportional to the padded
    tokens and a fixed number of tokens more. Rows are thus padded only where larger groups gain
    more than the padding costs.

    Args:
        head: the number of that row.
        lengths: tokens of each waiting row.
        limits: the shapes that the target runs.
        joins: whether groups are joined, see `Backend`; the fixed part is then that of a full
            group.
    """
    fixed = limits.group_tokens if joins else _CALL_TOKENS
    order = np.argsort(lengths, kind="stable")
    ascending = np.array(lengths, np.intp)[order]
    until = np.concatenate([[0], np.cumsum(ascending)])
    place = int(np.flatnonzero(order == head)[0])
    best, best_rate = (place, place + 1), 0.0
    for longest in np.unique(ascending[place:]).tolist():
        end = int(np.searchsorted(ascending, longest, side="right"))
        padded = limits.bucket(1, longest).sequence
        # Earlier starts leave no room for the row itself or for the longest ones.
        most = max(1, min(limits.max_batch, limits.group_tokens // padded))
        end = min(end, place + most)
        for start in range(max(0, end - most), place + 1):
            bucket = limits.bucket(end - start, longest)
            tokens = bucket.batch * bucket.sequence
            rate = (until[end] - until[start]) / (fixed + tokens)
            if rate > best_rate and (tokens <= limits.group_tokens or end - start == 1):
                best, best_rate = (start, end), rate
    return order[slice(*best)]
