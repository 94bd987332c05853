"""The marks of the second text of a pair among the tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer


@dataclass(frozen=True)
class PairMarks:
    """The marks by which the second text of a pair is recognised.

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
                moved_by(ids, count - place, -1) == token
                for place, token in enumerate(self.separators)
            ]
            begins = functools.reduce(np.bitwise_and, matches)
        length = ids.then("Shape")[1]
        places = ids.writer.node("Range", 0, length, 1)
        first = np.minimum.reduce(np.where(begins, places, length), axis=1, keepdims=True)
        second = (places >= first) & mask
        return second & (np.add.reduce(second.astype(np.int64), axis=1, keepdims=True) > self.after)


def moved_by(values: Any, by: int, fill: int) -> Any:
    """`[batch, sequence]` int64, each row moved by some places to the right; below 0 to the left.

    The places that become free hold `fill`.
    """
    padded = values.then("Pad", [0, max(by, 0), 0, max(-by, 0)], fill)
    return padded[:, -by:] if by < 0 else padded[:, :-by]
