"""Turn the logits of exits into predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .artifact.manifest import Manifest, ProblemType
from .encoding import EncodedRow
from .results import Prediction
from .rules.measures import Integers, Mask, Outputs, RowOutputs

# Plain Python rounds differently from numpy; a probability this close to its threshold is left to
# numpy, so that both give the same labels.
_TOO_CLOSE = 1e-9


class PredictionMaker:
    """Makes the predictions of a model.

    Args:
        manifest: of its engines folder.
    """

    def __init__(self, manifest: Manifest) -> None:
        task = manifest.task
        self._labels = task.labels
        self._problem_type = task.problem_type
        self._label_thresholds = task.label_thresholds
        self._first, self._layers = manifest.exits[0], manifest.exit_layers

    def outputs(self, logits: NDArray[np.float32]) -> Outputs:
        """The outputs of each row at its exit.

        Args:
            logits: `[rows, labels]` float32 at that exit.
        """
        return Outputs(logits, self._problem_type, self._label_thresholds)

    def several(
        self,
        rows: Sequence[EncodedRow],
        exits: Integers,
        logits: NDArray[np.float32],
        limited: Mask,
        missed: Mask,
    ) -> Iterator[Prediction]:
        """The predictions of several rows.

        Args:
            rows: the rows.
            exits: `[rows]` int64, the exit of each row.
            logits: `[rows, labels]` float32 at that exit.
            limited: `[rows]` whether the deadline stopped a row.
            missed: `[rows]` whether the deadline was missed.
        """
        outputs, labels, first = self.outputs(logits), self._labels, self._first
        answers = outputs.answers.tolist()
        if self._problem_type is ProblemType.MULTI_LABEL:
            chosen = [[n for n, given in enumerate(row) if given] for row in answers]
        else:
            chosen = [[number] for number in answers]
        columns = zip(
            rows,
            chosen,
            outputs.probabilities.tolist(),
            logits.tolist(),
            exits.tolist(),
            limited.tolist(),
            missed.tolist(),
            strict=True,
        )
        for row, numbers, probabilities, at_exit, exit_number, is_limited, is_missed in columns:
            yield Prediction(
                labels=tuple([labels[number] for number in numbers]),
                scores=tuple([probabilities[number] for number in numbers]),
                exit=exit_number,
                layer=self._layers[exit_number - first],
                probabilities=tuple(probabilities),
                logits=tuple(at_exit),
                truncated=row.truncated,
                deadline_limited=is_limited,
                deadline_missed=is_missed,
            )

    def row(self, logits: Sequence[float], exit_number: int, truncated: bool) -> Prediction:
        """The prediction of a single row without a deadline, made without numpy.

        Args:
            logits: of its exit, one for each label.
            exit_number: its exit.
            truncated: whether its text was truncated.
        """
        outputs = RowOutputs(logits, self._problem_type)
        if self._problem_type is ProblemType.SINGLE_LABEL:
            (probabilities,) = outputs.distributions
            numbers = [logits.index(max(logits))]
        else:
            probabilities = tuple([yes for yes, _ in outputs.distributions])
            numbers = self._chosen(logits, probabilities)
        return Prediction(
            labels=tuple([self._labels[number] for number in numbers]),
            scores=tuple([probabilities[number] for number in numbers]),
            exit=exit_number,
            layer=self._layers[exit_number - self._first],
            probabilities=probabilities,
            logits=tuple(logits),
            truncated=truncated,
        )

    def _chosen(self, logits: Sequence[float], probabilities: Sequence[float]) -> list[int]:
        """The labels whose probability is above their threshold."""
        thresholds = self._label_thresholds or (0.5,) * len(logits)
        excess = [p - limit for p, limit in zip(probabilities, thresholds, strict=True)]
        if any(math.isclose(each, 0.0, abs_tol=_TOO_CLOSE) for each in excess):
            outputs = Outputs(np.array([logits]), self._problem_type, self._label_thresholds)
            return np.flatnonzero(outputs.answers[0]).tolist()
        return [number for number, each in enumerate(excess) if each > 0]
