"""Apply a rule exit by exit: one `RuleRunner` for live runs and for `simulate`, so they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import ProblemType
from ..errors import RuleError
from .measures import Array, Floats, Integers, Mask, Outputs
from .rules import Budget, ExitRule, names_of_rules


@dataclass(slots=True, eq=False)
class PatienceState:
    """What a rule remembers of a group of rows from one exit to the next.

    Attributes:
        streak: `[rows]` int64, how many consecutive signals each row has given.
        earlier: outputs of the previous exit; None before the first exit.
    """

    streak: Integers
    earlier: Outputs | None = None

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


@dataclass(eq=False)
class RuleRunner:
    """Applies a rule to groups of rows, one exit after another.

    Args:
        rule: the rule.
        problem_type: the type of the task.
        exits: the numbers of the exits of the model.
        label_thresholds: for multi-label tasks, see `Task.label_thresholds`; empty means 0.5.

    Attributes:
        last: the exit at which every row stops.

    Raises:
        RuleError: `rule` is not a rule, or it does not fit the exits.
    """

    rule: ExitRule
    problem_type: ProblemType
    exits: range
    label_thresholds: Sequence[float] = ()

    def __post_init__(self) -> None:
        rule = self.rule
        if not isinstance(rule, ExitRule):
            raise RuleError(
                f"the rule is {rule!r}, a {type(rule).__name__}",
                "give a rule such as FPabee(threshold=0.2), or ExitRule.from_dict(...)",
            )
        # `Budget` compares nothing, so it fits any task.
        if rule.ranks != (self.problem_type is ProblemType.RANKING) and not isinstance(
            rule, Budget
        ):
            what = "rankings" if rule.ranks else "classification"
            raise RuleError(
                f"rule {rule.name} is for {what}, and the task is {self.problem_type.value}",
                f"choose from {names_of_rules(not rule.ranks)}",
            )
        rule.check_exits(self.exits)
        self.last = self.exits[-1] if rule.max_exit is None else rule.max_exit
        full_depth = self.exits[-1]
        stops = min(self.last, rule.exit) if isinstance(rule, Budget) else self.last
        if self.problem_type is ProblemType.RANKING and stops < full_depth:
            raise RuleError(
                f"the rule stops all documents at exit {stops}, so none has the score of the model",
                f"give a rule that reaches exit {full_depth}, without an earlier `max_exit`",
            )
        self._signals_needed = rule.signals_needed

    def start(self, rows: int) -> PatienceState:
        """The state of a group of rows before the first exit."""
        return PatienceState(np.zeros(rows, np.int64))

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
        now = Outputs(logits, self.problem_type, self.label_thresholds)
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


@dataclass(frozen=True)
class Simulation:
    """What a rule does with a trace.

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


def simulate(
    logits: Floats,
    rule: ExitRule,
    problem_type: ProblemType | str,
    label_thresholds: Sequence[float] = (),
    first_exit: int = 1,
) -> Simulation:
    """Apply a rule to a trace: exactly the exits of a live run that gives these logits.

    Args:
        logits: `[exits, rows, labels]` at full depth, of any floating-point type, such as
            `Trace.logits`. Scores are computed in float64.
        rule: the rule.
        problem_type: `single_label_classification` or `multi_label_classification`.
        label_thresholds: `[labels]` for multi-label tasks, see `Task.label_thresholds`; empty
            means 0.5.
        first_exit: the exit of the first logits, see `Trace.first_exit`.

    Raises:
        RuleError: the logits have another shape, or the rule does not fit the exits.
        ValueError: the problem type does not exist.

    Example:
        Two exits and two rows, where exit 1 is sure of the first row only:

        >>> import numpy as np
        >>> from fpabee.runtime import Confidence, simulate
        >>> logits = np.array([[[4.0, 0.0], [0.2, 0.0]], [[5.0, 0.0], [0.0, 3.0]]])
        >>> result = simulate(logits, Confidence(threshold=0.9), "single_label_classification")
        >>> result.exits
        array([1, 2])
        >>> result.predictions
        array([0, 1])
        >>> result.scores.round(2)
        array([[0.98, 0.55],
               [0.99, 0.95]])
    """
    logits = np.asarray(logits)
    if logits.ndim != 3 or logits.shape[0] == 0:
        raise RuleError(f"logits have shape {list(logits.shape)}", "expected [exits, rows, labels]")
    count, rows, labels = logits.shape
    task = ProblemType(problem_type)
    exits = range(first_exit, first_exit + len(logits))
    runner = RuleRunner(rule, task, exits, label_thresholds)
    state = runner.start(rows)
    chosen = np.full(rows, -1, np.int64)
    shape = (rows,) if task is ProblemType.SINGLE_LABEL else (rows, labels)
    predictions = np.zeros(shape, np.int64)
    scores = np.full((count, rows), np.nan)
    for place, number in enumerate(exits):
        stops, exit_scores = runner.decide(number, state, logits[place])
        if exit_scores is not None:
            scores[place] = exit_scores
        if stops is not None and state.earlier is not None:
            new = stops & (chosen < 0)
            chosen[new] = number
            predictions[new] = state.earlier.answers[new]
    return Simulation(chosen, predictions, scores)
