"""Whose turn is next: the rows that wait for their first segment, and the groups under way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.buffers import Limits
from ..chain.chain import Chain
from ..chain.groups import Group, RowNumbers, fits
from ..core import Core
from ..encoding import EncodedRow
from ..tasks.queries import Documents, RankedQuery

# Rows with at most this many tokens may share a group, whatever their lengths: a segment takes
# about as long for shorter rows.
_SHORT_TOKENS = 16


@dataclass(slots=True, eq=False)
class Waiting:
    """A row that is not answered yet.

    Attributes:
        encoded: its tokens.
        future: its answer.
        arrived: when it was submitted, in seconds of the engine's clock.
        deadline: when it should be answered, in the same seconds.
        turn: the round that it belongs to, see `Scheduler`. Rows of a round are in the order of
            their arrival.
        is_late: whether it was answered after its deadline.
    """

    encoded: EncodedRow
    future: Future[Any]
    arrived: float
    deadline: float
    turn: int = 0
    is_late: bool = False


class Turns(ABC):
    """The rows of a scheduler, which its worker thread asks whose turn is next.

    Args:
        core: that of the engine.

    Attributes:
        round: the round whose rows start now.
        waiting: groups before segment 1.
        groups: groups under way.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self.round = 0
        self.waiting: list[Group] = []
        self.groups: list[Group] = []

    @property
    def every(self) -> list[Group]:
        """All groups."""
        return [*self.waiting, *self.groups]

    def turns_of(self, lengths: Sequence[int]) -> list[int]:
        """The rounds of new rows: not this one, which might never end if rows could join it.

        Args:
            lengths: tokens of the rows of a call, in their order.
        """
        full = self._core.limits.group_tokens
        return [self.round + 1 + (end - 1) // full for end in accumulate(lengths)]

    def take(self, arrived: Sequence[Group]) -> list[Group]:
        """Let groups wait that have arrived. They have to pass exit 0, then call `passed_exit_0`.

        Returns:
            These groups, some of them joined.
        """
        self.waiting += arrived
        return [*arrived]

    @abstractmethod
    def passed_exit_0(self) -> None:
        """Put in order what waits, as far as exit 0 has left it."""

    def start_again(self, in_doubt: Group) -> None:
        """Let a group wait for the next leg, whose rows are in doubt at the end of one."""
        self.forget(in_doubt)
        self.waiting.append(in_doubt)
        self.passed_exit_0()

    @abstractmethod
    def choose(self, chain: Chain) -> Group | None:
        """The group that runs next, which may be a new one; None: nothing can run now."""

    def drop_empty(self) -> None:
        """Forget the groups that have no rows left."""
        self.waiting = [group for group in self.waiting if len(group)]
        self.groups = [group for group in self.groups if len(group)]

    def forget(self, lost: Group) -> None:
        """Forget a group."""
        self.waiting = [group for group in self.waiting if group is not lost]
        self.groups = [group for group in self.groups if group is not lost]

    def clear(self) -> list[Group]:
        """Forget all groups.

        Returns:
            The groups.
        """
        every = self.every
        self.waiting = []
        self.groups = []
        return every

    def _begin(self, chain: Chain, group: Group, waiting: Group, places: RowNumbers) -> None:
        """Let a new group go on without the group in which its rows waited, at these places."""
        chain.keep(waiting, ~np.isin(np.arange(len(waiting)), places))
        self.groups.append(group)
        self.drop_empty()

    def _ready(self, chain: Chain) -> list[Group]:
        """The groups that wait for a segment, joined as far as they fit."""
        ready = [group for group in self.groups if group.running is None]
        ready.sort(key=lambda group: int(group.lengths.max()))
        for number, group in enumerate(ready):
            others = [
                other
                for other in ready[number + 1 :]
                if len(other) and other.step == group.step and other.route is group.route
            ]
            if len(group):
                chain.join(group, others)
        self.drop_empty()
        return [group for group in ready if len(group)]


class TurnsOfRows(Turns):
    """Rows in rounds: in each, a call starts rows of about as many tokens as fit into a group."""

    def take(self, arrived: Sequence[Group]) -> list[Group]:
        """See `Turns.take`; rows of the same route form a group."""
        return super().take(_one_for_each_route(arrived))

    def passed_exit_0(self) -> None:
        """Put rows in the order of their turns."""
        self.waiting = _one_for_each_route(self.waiting)
        for group in self.waiting:
            group.keep(np.argsort([row.turn for row in group.rows], kind="stable"))

    def choose(self, chain: Chain) -> Group | None:
        """See `Turns.choose`."""
        ready = self._ready(chain)
        now = self._core.clock()

        def gain(group: Group) -> tuple[float, int]:
            worth = _worth(group, now) if _joins(group) else 0.0
            return worth, -group.segments_left

        best = max(ready, key=gain, default=None)
        under_way = sum(group.hidden.nbytes for group in self.groups if group.hidden)
        if not self.waiting or under_way > self._core.window_bytes or chain.gives_way:
            return best
        waiting = min(self.waiting, key=lambda group: float(group.deadlines.min()))
        first = int(waiting.deadlines.argmin())
        # Time for the segment of another group, and then for segment 1 of that row.
        is_urgent = waiting.deadlines[first] < chain.soon(
            [waiting if best is None else best, waiting]
        )
        if not is_urgent:
            if best is not None and not _joins(best):
                return best
            waiting = min(self.waiting, key=_turn)
            first = 0
        places = _similar(waiting.lengths, first, waiting.limits)
        group = waiting.take(places)
        if best is not None and not is_urgent and gain(group) <= gain(best):
            return best
        self._begin(chain, group, waiting, places)
        if not is_urgent:
            self.round = max(self.round, group.rows[0].turn)
        return group


@dataclass(slots=True, eq=False)
class _Query:
    """A query whose documents wait or run.

    Attributes:
        documents: those of them that have not left.
        arrived: when it was submitted, in seconds of the engine's clock.
        nbytes: memory of all its documents while they run.
        lengths: `[documents]` tokens of all its documents.
        has_begun: whether a segment was started for it.
    """

    documents: RankedQuery
    arrived: float
    nbytes: int
    lengths: NDArray[np.intp] = field(repr=False)
    has_begun: bool = False

    @property
    def tokens_left(self) -> int:
        """Tokens that segments may still run: all that go on, for each exit that is not decided."""
        return int(self.lengths[self.documents.going].sum()) * self.documents.undecided


class TurnsOfQueries(Turns):
    """Queries: small ones do not wait for a large one, which always goes on, see `Scheduler`."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self._queries: dict[RankedQuery, _Query] = {}
        self._tokens_beside = 0  # run for other queries since the oldest one had its turn

    def take(self, arrived: Sequence[Group]) -> list[Group]:
        """See `Turns.take`; each group is a query."""
        for group in arrived:
            (documents,) = _queries_in(group)
            rows = [row.encoded for row in group.rows.tolist()]
            self._queries[documents] = _Query(
                documents=documents,
                arrived=group.rows[0].arrived,
                nbytes=self._core.query_bytes(rows),
                lengths=group.lengths.copy(),
            )
        return super().take(arrived)

    def passed_exit_0(self) -> None:
        """Put the documents of each query in the order of their lengths, longest first."""
        for group in self.waiting:
            group.keep(np.argsort(-group.lengths, kind="stable"))

    def start_again(self, in_doubt: Group) -> None:
        """See `Turns.start_again`; documents of the same query run together again."""
        for group in self.waiting:
            if group.step == in_doubt.step and _queries_in(group) == _queries_in(in_doubt):
                self.forget(in_doubt)
                group.add([in_doubt])
                self.passed_exit_0()
                return
        super().start_again(in_doubt)

    def choose(self, chain: Chain) -> Group | None:
        """See `Turns.choose`.

        It is the group of a query that is the farthest behind. So all documents of a query pass an
        exit before any of them goes on.
        """
        ready = self._ready(chain)
        of_group = {group: _queries_in(group) for group in self.every}
        left = {query for queries in of_group.values() for query in queries}
        self._queries = {key: query for key, query in self._queries.items() if key in left}
        behind: dict[_Query, Group] = {}
        for group in sorted((*self.waiting, *ready), key=lambda group: group.segments_left):
            behind.update(dict.fromkeys((self._queries[key] for key in of_group[group]), group))
        if not behind:
            return None
        oldest = min(self._queries.values(), key=lambda query: query.arrived)
        others = [query for query in self._queries.values() if query is not oldest]
        room = self._core.window_bytes - sum(each.nbytes for each in others if each.has_begun)
        can_run = [
            each
            for each in behind
            if each.has_begun or (not chain.gives_way and (each is oldest or each.nbytes <= room))
        ]
        query = min(can_run, key=lambda each: (each.tokens_left, each.arrived), default=None)
        if oldest in can_run and self._tokens_beside >= self._core.limits.group_tokens:
            query = oldest
        if query is None:
            return None
        group = behind[query]
        if group.hidden is None:
            query.has_begun = True
            waiting = group
            places = _similar(waiting.lengths, 0, waiting.limits)
            group = waiting.take(places)
            self._begin(chain, group, waiting, places)
        self._tokens_beside += int(group.lengths.sum())
        if query is oldest:
            self._tokens_beside = 0
        return group


TURNS: dict[str, type[Turns]] = {"predict": TurnsOfRows, "rank": TurnsOfQueries}
"""Whose turn is next, by the method of `Engine` that means the same."""


def _queries_in(group: Group) -> list[RankedQuery]:
    """The queries of the documents in a group."""
    state = group.state
    assert isinstance(state, Documents)
    return [*dict.fromkeys(state.queries.tolist())]


def _joins(group: Group) -> bool:
    """Whether groups are joined where this one runs."""
    return group.legs[0].backend.joins


def _worth(group: Group, now: float) -> float:
    """The gain of running a group next, where groups are joined.

    A small group takes about as long as a full one there, so it waits until other rows have
    joined it, but not for long. Tokens are counted instead of rows, because otherwise long texts
    would wait for all shorter ones that arrive in the meantime. Elsewhere waiting gains nothing,
    and the rows that are nearly finished come first.
    """
    age = max(0.0, now - float(min(row.arrived for row in group.rows)))
    return age * int(group.lengths.sum()) / group.segments_left


def _turn(group: Group) -> tuple[int, float]:
    """The sort key of groups that wait: that of their first rows."""
    first: Waiting = group.rows[0]
    return first.turn, first.arrived


def _one_for_each_route(groups: Sequence[Group]) -> list[Group]:
    """Groups before segment 1, joined if they have the same route and wait for the same leg."""
    joined: list[Group] = []
    rest = [group for group in groups if len(group)]
    while rest:
        first, *rest = rest
        same = [group for group in rest if group.route is first.route and group.step == first.step]
        if same:
            first.add(same)
        joined.append(first)
        rest = [group for group in rest if len(group) and group not in same]
    return joined


def _similar(lengths: NDArray[np.intp], first: int, limits: Limits) -> RowNumbers:
    """A row and others of similar length, the first ones, as many as fit into a group.

    Args:
        lengths: `[rows]` tokens of the rows, in the order in which they start.
        first: the row.
        limits: the shapes that the backend runs.
    """
    sizes = np.maximum(lengths, _SHORT_TOKENS)
    similar = (2 * sizes >= sizes[first]) & (sizes <= 2 * sizes[first])
    similar[first] = False
    places = np.concatenate([[first], np.flatnonzero(similar)])
    longest = np.maximum.accumulate(lengths[places])
    rows = 1
    while rows < len(places) and fits(rows + 1, int(longest[rows]), limits):
        rows += 1
    return np.asarray(places[:rows], np.intp)
