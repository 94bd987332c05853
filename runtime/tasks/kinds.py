"""The kinds of models, in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypeVar

import numpy as np

from ..artifact import manifest
from ..artifact.manifest import ProblemType
from ..errors import InputError, RuleError
from ..rules.measures import Floats
from ..rules.rules import ExitRule
from ..rules.runner import Simulation
from .classification import Classification, MultiLabel, SingleLabel
from .ranking import Ranking
from .task import Task

RowT = TypeVar("RowT")

KINDS: dict[ProblemType, type[Task]] = {
    ProblemType.SINGLE_LABEL: SingleLabel,
    ProblemType.MULTI_LABEL: MultiLabel,
    ProblemType.RANKING: Ranking,
}
"""The class of a task, by its type."""
CLASSIFICATION = [kind for kind, task in KINDS.items() if issubclass(task, Classification)]
"""The types that a model may not name; a model with one label ranks in any case."""


@cache
def task_of(record: manifest.Task) -> Task:
    """The task of a model, from its record in the manifest."""
    return KINDS[record.problem_type](record)


def row_of(
    table: Mapping[ProblemType, RowT], kind: ProblemType | str, use: str, hint: str = ""
) -> RowT:
    """The row of a kind of model, in the table of a use that is not for every kind.

    Args:
        table: what the use needs, by the type of the task.
        kind: the type of the task of the model.
        use: what the table is for, such as `calibrated`.
        hint: what to do with other models; empty: which models to give instead.

    Raises:
        InputError: the table has no row for this kind.
        ValueError: the type does not exist.
    """
    kind = ProblemType(kind)
    if kind not in table:
        names = " or ".join(each.value for each in table)
        raise InputError(
            f"{KINDS[kind].models} cannot be {use}", hint or f"give a model for {names}"
        )
    return table[kind]


@cache
def unnamed_task(
    problem_type: ProblemType | str, labels: int, label_thresholds: tuple[float, ...] = ()
) -> Task:
    """A task whose labels have no names.

    Args:
        problem_type: its type.
        labels: how many labels there are.
        label_thresholds: for multi-label tasks, see `Task.label_thresholds`; empty means 0.5.

    Raises:
        ValueError: the problem type does not exist.
    """
    names = tuple(map(str, range(labels)))
    kind = ProblemType(problem_type)
    return task_of(
        manifest.Task(problem_type=kind, labels=names, label_thresholds=label_thresholds)
    )


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
    task = unnamed_task(problem_type, logits.shape[2], tuple(label_thresholds))
    return task.simulate(logits, rule, first_exit)
