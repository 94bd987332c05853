"""Rankings as nodes of a graph: documents are compared with others of their query in the batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from .pair_marks import PairMarks

# Beyond any logit, and its differences are finite in float32.
_LOWEST = -1e30
GAP = 1e-3
"""How far documents that left are below the others, as a share of the lowest of these."""


class QueryNodes:
    """Which rows of a batch have the same query: equal tokens before the document.

    A query that was cut differently for another document counts as another one. Then documents are
    compared with fewer others, and fewer of them leave.

    Args:
        ids: `[batch, sequence]` int64, the tokens.
        is_token: `[batch, sequence]` bool, which of them are not padding.
        types: `[batch, sequence]` int64, their types; None if the model has none.
        marks: how documents are recognised.
        readable: `[batch]` bool, rows that the model can read; nothing is compared with others.
    """

    def __init__(
        self, ids: Any, is_token: Any, types: Any, marks: PairMarks, readable: Any
    ) -> None:
        query = np.where(is_token & ~marks.second(ids, is_token, types), ids, -1)
        is_same = np.logical_and.reduce(query[:, None] == query[None], axis=-1)
        self._same: Any = is_same & readable[None]  # [batch, batch] bool

    def leave(self, logits: Any, stopped: Any, margin: Any, top: Any) -> Any:
        """Which documents are behind by a margin, see `TopK`: `[batch]` bool.

        Args:
            logits: `[batch]` float64, what the exit predicts.
            stopped: `[batch]` bool, documents that have left before, which count no more; None: no
                document has.
            margin: how far behind.
            top: behind how many documents.
        """
        if stopped is not None:
            logits = np.where(stopped, _LOWEST, logits)
        is_before = self._same & (logits[None] - logits[:, None] > margin)
        return np.add.reduce(is_before.astype(np.int64), axis=1) >= top

    def below_others(self, logits: Any, left: Any) -> Any:
        """Move the documents that left below all others of their query; they keep their order.

        Args:
            logits: `[batch, 1]` float32, of each document at its exit.
            left: `[batch]` bool, which of them left before the last exit.

        Returns:
            `[batch, 1]` float32.
        """
        each = logits[:, 0]
        others = self._same & ~left[None]
        lowest = np.minimum.reduce(np.where(others, each[None], -_LOWEST), axis=1)
        highest_left = np.maximum.reduce(
            np.where(self._same & left[None], each[None], _LOWEST), axis=1
        )
        gap = np.maximum(np.absolute(lowest), 1) * GAP
        moved = each + np.minimum(lowest - gap - highest_left, 0)
        return np.where(left, moved, each)[:, None]
