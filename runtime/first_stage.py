"""Exit 0 of a ranking: the scores of the search that found the documents predict the logits.

A service often has a score of each document before it asks a reranker, such as that of BM25 or a
cosine. They say little about the best documents, but enough about those that have no chance. The
prediction is linear in features of a score among those of its query, so it runs on the host in
microseconds. It knows the scores of one search only: those of another one mean something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .artifact.folder import EnginesFolder
from .artifact.manifest import FirstStageSpec
from .encoding import EncodedRow
from .errors import InputError

_LARGEST = float(np.finfo(np.float32).max)
# Beyond the logits of any reranker, and a sigmoid of it does not overflow.
_MOST = 500.0


def checked_scores(scores: Any, documents: int) -> tuple[float, ...]:
    """The scores of the documents of a query, as someone gives them.

    Args:
        scores: a list or an array.
        documents: how many documents there are.

    Raises:
        InputError: they are not one finite number in the range of float32 for each document.
    """
    hint = f"give a float32 number for each of the {documents} documents, or no scores at all"
    is_list = isinstance(scores, Sequence | np.ndarray) and not isinstance(scores, str | bytes)
    if not is_list or len(scores) != documents:
        count = f"{len(scores)} values" if is_list else "no list"
        raise InputError(f"found {count} in 'scores'", hint)
    for score in scores:
        is_number = isinstance(score, Real) and not isinstance(score, bool)
        # NaN is not at most anything.
        if not is_number or not abs(score) <= _LARGEST:
            raise InputError(f"found the score {score!r}", hint)
    return tuple(map(float, scores))


def features(scores: Sequence[float]) -> NDArray[np.float64]:
    """The features of each document from the scores of its query: `[documents, 3]`.

    The distance to the best score, the same in standard deviations from the mean, and the logarithm
    of the rank. Equal scores have equal features, and they are 0 if all scores are equal.

    Args:
        scores: of at least one document; a higher one is better.
    """
    own = np.asarray(scores, np.float64)
    centred = own - own.mean()
    better = np.searchsorted(np.sort(-own), -own)
    return np.stack(
        [own - own.max(), centred / (centred.std() or 1.0), np.log1p(better)],
        axis=1,
    )


@dataclass(frozen=True)
class FirstStage:
    """The exit before layer 1.

    Attributes:
        spec: its weights.
    """

    spec: FirstStageSpec

    @classmethod
    def load(cls, engines: EnginesFolder) -> FirstStage | None:
        """The first stage of an engines folder; None if the model has none."""
        spec = engines.manifest.first_stage
        return None if spec is None else cls(spec)

    def predict(self, scores: Sequence[float]) -> NDArray[np.float32]:
        """The logits `[documents]` that the scores of a query predict.

        Args:
            scores: of at least one document, in the range of float32.
        """
        logits = features(scores) @ np.array(self.spec.weights) + self.spec.bias
        return np.asarray(np.clip(logits, -_MOST, _MOST), np.float32)

    def attach(self, rows: Sequence[EncodedRow], scores: Sequence[float]) -> list[EncodedRow]:
        """The documents of a query with what their scores predict."""
        predicted = self.predict(scores).tolist()
        return [replace(row, predicted=each) for row, each in zip(rows, predicted, strict=True)]

    def __call__(self, rows: Sequence[EncodedRow]) -> NDArray[np.float32]:
        """The logits `[rows, 1]` at exit 0; equal ones for all documents without scores."""
        return np.array([[row.predicted] for row in rows], np.float32)
