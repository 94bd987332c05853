"""Exit 0 as nodes of a graph, see `runtime.exit_0`. Every number in its hash is below 2^24."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...runtime.exit_0 import END, SECOND, ExitZero, bucket_of
from .pair_marks import PairMarks, moved_by


@dataclass(frozen=True)
class ExitZeroNodes:
    """Exit 0 in a graph.

    Attributes:
        exit_0: its arrays become initializers.
        marks: how second texts are recognised.
    """

    exit_0: ExitZero
    marks: PairMarks

    def logits(self, ids: Any, mask: Any, types: Any) -> Any:
        """Its logits: `[batch, labels]` float32. A row without tokens has those of the bias.

        The arguments are those of `PairMarks.second`.
        """
        writer = ids.writer
        second = self.marks.second(ids, mask, types)
        unigrams = self.exit_0.unigrams
        buckets = self.exit_0.buckets
        moved = ids + SECOND
        # The runtime's own function, which adds nodes if its arguments are tensors of a graph.
        bucket: Any = bucket_of
        own = np.where(second, bucket(moved, ids, buckets) + unigrams, ids % unigrams)
        tokens = np.where(second, moved, ids)
        is_followed = moved_by(mask.astype(np.int64), -1, 0) > 0
        following = np.where(is_followed, moved_by(tokens, -1, END), END)
        bigrams = bucket(tokens, following, buckets) + unigrams
        held = {
            name: writer.initializer(f"exit_0/{name}", array)
            for name, array in self.exit_0.arrays.items()
        }
        table = held["table"]
        vectors = table[own].astype(np.float32) + table[bigrams].astype(np.float32)
        weights = mask.astype(np.float32)[:, :, None]
        sums = np.add.reduce(vectors * weights, axis=1)
        means = sums / np.maximum(np.add.reduce(weights, axis=1) * 2, 1)
        return means.then("MatMul", held["weights"]) + held["bias"]
