"""Which rows of a group may go on, and which have their answers: one question for all tasks.

A group of rows passes one exit after another. A text knows by itself when to stop, see
`RuleRunner`. Documents of a query wait for each other, see `fpabee.runtime.tasks.queries`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .measures import Integers, Mask
from .rules import ExitRule


class Settled(NamedTuple):
    """Rows that have their answers.

    Attributes:
        rows: `[rows]` the rows, as the caller calls them.
        exits: `[rows]` int64, the exit of each row.
        logits: `[rows, labels]` float32 at that exit.
        limited: `[rows]` whether a deadline stopped a row before its rule did.
    """

    rows: NDArray[Any]
    exits: Integers
    logits: NDArray[np.float32]
    limited: Mask

    @classmethod
    def at(
        cls, exit_number: int, rows: NDArray[Any], logits: NDArray[np.float32], limited: Mask
    ) -> Settled:
        """Rows that all stop at one exit.

        Args:
            exit_number: the exit.
            rows: as in the attributes.
            logits: as in the attributes.
            limited: as in the attributes.
        """
        exits = np.empty(len(rows), np.int64)
        exits.fill(exit_number)
        return cls(rows, exits, logits, limited)

    def take(self, places: NDArray[np.intp]) -> Settled:
        """Some of the rows, by their places."""
        return Settled(
            rows=self.rows[places],
            exits=self.exits[places],
            logits=self.logits[places],
            limited=self.limited[places],
        )


StateT = TypeVar("StateT", bound="State")


class State(ABC):
    """The memory of a group of rows from one exit to the next."""

    @property
    @abstractmethod
    def has_exit(self) -> bool:
        """Whether the rows have reached an exit, with which they could be answered."""

    @abstractmethod
    def take(self: StateT, rows: NDArray[np.intp]) -> StateT:
        """That of some of the rows."""

    @staticmethod
    @abstractmethod
    def join(parts: Sequence[Any]) -> State:
        """That of several groups of the same kind that have all passed the same exit."""


class Runner(ABC, Generic[StateT]):
    """Decides which rows of groups may go on, and which have their answers.

    Attributes:
        rule: the rule.
        exits: the numbers of the exits of the model.
        last: the exit at which every row stops.
    """

    rule: ExitRule
    exits: range
    last: int

    @abstractmethod
    def start(self, rows: NDArray[Any]) -> StateT:
        """The state of new rows, before the first exit.

        Args:
            rows: `[rows]` what the caller calls them.
        """

    @abstractmethod
    def settle(
        self, exit_number: int, state: StateT, rows: NDArray[Any], logits: NDArray[np.float32]
    ) -> tuple[Settled | None, Mask | None]:
        """Note that a group has passed an exit.

        Args:
            exit_number: a group sees every exit in turn.
            state: the state of the group, which is updated.
            rows: `[rows]` the rows of the group.
            logits: `[rows, labels]` of these rows at this exit.

        Returns:
            The rows that have their answers now, which may be in other groups; None: there are
            none. And which rows of the group go on, `[rows]`; None: all of them.
        """

    def check_alone(self) -> None:
        """Refuse rows of which it is not known to what they belong.

        Raises:
            RuleError: the rule compares rows.
        """

    @abstractmethod
    def exits_of(self, logits: NDArray[np.float32]) -> Integers:
        """The exits `[rows]` of rows that run together: those of a live run with these logits.

        Args:
            logits: `[exits, rows, labels]` at full depth.
        """

    def goes_on(self, state: StateT) -> Mask | None:
        """Which rows of a group still go on, `[rows]`, if others decide about them; None: all.

        It is asked before each segment.
        """
        return None

    @abstractmethod
    def stop(
        self, exit_number: int, state: StateT, rows: NDArray[Any], places: NDArray[np.intp]
    ) -> Settled:
        """Note that a deadline stops rows of a group, which have reached an exit.

        Args:
            exit_number: the exit that was read last.
            state: the state of the group.
            rows: `[rows]` the rows of the group.
            places: which of them are stopped.

        Returns:
            The rows that have their answers now.
        """
