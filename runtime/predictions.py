"""Turn the logits of exits into predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .artifact.manifest import Manifest, ProblemType
from .encoding import EncodedRow
from .results import Prediction
from .rules.measures import Integers, Mask, Outputs


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
