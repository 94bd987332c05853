"""Exit 0 as nodes of a graph, see `runtime.exit_0`. Every number in its hash is below 2^24."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ...runtime.exit_0 import END, SECOND, ExitZero, bucket_of


@dataclass(frozen=True)
class PairMarks:
    """What the second text of a pair is recognised by.

    Attributes:
        token_type: the type of its tokens; None: types do not tell.
        separators: the special tokens before it.
        after: how many special tokens follow it. A second text without tokens does not count.
        texts: the separators as texts: where a text contains one, it looks like a pair.
    """

    token_type: int | None
    separators: tuple[int, ...]
    after: int
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer, uses_types: bool) -> PairMarks | None:
        """The marks in the pairs of a tokenizer; None if there are none.

        Args:
            tokenizer: with its post-processor.
            uses_types: whether the model reads token types.
        """
        pair = tokenizer.encode("a", "a")
        places: Any = pair.sequence_ids
        start = places.index(1)
        end = len(places) - places[::-1].index(1)
        first_end = start - places[:start][::-1].index(0)
        types = pair.type_ids
        if uses_types and types[start] not in types[:start]:
            return cls(types[start], (), types[end:].count(types[start]))
        separators = tuple(pair.ids[first_end:start])
        texts = tuple(pair.tokens[first_end:start])
        return cls(None, separators, len(places) - end, texts) if separators else None

    def second(self, ids: Any, mask: Any, types: Any) -> Any:
        """Which tokens belong to the second text: `[batch, sequence]` bool.

        Args:
            ids: `[batch, sequence]` int64, the tokens.
            mask: bool, which of them are not padding.
            types: int64, their types; None if the model has none.
        """
        if self.token_type is not None and types is not None:
            begins = types == self.token_type
        else:
            count = len(self.separators)
            matches = [
                _moved(ids, count - place, -1) == token
                for place, token in enumerate(self.separators)
            ]
            begins = functools.reduce(np.bitwise_and, matches)
        # TensorRT sums no integers here.
        second = (begins.astype(np.float32).then("CumSum", 1) > 0) & mask
        return second & (np.add.reduce(second.astype(np.int64), axis=1, keepdims=True) > self.after)


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
        is_followed = _moved(mask.astype(np.int64), -1, 0) > 0
        following = np.where(is_followed, _moved(tokens, -1, END), END)
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


def _moved(values: Any, by: int, fill: int) -> Any:
    """`[batch, sequence]` int64, each row moved by some places to the right; below 0 to the left.

    The places that become free hold `fill`.
    """
    padded = values.then("Pad", [0, max(by, 0), 0, max(-by, 0)], fill)
    return padded[:, -by:] if by < 0 else padded[:, :-by]
