"""Split rows into groups, and decide which groups are joined: pure functions of lengths."""

from __future__ import annotations

from collections.abc import Sequence

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


def plan_joins(lengths: Sequence[Sequence[int]], limits: Limits) -> list[list[int]]:
    """Which groups to join before the next segment: neighbours, as long as they fit into one.

    Args:
        lengths: the row lengths of each group, in tokens.
        limits: the shapes that the backend runs.

    Returns:
        Group numbers of each new group; every group appears once, in order.
    """
    plan: list[list[int]] = []
    rows, longest = 0, 0
    for number, group in enumerate(lengths):
        joined_rows, joined_longest = rows + len(group), max(longest, *group)
        if plan and fits(joined_rows, joined_longest, limits):
            plan[-1].append(number)
            rows, longest = joined_rows, joined_longest
        else:
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
