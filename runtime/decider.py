"""Apply a rule exit by exit: one `Decider` for live runs and for `simulate`, so they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .distributions import Answers, Array, Floats, Mask, Outputs
from .errors import RuleError
from .exit_rules import ExitRule, Signs
from .manifest import ProblemType


class Progress:
    """What a rule remembers of a group of rows from one exit to the next.

    Args:
        signs: `[rows]` int64, signs in a row so far.
        earlier: outputs of the exit before; None before exit 1.
    """

    __slots__ = ("earlier", "signs")

    def __init__(self, signs: Answers, earlier: Outputs | None = None) -> None:
        self.signs = signs
        self.earlier = earlier

    def take(self, rows: NDArray[np.intp]) -> Progress:
        """That of some of the rows."""
        earlier = None if self.earlier is None else self.earlier.take(rows)
        return Progress(self.signs[rows], earlier)

    @staticmethod
    def join(parts: Sequence[Progress]) -> Progress:
        """That of several groups, all of them past the same exit."""
        earlier = [part.earlier for part in parts if part.earlier is not None]
        return Progress(
            np.concatenate([part.signs for part in parts]),
            Outputs.join(earlier) if earlier else None,
        )


class Decider:
    """Applies a rule to groups of rows, one exit after another.

    Args:
        rule: the rule.
        problem_type: the task.
        exits: number of exits of the model.
        cuts: multi-label decision cuts, see `Task.cuts`.

    Attributes:
        rule: the rule.
        problem_type: the task.
        last: the exit at which every row stops.

    Raises:
        RuleError: that is no rule, or it names an exit that the model does not have.
    """

    def __init__(
        self,
        rule: ExitRule,
        problem_type: ProblemType,
        exits: int,
        cuts: Sequence[float] = (),
    ) -> None:
        if not isinstance(rule, ExitRule):
            raise RuleError(
                f"the rule is {rule!r}, a {type(rule).__name__}",
                "give a rule such as FPabee(threshold=0.2), or ExitRule.from_dict(...)",
            )
        for field in ("exit", "min_exit", "max_exit"):
            value = getattr(rule, field, None)
            if value is not None and value > exits:
                raise RuleError(
                    f"rule {rule.name}: {field} is {value}, but the model has {exits} exits",
                    f"give at most {exits}",
                )
        threshold = getattr(rule, "threshold", None)
        if isinstance(threshold, tuple) and len(threshold) != exits:
            raise RuleError(
                f"rule {rule.name} has {len(threshold)} thresholds, but the model has {exits} "
                "exits",
                f"give one number, or {exits}: one for each exit",
            )
        self.rule = rule
        self.problem_type = problem_type
        self.last = rule.max_exit or exits
        self._cuts = cuts
        self._signs_from = rule.signs_from
        self._signs_needed = rule.signs_needed

    def start(self, rows: int) -> Progress:
        """The progress of a group of rows before exit 1."""
        return Progress(np.zeros(rows, np.int64))

    def decide(
        self, exit_number: int, progress: Progress, logits: Floats
    ) -> tuple[Mask | None, Array | None]:
        """Decide for the rows of a group at an exit, and note it in their progress.

        Args:
            exit_number: from 1; a group sees every exit in turn.
            progress: that of the group's rows.
            logits: `[rows, labels]` of these rows at this exit.

        Returns:
            Which rows stop `[rows]`, None if none does, and their scores `[rows]` or None.
        """
        now = Outputs(logits, self.problem_type, self._cuts)
        earlier, progress.earlier = progress.earlier, now
        stops, scores = None, None
        if exit_number >= self._signs_from:
            signs = self.rule.signs(exit_number, earlier, now)
            stops, scores = self._count(progress, signs), signs.scores
        if exit_number >= self.last:
            return np.ones(len(logits), np.bool_), scores
        if stops is None or exit_number < self.rule.min_exit or not np.count_nonzero(stops):
            return None, scores
        return stops, scores

    def _count(self, progress: Progress, signs: Signs) -> Mask:
        """Which rows have enough signs."""
        enough = signs.settled
        if self._signs_needed > 1:
            progress.signs += 1
            progress.signs *= signs.settled
            enough = progress.signs >= self._signs_needed
        return enough if signs.at_once is None else enough | signs.at_once


@dataclass(frozen=True)
class Simulation:
    """What a rule does with a trace.

    Attributes:
        exits: `[rows]` int64, exit of each row, counted from 1.
        predictions: int64, the answer at that exit: `[rows]` class indices, or for
            multi-label `[rows, labels]` of 0 and 1.
        scores: `[exits, rows]` float64, at all exits, also those after a row's; NaN where the
            rule has none.
    """

    exits: Answers
    predictions: Answers
    scores: Array


def simulate(
    logits: Floats,
    rule: ExitRule,
    problem_type: ProblemType | str,
    cuts: Sequence[float] = (),
) -> Simulation:
    """Apply a rule to a trace: exactly the exits of a live run that gave these logits.

    Args:
        logits: `[exits, rows, labels]` of any floating-point type, at full depth: such as
            `Trace.logits`. Scores are computed in float64.
        rule: the rule.
        problem_type: `single_label_classification` or `multi_label_classification`.
        cuts: multi-label: `[labels]` decision cuts, as in `Task.cuts`; none means 0.5.

    Raises:
        RuleError: the logits are not of that shape, or the rule does not fit.
        ValueError: there is no such problem type.

    Example:
        Two exits, two rows: exit 1 is sure of the first row only.

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
    exits, rows, labels = logits.shape
    task = ProblemType(problem_type)
    decider = Decider(rule, task, exits, cuts)
    progress = decider.start(rows)
    chosen = np.zeros(rows, np.int64)
    shape = (rows,) if task is ProblemType.SINGLE_LABEL else (rows, labels)
    predictions = np.zeros(shape, np.int64)
    scores = np.full((exits, rows), np.nan)
    for number in range(1, exits + 1):
        stops, exit_scores = decider.decide(number, progress, logits[number - 1])
        if exit_scores is not None:
            scores[number - 1] = exit_scores
        if stops is not None and progress.earlier is not None:
            new = stops & (chosen == 0)
            chosen[new] = number
            predictions[new] = progress.earlier.answers[new]
    return Simulation(chosen, predictions, scores)
