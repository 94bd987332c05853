"""Apply a rule exit by exit: one `RuleRunner` for live runs and for `simulate`, so they agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .measures import Array, Floats, Integers, Mask, Outputs
from .rules import ExitRule
from .settling import Runner, Settled, State


@dataclass(slots=True, eq=False)
class PatienceState(State):
    """The memory of a rule for a group of rows, from one exit to the next.

    Attributes:
        streak: `[rows]` int64, how many consecutive signals each row has given.
        earlier: outputs of the previous exit; None before the first exit.
    """

    streak: Integers
    earlier: Outputs | None = None

    @property
    def has_exit(self) -> bool:
        """Whether there is a previous exit."""
        return self.earlier is not None

    def take(self, rows: NDArray[np.intp]) -> PatienceState:
        """The state of some of the rows."""
        earlier = None if self.earlier is None else self.earlier.take(rows)
        return PatienceState(self.streak[rows], earlier)

    @staticmethod
    def join(parts: Sequence[PatienceState]) -> PatienceState:
        """The state of several groups that have all passed the same exit."""
        earlier = [part.earlier for part in parts if part.earlier is not None]
        return PatienceState(
            np.concatenate([part.streak for part in parts]),
            Outputs.join(earlier) if earlier else None,
        )


@dataclass(frozen=True)
class Simulation:
    """The exits, answers and scores of a rule on a trace.

    Attributes:
        exits: `[rows]` int64, the exit of each row.
        predictions: int64, the answer at that exit: class indices `[rows]`, or for multi-label
            tasks `[rows, labels]` of 0 and 1.
        scores: `[exits, rows]` float64, at all exits, including those after a row's exit; NaN
            where the rule has no score, such as at exit 0.
    """

    exits: Integers
    predictions: Integers
    scores: Array


@dataclass(eq=False)
class RuleRunner(Runner[PatienceState]):
    """Applies a rule to groups of rows that know by themselves when to stop.

    Args:
        rule: the rule.
        exits: the numbers of the exits of the model.
        outputs: makes the outputs of rows at an exit, from their logits `[rows, labels]`.

    Attributes:
        last: the exit at which every row stops.

    Raises:
        RuleError: the rule does not fit the exits.
    """

    rule: ExitRule
    exits: range
    outputs: Callable[[Floats], Outputs]

    def __post_init__(self) -> None:
        self.rule.check_exits(self.exits)
        self.last = self.exits[-1] if self.rule.max_exit is None else self.rule.max_exit
        self._signals_needed = self.rule.signals_needed

    def start(self, rows: NDArray[Any]) -> PatienceState:
        """The state of a group of rows before the first exit."""
        return PatienceState(np.zeros(len(rows), np.int64))

    def settle(
        self,
        exit_number: int,
        state: PatienceState,
        rows: NDArray[Any],
        logits: NDArray[np.float32],
    ) -> tuple[Settled | None, Mask | None]:
        """See `Runner.settle`."""
        stops, _ = self.decide(exit_number, state, logits)
        if stops is None:
            return None, None
        stopped = rows[stops]
        limited = np.zeros(len(stopped), np.bool_)
        return Settled.at(exit_number, stopped, logits[stops], limited), ~stops

    def stop(
        self, exit_number: int, state: PatienceState, rows: NDArray[Any], places: NDArray[np.intp]
    ) -> Settled:
        """See `Runner.stop`."""
        assert state.earlier is not None
        logits = state.earlier.logits[places].astype(np.float32)
        return Settled.at(exit_number, rows[places], logits, np.ones(len(places), np.bool_))

    def decide(
        self, exit_number: int, state: PatienceState, logits: Floats
    ) -> tuple[Mask | None, Array | None]:
        """Decide which rows of a group stop at an exit, and update their state.

        Args:
            exit_number: a group sees every exit in turn.
            state: the state of the group.
            logits: `[rows, labels]` of these rows at this exit.

        Returns:
            Which rows stop, `[rows]`, or None if no row does; and their scores, `[rows]`, or None
            if the rule has no score here.
        """
        now = self.outputs(logits)
        earlier = state.earlier
        state.earlier = now
        stops = None
        scores = None
        if exit_number == 0:
            stops = self.rule.stops_at_exit_0(now)
        elif earlier is not None or not self.rule.compares_exits:
            signal = self.rule.signal(exit_number, earlier, now)
            stops = signal.agrees
            scores = signal.scores
            if self._signals_needed > 1:
                state.streak = (state.streak + 1) * signal.agrees
                stops = state.streak >= self._signals_needed
            if signal.stop_now is not None:
                stops = stops | signal.stop_now
        if exit_number >= self.last:
            return np.ones(len(logits), np.bool_), scores
        if stops is None or exit_number < self.rule.min_exit or not np.count_nonzero(stops):
            return None, scores
        return stops, scores

    def exits_of(self, logits: NDArray[np.float32]) -> Integers:
        """See `Runner.exits_of`."""
        return self.simulate(logits).exits

    def simulate(self, logits: Floats) -> Simulation:
        """Apply the rule to a trace: exactly the exits of a live run that gives these logits.

        Args:
            logits: `[exits, rows, labels]` at full depth.
        """
        count, rows, _ = logits.shape
        state = self.start(np.arange(rows))
        chosen = np.full(rows, -1, np.int64)
        predictions: Integers | None = None
        scores = np.full((count, rows), np.nan)
        for place, number in enumerate(self.exits):
            stops, exit_scores = self.decide(number, state, logits[place])
            if exit_scores is not None:
                scores[place] = exit_scores
            if stops is not None and state.earlier is not None:
                answers = state.earlier.answers
                if predictions is None:
                    predictions = np.zeros_like(answers)
                new = stops & (chosen < 0)
                chosen[new] = number
                predictions[new] = answers[new]
        assert predictions is not None  # every row stops at the last exit
        return Simulation(chosen, predictions, scores)
