"""Labelled logits, and metrics as sums over their rows.

Every metric here is a function of sums over rows, of a few numbers for each exit and row: for
accuracy whether the answer is right, for an F1 the hits and predictions of each label. A sweep over
thresholds then only needs a few histograms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.exits import Exits
from ..runtime.artifact.manifest import ProblemType
from ..runtime.quality import f1, matthews
from ..runtime.rules.measures import Array, Integers, Mask
from ..runtime.tasks import Task, unnamed_task

AGREEMENT = "agreement"
"""Share of rows with the same decision as the reference, usually full depth; it needs no labels."""

ROW_MEANS = ("accuracy", "exact_match", AGREEMENT)
"""Metrics that are the mean over rows of 0 or 1."""

METRICS = {
    ProblemType.SINGLE_LABEL: ("accuracy", "macro_f1", "matthews", AGREEMENT),
    ProblemType.MULTI_LABEL: ("exact_match", "micro_f1", "macro_f1", AGREEMENT),
}
"""The metrics of each task; the first is the default."""


@dataclass(frozen=True)
class LabelledLogits:
    """The trace of some rows at full depth, with their labels.

    Attributes:
        logits: `[exits, rows, labels]` float32, from the first exit on.
        lengths: `[rows]` tokens.
        expected: the true labels, int64: class indices `[rows]`, or for multi-label tasks
            `[rows, labels]` of 0 and 1. None if the labels are not known.
        problem_type: the type of the task.
        label_thresholds: for multi-label tasks, see `Task.label_thresholds`; empty means 0.5.
        first_exit: 0 if the model has exit 0, else 1.
        decision_thresholds: `[labels]` if what counts as a decision is which labels are above these
            probabilities (1 for labels that decide nothing); empty: the answer is the decision.
        reference: `[rows, labels]` float32 logits of a classifier that decisions are compared with;
            None: the last exit.
        has_quick_pass: whether the last exit is the end of an exact pass, and those before it are
            those of a quick pass.
    """

    logits: NDArray[np.float32]
    lengths: NDArray[np.intp]
    expected: Integers | None
    problem_type: ProblemType
    label_thresholds: tuple[float, ...] = ()
    first_exit: int = 1
    decision_thresholds: tuple[float, ...] = ()
    reference: NDArray[np.float32] | None = None
    has_quick_pass: bool = False

    def __len__(self) -> int:
        return int(self.logits.shape[1])

    @property
    def exits(self) -> range:
        """The numbers of the exits."""
        return exits_of_rows(self).numbers

    @property
    def decides_by_flags(self) -> bool:
        """Whether a decision is which labels are flagged, and the answer may be another one."""
        return bool(self.decision_thresholds) and not task_of_rows(self).flags

    def at(self, exits: NDArray[np.integer[Any]]) -> tuple[Any, ...]:
        """Where arrays `[exits, rows]` hold what belongs to rows that stop at given exits.

        Args:
            exits: `[..., rows]` the exit of each row.
        """
        return exits_of_rows(self).place(exits), np.arange(len(self))

    def take(self, numbers: NDArray[np.intp]) -> LabelledLogits:
        """Some of the rows, by their numbers from 0."""
        expected = None if self.expected is None else self.expected[numbers]
        reference = None if self.reference is None else self.reference[numbers]
        logits = self.logits[:, numbers]
        lengths = self.lengths[numbers]
        return replace(self, logits=logits, lengths=lengths, expected=expected, reference=reference)

    def answers(self) -> Integers:
        """Class indices `[exits, rows]`, or for multi-label `[exits, rows, labels]` of 0 and 1."""
        return task_of_rows(self).answers(self.logits)

    def decisions(self) -> tuple[Integers, Integers]:
        """What is decided at every exit, and by the reference: without the first axis.

        These are answers, see `answers`; or with decision thresholds which labels are above them,
        `[exits, rows, labels]` of 0 and 1.
        """
        every = self.logits if self.reference is None else [*self.logits, self.reference]
        outputs = map(task_of_rows(self).outputs, every)
        decisions = [each.decisions(self.decision_thresholds) for each in outputs]
        return np.stack(decisions[: len(self.logits)]), decisions[-1]


def task_of_rows(rows: LabelledLogits) -> Task:
    """What the logits of rows mean; its labels have no names."""
    return unnamed_task(rows.problem_type, rows.logits.shape[2], rows.label_thresholds)


def exits_of_rows(rows: LabelledLogits) -> Exits:
    """The exits of the logits of rows, as if there were a layer between two of them."""
    return Exits.numbered(rows.first_exit, len(rows.logits))


# Settings are compared at these multiples of the share that may change.
_AT = (0.5, 1.0, 2.0)
_FEWEST_TEXTS = 5
"""With fewer rows, that a label lost most of them may be chance."""


class Scorer:
    """One metric of rows that stop at given exits.

    Args:
        rows: the rows.
        metric: its name, one of the `METRICS` of the task; all but agreement need labels.

    Attributes:
        rows: the rows.
        metric: its name.
        answers: the answers at every exit, see `LabelledLogits.answers`.
        sums: `[exits, rows, terms]` float64, what is summed over rows.
        full_depth: the metric at the last exit.
    """

    def __init__(self, rows: LabelledLogits, metric: str) -> None:
        self.rows = rows
        self.metric = metric
        self.answers = rows.answers()
        self.sums = self._sums()
        self.full_depth = float(self.value(self.sums[-1].sum(axis=0)))

    @property
    def is_row_mean(self) -> bool:
        """Whether the metric is the mean over rows of 0 or 1."""
        return self.metric in ROW_MEANS

    @cached_property
    def decisions(self) -> tuple[Integers, Integers]:
        """The decisions at every exit, and those of the reference."""
        return self.rows.decisions()

    @cached_property
    def changed(self) -> Mask:
        """Whether the decision differs from that of the reference: `[exits, rows]`."""
        task = task_of_rows(self.rows)
        return ~task.same_decisions(*self.decisions, self.rows.decision_thresholds)

    @cached_property
    def relabelled(self) -> Mask:
        """Whether the answer differs from that of the reference: `[exits, rows]`.

        Where thresholds decide which labels are flagged, it may differ although `changed` is false.
        """
        answers = replace(self.rows, decision_thresholds=()).decisions()
        return ~task_of_rows(self.rows).same(*answers)

    def right(self) -> Mask:
        """Whether the answer is exactly the expected one: `[exits, rows]`."""
        if self.metric == AGREEMENT:
            return ~self.changed
        return task_of_rows(self.rows).same(self.answers, self._expected)

    @property
    def _expected(self) -> Integers:
        assert self.rows.expected is not None
        return self.rows.expected

    def value(self, sums: Array) -> Array:
        """The metric `[...]` of sums `[..., terms]` over as many rows as there are."""
        if self.is_row_mean:
            return np.asarray(sums[..., 0] / len(self.rows))
        if self.metric == "micro_f1":
            return f1(sums[..., 0], sums[..., 1])
        hits, predicted, truth = np.split(sums, 3, axis=-1)
        if self.metric == "matthews":
            return matthews(hits, predicted, truth, len(self.rows))
        by_label = f1(hits, predicted + truth)
        if task_of_rows(self.rows).flags:
            return np.asarray(by_label.mean(axis=-1))
        # The mean over the labels that occur, as in `evaluate`.
        occurs = (predicted + truth > 0).sum(axis=-1)
        return np.asarray(by_label.sum(axis=-1) / np.maximum(occurs, 1))

    def at(self, exits: NDArray[np.integer[Any]]) -> Array:
        """The terms `[rows, terms]` of rows that stop at given exits."""
        return np.asarray(self.sums[self.rows.at(exits)])

    def score(self, exits: NDArray[np.integer[Any]]) -> float:
        """The metric of rows that stop at given exits."""
        return float(self.value(self.at(exits).sum(axis=0)))

    def lost_label(self, exits: Integers, labels: Sequence[str]) -> str:
        """The label that loses most of its rows if they stop early; a metric may hardly show it.

        Args:
            exits: `[rows]` the exit of each row.
            labels: the names of the labels.

        Returns:
            A clause about the label that loses the largest share of the rows to which the reference
            gives it; empty if each label keeps half of them, or has fewer than five.
        """
        every, reference = self.decisions
        decided = every[self.rows.at(exits)]
        if reference.ndim == 1:
            one = np.eye(len(labels), dtype=np.int64)
            decided = one[decided]
            reference = one[reference]
        counts = reference.sum(axis=0)
        kept = (decided & reference).sum(axis=0)
        shares = np.where(counts < _FEWEST_TEXTS, 1, kept / np.maximum(counts, 1))
        worst = int(shares.argmin())
        whole = "all layers give" if self.rows.reference is None else "the classifier gives"
        if shares[worst] >= 0.5:
            return ""
        return (
            f"{kept[worst]} of the {counts[worst]} texts to which {whole} the label "
            f"{labels[worst]!r} keep it"
        )

    def _sums(self) -> Array:
        if self.is_row_mean:
            return self.right()[..., None].astype(np.float64)
        marks = self._marks(self.answers)
        truth = np.broadcast_to(self._marks(self._expected), marks.shape)
        hits = marks * truth
        if self.metric == "micro_f1":
            return np.stack([hits.sum(axis=-1), (marks + truth).sum(axis=-1)], axis=-1)
        return np.concatenate([hits, marks, truth], axis=-1)

    def _marks(self, answers: Integers) -> Array:
        """`[..., labels]` of 0 and 1."""
        if task_of_rows(self.rows).flags:
            return answers.astype(np.float64)
        return np.eye(self.rows.logits.shape[2])[answers]


def mean_saving(saved: Array, changed: Array, share: float) -> float:
    """What settings save at about a permitted share of changes, to compare heads by.

    Args:
        saved: `[settings]` the share of the cost that each setting saves.
        changed: `[settings]` the share of answers that it changes.
        share: what may change; the mean is over half, once and twice as much.
    """
    return float(np.mean([saved[changed <= at * share].max(initial=0.0) for at in _AT]))
