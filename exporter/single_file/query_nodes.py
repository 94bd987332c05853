"""Rankings as nodes of a graph: documents are compared with others of their query in the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...runtime.artifact.manifest import Task
from ...runtime.rules.rules import ExitRule
from .pair_marks import PairMarks
from .rules import RowNodes, RuleNodes, State

# Beyond any logit, and its differences are finite in float32.
_LOWEST = -1e30
GAP = 1e-3
"""How far documents that left are below the others, as a share of the lowest of these."""


class QueryNodes(RowNodes):
    """Which rows of a batch have the same query: equal tokens before the document.

    A query that was cut differently for another document counts as another one. Then documents are
    compared with fewer others, and fewer of them leave.

    Args:
        marks: how documents are recognised.
        ids: `[batch, sequence]` int64, the tokens.
        is_token: `[batch, sequence]` bool, which of them are not padding.
        types: `[batch, sequence]` int64, their types; None if the model has none.
        readable: `[batch]` bool, rows that the model can read; nothing is compared with others.
    """

    def __init__(
        self, marks: PairMarks, ids: Any, is_token: Any, types: Any, readable: Any
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

    def rule(
        self, tensors: Mapping[str, Any], rule: ExitRule, task: Task, exits: range
    ) -> RuleNodes:
        """See `RowNodes`."""
        return _NODES[rule.name](tensors, rule, task, exits, self)

    def answers(self, logits: Any, exits: Any, last: int) -> Any:
        """See `RowNodes`. Documents that left before the last exit are below all others of a query.

        They keep their order.
        """
        left = exits < last
        each = logits[:, 0]
        others = self._same & ~left[None]
        lowest = np.minimum.reduce(np.where(others, each[None], -_LOWEST), axis=1)
        highest_left = np.maximum.reduce(
            np.where(self._same & left[None], each[None], _LOWEST), axis=1
        )
        gap = np.maximum(np.absolute(lowest), 1) * GAP
        moved = each + np.minimum(lowest - gap - highest_left, 0)
        return np.where(left, moved, each)[:, None]


class _LeaveNodes(RuleNodes):
    """The rule `top-k` in a graph, see `QueryNodes.leave`."""

    def _signals(self, number: int, earlier: Any, now: Any, state: State, after: State) -> Any:
        margin = -self._rule.threshold_at(number)
        left = state.get("stopped")
        return [self._rows.leave(now.logits[:, 0], left, margin, self._settings["top"])]


# By the name of the rule.
_NODES: dict[str, type[RuleNodes]] = {"budget": RuleNodes, "top-k": _LeaveNodes}
