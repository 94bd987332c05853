"""What a backend is.

A backend belongs to one engines folder and target and may be shared by threads; each
thread opens an `Execution` of its own, which owns buffers, bindings and streams. Hidden
states are opaque to the engine: only head outputs reach it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..encoding import EncodedRow

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Bucket:
    """Padded shape of a group.

    Attributes:
        batch: rows.
        sequence: tokens a row.
    """

    batch: int
    sequence: int


@dataclass(frozen=True)
class Limits:
    """Shapes that a backend runs.

    Attributes:
        max_batch: most rows in a group.
        max_sequence: longest row in tokens.
        group_tokens: padded tokens of a group that runs well; more rows are split.
        batch_sizes: the batch sizes to pad to, ascending; empty: any.
        sequence_lengths: the lengths to pad to, ascending; empty: any.
    """

    max_batch: int
    max_sequence: int
    group_tokens: int
    batch_sizes: tuple[int, ...] = ()
    sequence_lengths: tuple[int, ...] = ()

    def bucket(self, rows: int, longest: int) -> Bucket:
        """The smallest shape that holds `rows` rows of at most `longest` tokens."""
        sequence = _at_least(max(1, longest), self.sequence_lengths)
        return Bucket(_at_least(rows, self.batch_sizes), sequence)


def _at_least(value: int, steps: tuple[int, ...]) -> int:
    return next((step for step in steps if step >= value), value)


class Hidden(Protocol):
    """The hidden states of a group between two segments, and what travels with its rows."""

    @property
    def rows(self) -> int:
        """Real rows; the rest of the bucket is padding."""

    @property
    def bucket(self) -> Bucket:
        """Padded shape."""


H = TypeVar("H", bound=Hidden)


class Pending(Protocol):
    """Head outputs that may still be computed."""

    def result(self) -> Mapping[str, NDArray[Any]]:
        """Wait for the outputs by name (`logits` `[rows, labels]` float32).

        They may be views of memory that is written again when the group's next segment but
        one is enqueued, or when the group is released.
        """


class Execution(Protocol[H]):
    """Runs segments for one thread. Not thread-safe."""

    @property
    def lookahead(self) -> bool:
        """Whether `enqueue` returns before the segment has run.

        Then the next one is enqueued before this one's exit is read.
        """

    def begin(self, encoded: Sequence[EncodedRow], bucket: Bucket) -> H:
        """Put a group's tokens where segment 1 reads them."""

    def enqueue(self, segment: int, hidden: H) -> tuple[H, Pending]:
        """Start a segment (counted from 0) on a group, without waiting. Consumes `hidden`."""

    def regroup(self, hiddens: Sequence[H], rows: Sequence[Rows], bucket: Bucket) -> H:
        """Gather, join and re-pad rows in one step. Consumes `hiddens`.

        Args:
            hiddens: the groups to take rows from.
            rows: for each group the row numbers to keep, in the order they get.
            bucket: shape of the new group, no longer than the longest group.
        """

    def release(self, hidden: H) -> None:
        """Give a group's buffers back. Consumes `hidden`."""


class Backend(Protocol[H]):
    """Segments of one target, ready to be run."""

    def limits(self) -> Limits:
        """Shapes that this target runs."""

    def open(self) -> Execution[H]:
        """A new execution, for one thread."""

    def preload(self) -> None:
        """Load all segments now; by default each is loaded when first needed."""

    def close(self) -> None:
        """Free what is loaded. No execution may be used afterwards."""
