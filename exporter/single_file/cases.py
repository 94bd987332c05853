"""The cases on which a graph is checked, with the answers of the segments and the rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...runtime.artifact.manifest import Manifest
from ...runtime.check import Logits, exits_near_ties, shifted
from ...runtime.encoding import EncodedRow, Text
from ...runtime.rules.measures import Array, Integers, Mask
from ...runtime.rules.rules import ExitRule, ThresholdRule
from ...runtime.tasks import Task, task_of
from ...runtime.tasks.task import Tolerance
from .query_nodes import GAP

_Cases = TypeVar("_Cases", bound="Cases")

# Batches of which one is kept, see `Cases.batches_to_keep`.
_DRAWS = 200
# Stands for the exit of a text that rounding decides.
_UNSURE = -1


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Texts, which do not depend on each other.

    Attributes:
        manifest: says which exits and labels there are.
        texts: the texts.
        rows: the same, tokenized.
        expected: `[exits, rows, labels]` float32, what the segments give.
        batch: how many rows are run together.
    """

    manifest: Manifest
    texts: Sequence[Text]
    rows: Sequence[EncodedRow]
    expected: Logits
    batch: int = 16

    def take(self: _Cases, numbers: NDArray[np.intp]) -> _Cases:
        """Some of the texts, as one batch.

        Args:
            numbers: which of `rows`.
        """
        return replace(
            self,
            texts=[self.texts[number] for number in numbers],
            rows=[self.rows[number] for number in numbers],
            expected=self.expected[:, numbers],
            batch=len(numbers),
        )

    def batches_to_keep(
        self, count: int, rule: ExitRule, tolerance: Tolerance
    ) -> Iterator[NDArray[np.intp]]:
        """Some batches of texts that stop at as many different exits as there are.

        Args:
            count: how many texts are in a batch.
            rule: decides where they stop.
            tolerance: by which their logits may move; texts that may then stop elsewhere come last.

        Yields:
            The numbers of `rows`, as `take` wants them.
        """
        generator = np.random.default_rng(0)
        exits = np.where(self.near_ties(rule, tolerance), _UNSURE, self.exits(rule))
        for _ in range(_DRAWS):
            order = generator.permutation(len(self.rows))
            # The first text of each exit, then the second one of each, and so on.
            turns = np.zeros(len(order), np.int64)
            for exit in np.unique(exits):
                own = exits[order] == exit
                turns[own] = np.arange(own.sum())
            yield order[np.lexsort([turns, exits[order] == _UNSURE])][:count]

    @property
    def task(self) -> Task:
        """The task, which says what the logits mean."""
        return task_of(self.manifest.task)

    @property
    def tied_together(self) -> int:
        """How many rows one score near a threshold makes unsure."""
        return 1

    def exits(self, rule: ExitRule) -> Integers:
        """The exit of each row: `[rows]`."""
        return self.task.simulate(self.expected, rule, self.manifest.exits[0]).exits

    def scores(self, rule: ThresholdRule) -> Array:
        """The scores that the rule compares, in any shape; may not be finite."""
        return self.task.simulate(self.expected, rule, self.manifest.exits[0]).scores

    def near_ties(self, rule: ExitRule, tolerance: Tolerance) -> Mask:
        """The rows whose exit may differ if logits move by a tolerance: `[rows]`."""
        first = self.manifest.exits[0]
        return exits_near_ties(self.expected, rule, self.task, tolerance, first)

    def answers(self, exits: NDArray[np.integer[Any]]) -> Logits:
        """The logits `[rows, labels]` of rows that stop at given exits."""
        at_exit: Logits = self.expected[exits - self.manifest.exits[0], np.arange(len(exits))]
        return at_exit


@dataclass(frozen=True, kw_only=True)
class QueryCases(Cases):
    """Queries with their documents, which are compared within a batch.

    Attributes:
        queries: `[rows]` the number of the query of each row.
    """

    queries: NDArray[np.intp]

    def take(self, numbers: NDArray[np.intp]) -> QueryCases:
        """See `Cases`."""
        return replace(super().take(numbers), queries=self.queries[numbers])

    def batches_to_keep(
        self, count: int, rule: ExitRule, tolerance: Tolerance
    ) -> Iterator[NDArray[np.intp]]:
        """See `Cases`: documents of one query, any of them, as they decide together who leaves."""
        generator = np.random.default_rng(0)
        for query in generator.choice(self.queries, _DRAWS):
            yield generator.permutation(np.flatnonzero(self.queries == query))[:count]

    @property
    def tied_together(self) -> int:
        """See `Cases`."""
        return max(map(len, self._compared()))

    def exits(self, rule: ExitRule) -> Integers:
        """See `Cases`."""
        runner = self.task.runner(rule, self.manifest.exits)
        exits = np.zeros(len(self.rows), np.int64)
        for rows in self._compared():
            exits[rows] = runner.exits_of(self.expected[:, rows])
        return exits

    def scores(self, rule: ThresholdRule) -> Array:
        """See `Cases`: how far documents are behind the last of the best, without the last exit.

        Other documents never leave, so a threshold among their scores would decide nothing.
        """
        every = [
            rule.scores(None, self.task.outputs(logits[rows]))
            for rows in self._compared()
            for logits in self.expected[:-1]
        ]
        scores: Array = np.concatenate(every)
        return scores[scores < 0]

    def near_ties(self, rule: ExitRule, tolerance: Tolerance) -> Mask:
        """See `Cases`. A document that may stay may keep others from leaving, so all are unsure."""
        by = 2 * float(np.max(tolerance))
        low, high = (self.exits(shifted(rule, each)) for each in (-by, by))
        unsure = np.zeros(len(self.rows), np.bool_)
        for rows in self._compared():
            unsure[rows] = (low[rows] != high[rows]).any()
        return unsure

    def answers(self, exits: NDArray[np.integer[Any]]) -> Logits:
        """See `Cases`. Documents that left come after all others of their query in the batch."""
        logits = super().answers(exits).copy()
        for rows in self._compared():
            left = exits[rows] < self.manifest.exits[-1]
            if left.any() and not left.all():
                lowest = logits[rows[~left]].min()
                gap = np.maximum(abs(lowest), 1) * np.float32(GAP)
                logits[rows[left]] += min(lowest - gap - logits[rows[left]].max(), np.float32(0))
        return logits

    def _compared(self) -> Iterator[NDArray[np.intp]]:
        """The numbers of rows that are compared with each other."""
        for start in range(0, len(self.rows), self.batch):
            numbers = np.arange(start, min(start + self.batch, len(self.rows)))
            for query in np.unique(self.queries[numbers]):
                yield numbers[self.queries[numbers] == query]
