"""Metrics as sums over rows, so that a sweep over thresholds is a handful of histograms.

Every metric here is a function of sums over rows of a few numbers per (exit, row): for
accuracy whether the answer is right, for an F1 hits and predictions of each label. Which
metrics are means over rows matters to risk control and to the interval of a drop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.manifest import ProblemType
from ..runtime.errors import InputError
from ..runtime.metrics import evaluate
from ..runtime.rules.measures import Answers, Array, Outputs

AGREEMENT = "agreement"
"""Share of rows whose answer is that of full depth: needs no labels."""

ROW_MEANS = ("accuracy", "exact_match", AGREEMENT)
"""Metrics that are means over rows of 0 or 1."""

METRICS = {
    ProblemType.SINGLE_LABEL: ("accuracy", "macro_f1", "matthews", AGREEMENT),
    ProblemType.MULTI_LABEL: ("exact_match", "micro_f1", "macro_f1", AGREEMENT),
}
"""The metrics of each task; the first is the default."""


@dataclass(frozen=True)
class Rows:
    """A trace of some rows at full depth, with their labels.

    Attributes:
        logits: `[exits, rows, labels]` float32.
        lengths: `[rows]` tokens.
        expected: the labels, int64: `[rows]` class indices, or for multi-label `[rows, labels]`
            of 0 and 1; None: no labels.
        problem_type: the task.
        label_thresholds: multi-label decision cuts; none means 0.5.
    """

    logits: NDArray[np.float32]
    lengths: NDArray[np.intp]
    expected: Answers | None
    problem_type: ProblemType
    label_thresholds: tuple[float, ...] = ()

    def __len__(self) -> int:
        return int(self.logits.shape[1])

    @property
    def exits(self) -> int:
        """Number of exits."""
        return int(self.logits.shape[0])

    def take(self, numbers: NDArray[np.intp]) -> Rows:
        """Some of the rows, by their numbers from 0."""
        expected = None if self.expected is None else self.expected[numbers]
        logits, lengths = self.logits[:, numbers], self.lengths[numbers]
        return Rows(logits, lengths, expected, self.problem_type, self.label_thresholds)

    def answers(self) -> Answers:
        """Class indices `[exits, rows]`, or for multi-label `[exits, rows, labels]` of 0 and 1."""
        return np.stack(
            [Outputs(z, self.problem_type, self.label_thresholds).answers for z in self.logits]
        )


def check_metric(metric: str, problem_type: ProblemType, labelled: bool) -> None:
    """Check that rows of a task can be scored so.

    Raises:
        InputError: the task has no such metric, or it needs labels and there are none.
    """
    known = METRICS[problem_type]
    if metric not in known:
        raise InputError(
            f"metric {metric!r} does not exist for this task", f"choose from {', '.join(known)}"
        )
    if not labelled and metric != AGREEMENT:
        raise InputError(
            f"metric {metric} needs labels, and the rows are used without",
            "leave out --metric, or --unlabelled",
        )


class Scorer:
    """One metric of rows that stop at given exits.

    Args:
        rows: the rows.
        metric: its name, see `METRICS`.

    Attributes:
        metric: the name.
        sums: `[exits, rows, terms]` float64, what is summed over rows.
        full_depth: the metric at the last exit.

    Raises:
        InputError: the task has no such metric, or it needs labels and there are none.
    """

    def __init__(self, rows: Rows, metric: str) -> None:
        check_metric(metric, rows.problem_type, rows.expected is not None)
        self.metric = metric
        self.answers = rows.answers()
        self._labels = rows.logits.shape[2]
        self._count = len(rows)
        expected = self.answers[-1] if metric == AGREEMENT else rows.expected
        assert expected is not None
        self.expected = expected
        self.sums = self._sums()
        self.full_depth = float(self.value(self.sums[-1].sum(axis=0), self._count))

    @property
    def is_row_mean(self) -> bool:
        """Whether the metric is a mean over rows of 0 or 1."""
        return self.metric in ROW_MEANS

    def right(self) -> NDArray[np.bool_]:
        """`[exits, rows]`: whether the answer is exactly right; with agreement, that of the end."""
        same = self.answers == self.expected
        return np.asarray(same if same.ndim == 2 else same.all(axis=-1))

    def value(self, sums: Array, rows: float) -> Array:
        """The metric of sums.

        Args:
            sums: `[..., terms]`.
            rows: how many rows were summed.

        Returns:
            `[...]` float64.
        """
        if self.is_row_mean:
            return np.asarray(sums[..., 0] / rows)
        if self.metric == "micro_f1":
            hits, total = sums[..., 0], sums[..., 1]
            return np.asarray(2 * hits / np.maximum(total, 1))
        hits, predicted, truth = np.split(sums, 3, axis=-1)
        if self.metric == "matthews":
            return _matthews(hits, predicted, truth, rows)
        f1 = 2 * hits / np.maximum(predicted + truth, 1)
        if self.answers.ndim == 3:
            return np.asarray(f1.mean(axis=-1))
        # Over the labels that occur, as `evaluate` has it.
        occurs = predicted + truth > 0
        return np.asarray(f1.sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1))

    def at(self, exits: Answers) -> Array:
        """The terms `[rows, terms]` of rows that stop at given exits, counted from 1."""
        return np.asarray(self.sums[exits - 1, np.arange(len(exits))])

    def score(self, exits: Answers) -> float:
        """The metric of rows that stop at given exits, by the code that scores any run."""
        predicted = self.answers[exits - 1, np.arange(len(exits))]
        name = {AGREEMENT: ROW_MEANS[self.answers.ndim - 2]}.get(self.metric, self.metric)
        return evaluate(predicted, self.expected, self._labels)[name]

    def _sums(self) -> Array:
        if self.is_row_mean:
            return self.right()[..., None].astype(np.float64)
        marks = self._marks(self.answers)
        truth = np.broadcast_to(self._marks(self.expected), marks.shape)
        hits = marks * truth
        if self.metric == "micro_f1":
            return np.stack([hits.sum(axis=-1), (marks + truth).sum(axis=-1)], axis=-1)
        return np.concatenate([hits, marks, truth], axis=-1)

    def _marks(self, answers: Answers) -> Array:
        """`[..., labels]` of 0 and 1."""
        if self.answers.ndim == 3:
            return answers.astype(np.float64)
        return np.eye(self._labels)[answers]


def _matthews(hits: Array, predicted: Array, truth: Array, rows: float) -> Array:
    """Matthews correlation of counts by label (Gorodkin 2004, R_K)."""
    covariance = hits.sum(axis=-1) * rows - (predicted * truth).sum(axis=-1)
    squared = float(rows) ** 2
    spread = (squared - np.square(truth).sum(axis=-1)) * (
        squared - np.square(predicted).sum(axis=-1)
    )
    safe = np.where(spread > 0, spread, 1.0)
    return np.asarray(np.where(spread > 0, covariance / np.sqrt(safe), 0.0))
