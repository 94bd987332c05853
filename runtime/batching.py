"""Split rows into groups, and decide when the undecided rows of several groups are joined.

These are pure functions of lengths and measured times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .backends.shapes import Limits

RowNumbers = NDArray[np.intp]


def make_groups(lengths: NDArray[np.intp], limits: Limits) -> list[RowNumbers]:
    """Groups of rows of similar length within the token budget, longest rows first.

    Args:
        lengths: `[rows]` tokens in each row.
        limits: the shapes that the backend runs.

    Returns:
        Row numbers of each group, from the longest row to the shortest.
    """
    order = np.argsort(-lengths, kind="stable")
    groups = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        padded = limits.bucket(1, longest).sequence
        size = min(max(1, limits.group_tokens // padded), limits.max_batch, len(order) - start)
        # A batch that is padded to a larger one may exceed the budget; then take a smaller one.
        while size > 1 and _tokens(size, longest, limits) > limits.group_tokens:
            size = max((step for step in limits.batch_sizes if step < size), default=1)
        groups.append(order[start : start + size])
        start += size
    return groups


@dataclass(frozen=True)
class CostCurve:
    """Measured time of a middle segment by the padded tokens of a group.

    Attributes:
        tokens: the sizes that were measured, ascending.
        seconds: time of one segment at each size.
        copy_seconds: time of joining groups, in seconds per token.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    copy_seconds: float

    def __call__(self, tokens: int) -> float:
        """Seconds at a size: linear between measurements, and proportional to tokens beyond."""
        if tokens > self.tokens[-1]:
            return self.seconds[-1] * tokens / self.tokens[-1]
        return float(np.interp(tokens, self.tokens, self.seconds))


def plan_joins(
    lengths: Sequence[Sequence[int]], limits: Limits, cost: CostCurve
) -> list[list[int]]:
    """Which neighbouring groups to join before the next segment.

    Joining saves time if the segment is faster on the joined group than on its parts, by more
    than the copy takes.

    Args:
        lengths: the row lengths of each group, in tokens.
        limits: the shapes that the backend runs.
        cost: its measured times.

    Returns:
        Group numbers of each new group; every group appears once, in order.
    """
    plan: list[list[int]] = []
    rows, longest = 0, 0
    for number, group in enumerate(lengths):
        joined_rows, joined_longest = rows + len(group), max(longest, *group)
        if plan and fits(joined_rows, joined_longest, limits):
            parts = (_tokens(rows, longest, limits), _tokens(len(group), max(group), limits))
            apart = cost(parts[0]) + cost(parts[1])
            joined = _tokens(joined_rows, joined_longest, limits)
            if cost(joined) + cost.copy_seconds * joined < apart:
                plan[-1].append(number)
                rows, longest = joined_rows, joined_longest
                continue
        plan.append([number])
        rows, longest = len(group), max(group)
    return plan


def fits(rows: int, longest: int, limits: Limits) -> bool:
    """Whether several rows, the longest of which has `longest` tokens, may form one group."""
    most = max(limits.group_tokens, limits.bucket(1, longest).sequence)
    return rows <= limits.max_batch and _tokens(rows, longest, limits) <= most


def _tokens(rows: int, longest: int, limits: Limits) -> int:
    bucket = limits.bucket(rows, longest)
    return bucket.batch * bucket.sequence
