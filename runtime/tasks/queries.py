"""Documents of queries on their way through the exits: those that cannot be among the best leave.

*An exit of a query is decided when all its documents have passed it*, whatever groups they run in.
So the exits of a query depend on the logits of its documents only, and `QueryRunner.exits_of`
reproduces them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RuleError
from ..rules.measures import Integers, Mask
from ..rules.runner import RuleRunner
from ..rules.settling import Runner, Settled, State

Numbers = NDArray[np.intp]


class RankedQuery:
    """The documents of one query on their way through the exits.

    Args:
        runner: decides which documents leave, by `TopK`, or by `Budget` for all layers.
        rows: `[documents]` what the caller calls them.

    Attributes:
        rows: `[documents]` as given.
        going: `[documents]` whether a document still goes on, as far as the rule is concerned.
        exits: `[documents]` int64, the exit of each document: where it left, or the last one that
            it has passed.
        limited: `[documents]` whether a deadline stopped a document.
    """

    def __init__(self, runner: RuleRunner, rows: NDArray[Any]) -> None:
        exits = runner.exits
        documents = len(rows)
        self.rows = rows
        self._runner = runner
        self._state = runner.start(rows)
        self._numbers = exits
        self._next = exits[0]
        self._logits = np.full((len(exits), documents), np.nan, np.float32)
        self.going = np.ones(documents, np.bool_)
        self.exits = np.full(documents, exits[0], np.int64)
        self.limited = np.zeros(documents, np.bool_)
        self._final = np.zeros(documents, np.bool_)

    @property
    def undecided(self) -> int:
        """How many exits are not decided yet, the last one included."""
        return self._numbers[-1] + 1 - self._next

    def settled(self, documents: Numbers) -> Settled:
        """Documents with the logits of their exits.

        Args:
            documents: the numbers of the documents.
        """
        exits = self.exits[documents]
        return Settled(
            rows=self.rows[documents],
            exits=exits,
            logits=self._logits[exits - self._numbers[0], documents, None],
            limited=self.limited[documents],
        )

    def passed(self, exit_number: int, documents: Numbers, logits: NDArray[np.float32]) -> Numbers:
        """Note the logits of documents at an exit, and decide the exits that all have passed.

        Args:
            exit_number: the exit.
            documents: the numbers of the documents.
            logits: `[documents, 1]` at this exit.

        Returns:
            The numbers of the documents whose exits are final from now on. Documents that are ahead
            of others wait for them, even at the last exit.
        """
        self._logits[exit_number - self._numbers[0], documents] = logits[:, 0]
        still = documents[self.going[documents]]
        self.exits[still] = exit_number
        self._decide()
        return self._newly_final()

    def stop(self, documents: Numbers) -> Numbers:
        """Note that a deadline has stopped documents, after which nothing is decided any more.

        Args:
            documents: the numbers of the documents.

        Returns:
            As `passed`.
        """
        self.limited[documents] = True
        return self._newly_final()

    def _newly_final(self) -> Numbers:
        """The documents whose exits have become final since the last call."""
        last = self._numbers[-1]
        is_decided = self._next == last or self.limited.any()
        final = ~self.going | self.limited | (is_decided & (self.exits == last))
        new = np.flatnonzero(final & ~self._final)
        self._final |= final
        return new

    def _decide(self) -> None:
        """Let documents leave at each exit which can be decided now."""
        while self._next < self._numbers[-1] and not self.limited.any():
            left = np.flatnonzero(self.going)
            logits = self._logits[self._next - self._numbers[0], left]
            if np.isnan(logits).any():
                return
            stops, _ = self._runner.decide(self._next, self._state, logits[:, None])
            if stops is not None:
                self._state = self._state.take(np.flatnonzero(~stops))
                leaving = left[stops]
                self.going[leaving] = False
                self.exits[leaving] = self._next
            self._next += 1


@dataclass(slots=True, eq=False)
class Documents(State):
    """Documents of one or more queries that run in one group.

    Attributes:
        queries: `[rows]` the `RankedQuery` of each document.
        numbers: `[rows]` the number of each document in its query.
        has_exit: whether they have reached an exit.
    """

    queries: NDArray[np.object_]
    numbers: Numbers
    has_exit: bool = False

    def take(self, rows: Numbers) -> Documents:
        """Some of the documents."""
        return Documents(self.queries[rows], self.numbers[rows], self.has_exit)

    @staticmethod
    def join(parts: Sequence[Documents]) -> Documents:
        """The documents of several groups that have all passed the same exit."""
        return Documents(
            np.concatenate([part.queries for part in parts]),
            np.concatenate([part.numbers for part in parts]),
            parts[0].has_exit,
        )

    def settled(self) -> Settled:
        """At least one document, in this order, with the logits of their exits."""
        every = np.arange(len(self.numbers))
        return _joined([query.settled(self.numbers[at]) for query, at in self.by_query(every)])

    def by_query(self, places: Numbers) -> Iterator[tuple[RankedQuery, Numbers]]:
        """The queries of the documents at these places, and which places belong to each."""
        queries = self.queries[places]
        for query in dict.fromkeys(queries.tolist()):
            yield query, places[queries == query]


class QueryRunner(Runner[Documents]):
    """Decides about documents, each among the others of its query.

    Args:
        documents: applies the rule to the documents of one query that are left at an exit.
    """

    def __init__(self, documents: RuleRunner) -> None:
        self.rule = documents.rule
        self.exits = documents.exits
        self.last = documents.last
        self._documents = documents

    def start(self, rows: NDArray[Any]) -> Documents:
        """The documents of a new query.

        Args:
            rows: `[documents]` what the caller calls them.
        """
        query = RankedQuery(self._documents, rows)
        return Documents(np.full(len(rows), query, np.object_), np.arange(len(rows)))

    def check_alone(self) -> None:
        """See `Runner.check_alone`; documents that all run all layers are not compared."""
        if self.rule.ranks:
            raise RuleError(
                f"rule {self.rule.name} compares the documents of one query, and a trace has no "
                "queries",
                "rank them, or trace them to full depth",
            )

    def settle(
        self, exit_number: int, state: Documents, rows: NDArray[Any], logits: NDArray[np.float32]
    ) -> tuple[Settled | None, Mask | None]:
        """See `Runner.settle`."""
        state.has_exit = True
        parts = []
        for query, places in state.by_query(np.arange(len(rows))):
            new = query.passed(exit_number, state.numbers[places], logits[places])
            if len(new):
                parts.append(query.settled(new))
        going = self.goes_on(state)
        if exit_number >= self.last:
            going = np.zeros(len(rows), np.bool_)
        return (_joined(parts) if parts else None), going

    def goes_on(self, state: Documents) -> Mask | None:
        """See `Runner.goes_on`."""
        going = np.empty(len(state.numbers), np.bool_)
        for query, places in state.by_query(np.arange(len(going))):
            numbers = state.numbers[places]
            going[places] = query.going[numbers] & ~query.limited[numbers]
        return None if going.all() else going

    def stop(
        self,
        exit_number: int,
        state: Documents,
        rows: NDArray[Any],
        places: Numbers,
    ) -> Settled:
        """See `Runner.stop`; a document is answered with the last exit that it has passed."""
        parts = [
            query.settled(query.stop(state.numbers[some])) for query, some in state.by_query(places)
        ]
        return _joined(parts)

    def exits_of(self, logits: NDArray[np.float32]) -> Integers:
        """See `Runner.exits_of`; the rows are the documents of one query."""
        every = np.arange(logits.shape[1])
        query = RankedQuery(self._documents, every)
        for number, at_exit in zip(self.exits, logits, strict=True):
            query.passed(number, every, at_exit)
        return query.exits


def _joined(parts: Sequence[Settled]) -> Settled:
    """The settled rows of several queries."""
    if len(parts) == 1:
        return parts[0]
    return Settled(*map(np.concatenate, zip(*parts, strict=True)))
