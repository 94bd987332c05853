"""Which documents of a query leave, by the logits of all exits, and whether the best ones change.

A document leaves when it is behind the `top`th by a margin, see `TopK`. The margin of an exit is
its error among documents near the top, times a factor that is the same for all exits. So there is
one list of settings, from cautious to bold.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.exits import Exits
from ..runtime.rules.measures import Array, Floats, Integers, Mask
from ..runtime.rules.rules import ExitRule, TopK
from ..runtime.rules.words import rounded
from ..runtime.tasks.ranked import changed_sets, leaving

NEAR_TOP = 2
"""Documents among so many times the wanted ones are near the top."""

# The margins as multiples of an exit's error, from cautious to bold.
_FACTORS = np.geomspace(16.0, 0.02, 300)
# Queries that are simulated together.
_BLOCK = 64
# The logit of made-up documents.
_LOWEST = float(np.finfo(np.float32).min)


class _Block(NamedTuple):
    """Queries of similar size, with made-up documents behind the real ones of smaller queries.

    Attributes:
        numbers: `[queries]` which queries.
        rows: `[queries, documents]` which row each document is; 0 for made-up ones.
        real: `[queries, documents]` whether a document is not made up.
        logits: `[exits, queries, documents]` float64; below all others for made-up ones.
        reference: `[queries, documents]` float64, in the same way.
    """

    numbers: NDArray[np.intp]
    rows: NDArray[np.intp]
    real: Mask
    logits: Array
    reference: Array


@dataclass(frozen=True)
class QueryLogits:
    """The logits of all exits for the documents of queries.

    Attributes:
        logits: `[exits, rows]` float32; the documents of a query follow each other.
        starts: `[queries + 1]` where the documents of each query begin.
        reference: `[rows]` float32, the logits of the model that was converted.
        exits: those that give the logits; exit 0 gives what scores predict, see `first_stage`.
    """

    logits: NDArray[np.float32]
    starts: NDArray[np.intp]
    reference: NDArray[np.float32]
    exits: Exits

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def without_scores(self) -> QueryLogits:
        """The same queries as they run without scores: nothing leaves at exit 0."""
        count = len(self.exits.before_layers)
        return replace(self, logits=self.logits[count:], exits=self.exits.from_first_layer())

    def take(self, queries: NDArray[np.intp]) -> QueryLogits:
        """Some of the queries, by their numbers from 0."""
        spans = [np.arange(self.starts[n], self.starts[n + 1]) for n in queries]
        rows = np.concatenate([np.zeros(0, np.intp), *spans])
        starts = np.cumsum([0, *map(len, spans)])
        return replace(
            self, logits=self.logits[:, rows], starts=starts, reference=self.reference[rows]
        )

    def in_batches(self, size: int) -> QueryLogits:
        """The same, where each batch of so many documents of a query is a query of its own."""
        spans = itertools.pairwise(self.starts.tolist())
        begins = [begin for start, end in spans for begin in range(start, end, size)]
        return replace(self, starts=np.array([*begins, self.starts[-1]], np.intp))

    @cached_property
    def blocks(self) -> list[_Block]:
        """All queries that have documents, in blocks, to which hundreds of settings are applied."""
        blocks = []
        sizes = np.diff(self.starts)
        order = np.argsort(sizes, kind="stable")
        order = order[sizes[order] > 0]
        for start in range(0, len(order), _BLOCK):
            numbers = order[start : start + _BLOCK]
            place = np.arange(sizes[numbers].max())
            real = place < sizes[numbers, None]
            rows = np.where(real, self.starts[numbers, None] + place, 0)
            block = _Block(
                numbers=numbers,
                rows=rows,
                real=real,
                logits=np.where(real, self.logits[:, rows].astype(np.float64), _LOWEST),
                reference=np.where(real, self.reference[rows].astype(np.float64), _LOWEST),
            )
            blocks.append(block)
        return blocks


class QueryStops(NamedTuple):
    """Where a rule stops documents, and what that changes.

    Attributes:
        exits: `[rows]` int64, the exit of each document.
        changed: `[queries]` whether the set of the best documents changed, with the scores of the
            query or without them.
    """

    exits: Integers
    changed: Mask


def stops_of(rule: ExitRule, rows: QueryLogits, top: int) -> QueryStops:
    """Where a rule stops documents: the exits of a live run that gives these logits.

    Args:
        rule: `TopK` or `Budget` of the last exit.
        rows: the logits.
        top: how many documents are wanted.
    """
    exits = np.full(rows.logits.shape[1], rows.exits.last, np.int64)
    for block in rows.blocks:
        going = block.real.copy()
        for number, logits in zip(rows.exits.numbers[:-1], block.logits, strict=False):
            leaves = leaving(rule, number, logits, going)
            exits[block.rows[leaves]] = number
            going &= ~leaves
    changed = changed_queries(rows, exits, top)
    for _ in rows.exits.before_layers:  # those of the scores, which a query may lack
        changed |= stops_of(rule, rows.without_scores, top).changed
    return QueryStops(exits, changed)


def stops_in_batches(rule: ExitRule, rows: QueryLogits, top: int, size: int) -> QueryStops:
    """The same where only documents of a batch are compared with each other, as in a packed file.

    Args:
        rule: as in `stops_of`.
        rows: queries without scores.
        top: how many documents are wanted.
        size: how many documents of a query are in a batch.
    """
    exits = stops_of(rule, rows.in_batches(size), top).exits
    return QueryStops(exits, changed_queries(rows, exits, top))


def changed_queries(rows: QueryLogits, exits: Integers, top: int) -> Mask:
    """Whether the best documents of queries changed: `[queries]`, given the exits of documents."""
    changed = np.zeros(len(rows), np.bool_)
    for block in rows.blocks:
        left = block.real & (exits[block.rows] < rows.exits.last)
        changed[block.numbers] = changed_sets(block.logits[-1], left, block.reference, top)
    return changed


def errors_near_top(rows: QueryLogits, top: int) -> Array:
    """The error of each early exit for documents near the top: `[exits - 1]`.

    It is the deviation of the predicted from the final logit. What all documents of a query have in
    common does not count, because they are compared with each other only.

    Args:
        rows: logits of queries that did not train the heads.
        top: how many documents are wanted.
    """
    squares = np.zeros(len(rows.logits) - 1)
    free = 0
    for block in rows.blocks:
        nearest = min(NEAR_TOP * top, block.reference.shape[1])
        limits = -np.sort(-block.reference, axis=1)[:, nearest - 1, None]
        near = block.real & (block.reference >= limits)
        count = near.sum(axis=1, keepdims=True)
        errors = np.where(near, block.logits[:-1] - block.reference, 0.0)
        own = errors.sum(axis=2, keepdims=True) / count
        squares += (np.where(near, errors - own, 0.0) ** 2).sum(axis=(1, 2))
        free += int((count - 1).sum())
    return np.sqrt(squares / max(1, free)).clip(min=1e-6)


def settings(errors: Floats, top: int, exits: Exits) -> list[TopK]:
    """All settings, from cautious to bold.

    Args:
        errors: see `errors_near_top`.
        top: how many documents are wanted.
        exits: of the model.
    """
    rules = []
    count = len(exits.before_layers)
    for factor in _FACTORS.tolist():
        # The last exit stops every document anyway.
        thresholds = [0.0 - rounded(factor * error) for error in np.append(errors, 0.0).tolist()]
        of_exit_0 = next(iter(thresholds[:count]), None)
        of_layers = tuple(thresholds[count:])
        rules.append(TopK(top=top, threshold=of_layers, exit_0_threshold=of_exit_0))
    return rules
