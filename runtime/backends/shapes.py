"""The padded shapes of groups, and which shapes a backend runs."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.intp]
"""Row numbers within a group, from 0."""


@dataclass(frozen=True)
class Bucket:
    """Padded shape of a group.

    Attributes:
        batch: rows, rows of padding included.
        sequence: tokens in a row, padding included.
    """

    batch: int
    sequence: int


@dataclass(frozen=True)
class Limits:
    """Shapes that a backend runs.

    Attributes:
        max_batch: most rows in a group.
        max_sequence: longest row, in tokens.
        group_tokens: padded tokens of a group that runs efficiently; more rows are split.
        batch_sizes: the batch sizes to pad to, ascending; empty: any size is possible.
        sequence_lengths: the lengths to pad to, ascending; empty: any length is possible.
        lengths_alone: the lengths to pad to if a group starts with a single row, ascending; empty:
            `sequence_lengths`.
    """

    max_batch: int
    max_sequence: int
    group_tokens: int
    batch_sizes: tuple[int, ...] = ()
    sequence_lengths: tuple[int, ...] = ()
    lengths_alone: tuple[int, ...] = ()

    def bucket(self, rows: int, longest: int, alone: bool = False) -> Bucket:
        """The smallest shape that holds `rows` rows of at most `longest` tokens.

        Args:
            rows: the number of rows.
            longest: the number of tokens of the longest row.
            alone: whether the group starts with a single row.
        """
        lengths = (alone and self.lengths_alone) or self.sequence_lengths
        return Bucket(_at_least(rows, self.batch_sizes), _at_least(max(1, longest), lengths))


def _at_least(value: int, steps: tuple[int, ...]) -> int:
    position = bisect_left(steps, value)
    return steps[position] if position < len(steps) else value
