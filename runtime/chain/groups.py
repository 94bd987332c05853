"""Groups of rows that run together: what belongs to each row, and how rows are put into groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Hidden, PendingLogits
from ..backends.buffers import Limits
from ..encoding import EncodedRow
from ..errors import BackendError
from ..rules.settling import State
from ..watch import WatchedRow
from .route import Leg, Route

RowNumbers = NDArray[np.intp]


@dataclass(slots=True, eq=False)
class Running:
    """A segment that was started for a group, and whose exit was not read yet.

    Attributes:
        outputs: waits for the logits of the exit at its end.
        started: when it was started, in seconds of the chain's clock.
    """

    outputs: PendingLogits
    started: float


@dataclass(slots=True, eq=False)
class Group:
    """Rows that run together, on the same route. Rows leave it when they stop.

    Attributes:
        route: how they run.
        rows: `[rows]` what the rows are to the caller, such as their numbers in a window.
        legs: those of the route that they have not finished; the first is the one that they are in.
        encoded: `[rows]` their tokens, until segment 1 of the last leg has been started.
        lengths: `[rows]` how many tokens they have.
        deadlines: `[rows]` when their answers should be there, in seconds of the chain's clock.
        state: what the rule remembers of them.
        watched: `[rows]` a `WatchedRow`, or None for rows that are not watched.
        is_answered: whether they are answered, and only run on because they are watched.
        hidden: their hidden states; None before segment 1 of a leg.
        places: `[rows]` where they are in the hidden states, and in the logits of a segment.
        running: the segment that runs; None between two segments.
    """

    route: Route
    legs: tuple[Leg, ...]
    rows: NDArray[Any]
    encoded: NDArray[np.object_]
    lengths: NDArray[np.intp]
    deadlines: NDArray[np.float64]
    state: State
    watched: NDArray[np.object_]
    is_answered: bool = False
    hidden: Hidden | None = None
    places: RowNumbers = field(default_factory=lambda: np.zeros(0, np.intp))
    running: Running | None = None

    @classmethod
    def of(
        cls,
        rows: NDArray[Any],
        encoded: Sequence[EncodedRow],
        route: Route,
        deadline: float,
    ) -> Group:
        """A group of new rows.

        Args:
            rows: `[rows]` what the caller calls them.
            encoded: their tokens.
            route: how they run.
            deadline: that of all of them.

        Raises:
            BackendError: a row is longer than a backend takes.
        """
        count = len(encoded)
        lengths = np.fromiter(map(len, encoded), np.intp, count)
        longest = lengths.max() if count else 0
        for leg in route.legs:
            if longest > leg.limits.max_sequence:
                raise BackendError(
                    f"a row has {longest} tokens; this target takes {leg.limits.max_sequence}",
                    "give a smaller `max_length`, or build the target for longer rows",
                )
        return cls(
            route=route,
            legs=route.legs,
            rows=rows,
            encoded=np.fromiter(encoded, np.object_, count),
            lengths=lengths,
            deadlines=np.full(count, deadline),
            state=route.runner.start(rows),
            watched=np.full(count, None),
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def earliest(self) -> float:
        """The earliest of the deadlines; infinity without rows."""
        return float(np.minimum.reduce(self.deadlines, initial=np.inf))

    @property
    def limits(self) -> Limits:
        """The shapes that the backend of its leg runs."""
        return self.legs[0].limits

    @property
    def segment(self) -> int:
        """The segment of its leg that is started next, from 0."""
        return 0 if self.hidden is None else self.hidden.segment

    @property
    def step(self) -> tuple[Leg, int]:
        """Its leg and the segment that is started next; groups of the same step may be joined."""
        return self.legs[0], self.segment

    @property
    def segments_left(self) -> int:
        """How many segments are left at most, in all legs."""
        return sum(leg.backend.segments for leg in self.legs) - self.segment

    @property
    def exit(self) -> int:
        """The exit that was read last, between two segments; 0 before exit 1."""
        return self.legs[0].exit_after(self.segment)

    def take(self, rows: RowNumbers) -> Group:
        """A new group of some of the rows, given by their places, without hidden states."""
        return Group(
            route=self.route,
            legs=self.legs,
            rows=self.rows[rows],
            encoded=self.encoded[rows] if self.encoded.size else self.encoded,
            lengths=self.lengths[rows],
            deadlines=self.deadlines[rows],
            state=self.state.take(rows),
            watched=self.watched[rows],
            is_answered=self.is_answered,
        )

    def keep(self, rows: RowNumbers) -> None:
        """Drop all rows but those at the given places."""
        self.rows = self.rows[rows]
        self.lengths = self.lengths[rows]
        self.deadlines = self.deadlines[rows]
        self.state = self.state.take(rows)
        self.watched = self.watched[rows]
        if self.encoded.size:
            self.encoded = self.encoded[rows]
        if self.hidden is not None:
            self.places = self.places[rows]

    def add(self, others: Sequence[Group]) -> None:
        """Take all rows of groups that have seen the same exits; no segment may be running."""
        groups = [self, *others]
        self.rows = np.concatenate([group.rows for group in groups])
        self.encoded = np.concatenate([group.encoded for group in groups])
        self.lengths = np.concatenate([group.lengths for group in groups])
        self.deadlines = np.concatenate([group.deadlines for group in groups])
        self.state = self.state.join([group.state for group in groups])
        self.watched = np.concatenate([group.watched for group in groups])

    def watched_in(self, rows: RowNumbers) -> dict[int, WatchedRow]:
        """Those of the rows at the given places that are watched, by their places."""
        pairs = zip(rows.tolist(), self.watched[rows].tolist(), strict=True)
        return {place: row for place, row in pairs if row is not None}

    def lose_watched(self) -> None:
        """Nothing will be known about its watched rows."""
        for row in self.watched_in(np.arange(len(self))).values():
            row.lost()


def split(lengths: NDArray[np.intp], limits: Limits) -> list[RowNumbers]:
    """Rows of similar length within the token budget, longest rows first.

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
        while size > 1 and not fits(size, longest, limits):
            size = max((smaller for smaller in limits.batch_sizes if smaller < size), default=1)
        groups.append(order[start : start + size])
        start += size
    return groups


def fits(rows: int, longest: int, limits: Limits) -> bool:
    """Whether several rows, the longest of which has `longest` tokens, may form one group."""
    most = max(limits.group_tokens, limits.bucket(1, longest).sequence)
    bucket = limits.bucket(rows, longest)
    return rows <= limits.max_batch and bucket.batch * bucket.sequence <= most


def shapes(limits: Limits) -> list[tuple[int, int]]:
    """The fewest rows, and the tokens, of every padded shape that a group can have.

    Limits without batch sizes have those of a single row, and limits without lengths have none.
    """
    fewest = [1, *(size + 1 for size in limits.batch_sizes[:-1])]
    return [
        (rows, tokens)
        for tokens in limits.sequence_lengths
        for rows in fewest
        if rows == 1 or fits(rows, tokens, limits)
    ]
