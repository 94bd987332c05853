"""Altered texts, from which the exits of a classifier learn as well.

An exit imitates the classifier, which can be asked about anything. So the texts that train are
altered, and the classifier answers these, too. Exits that have learnt from both agree with it more
often, and are less often certain where they should not be. Tang et al. (arXiv 1903.12136) distil
BERT with texts that lack words; that two texts are joined is our own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...runtime.encoding import EncodedRow

_COPIES = 2
# More texts than these hardly need them, and each of them costs a run of the classifier.
_MOST = 4000
# The share of tokens that a text loses, and the share of a text that stays before another one.
_LOST = (0.05, 0.5)
_BEGINNING = (0.3, 0.7)


def altered(
    rows: Sequence[EncodedRow], special: Sequence[int], max_length: int, most_tokens: int
) -> list[EncodedRow]:
    """Two altered copies of each row, in random order, but at most 4,000; the same in every call.

    Args:
        rows: tokenized texts or pairs.
        special: ids of tokens that belong to no text. They stay.
        max_length: the most tokens of a copy.
        most_tokens: of all copies together.
    """
    random = np.random.default_rng(0)
    copies: list[EncodedRow] = []
    for number in random.permutation(np.tile(np.arange(len(rows)), _COPIES))[:_MOST]:
        copy = None
        if len(copies) % 2:
            other = rows[int(random.integers(len(rows)))]
            copy = joined(rows[number], other, special, random)
        if copy is None or len(copy) > max_length:
            copy = shortened(rows[number], special, random)
        copies.append(copy)
    tokens = np.cumsum([len(copy) for copy in copies])
    return copies[: int(np.searchsorted(tokens, most_tokens, side="right"))]


def shortened(row: EncodedRow, special: Sequence[int], random: np.random.Generator) -> EncodedRow:
    """A row without some of its tokens; at least one of each text stays.

    Args:
        row: the row.
        special: ids of tokens that belong to no text.
        random: it decides which tokens stay.
    """
    kept = random.random(len(row)) >= random.uniform(*_LOST)
    kept |= np.isin(row.input_ids, special)
    for text in _texts(row, special):
        kept[random.integers(text.start, text.stop)] = True
    start = row.pair_start
    return EncodedRow(
        input_ids=row.input_ids[kept],
        token_type_ids=row.token_type_ids[kept],
        truncated=row.truncated,
        pair_start=None if start is None else int(np.count_nonzero(kept[:start])),
    )


def joined(
    row: EncodedRow, other: EncodedRow, special: Sequence[int], random: np.random.Generator
) -> EncodedRow | None:
    """The beginning of each text of a row, and the end of the same text of another row.

    Args:
        row: the row.
        other: the other row.
        special: ids of tokens that belong to no text.
        random: it decides where texts are cut, which is at the same share of all texts.

    Returns:
        The new row; None if the rows do not have equally many texts.
    """
    texts = _texts(row, special)
    ends = _texts(other, special)
    if len(texts) != len(ends):
        return None
    share = random.uniform(*_BEGINNING)
    pieces: list[NDArray[np.int64]] = []
    start = row.pair_start
    done = 0
    for text, end in zip(texts, ends, strict=True):
        if row.pair_start is not None and text.start >= row.pair_start:
            start = sum(map(len, pieces)) + row.pair_start - done
        pieces += [_piece(row, done, _cut(text, share)), _piece(other, _cut(end, share), end.stop)]
        done = text.stop
    pieces.append(_piece(row, done, len(row)))
    ids, types = np.concatenate(pieces).T
    return EncodedRow(ids, types, row.truncated, start)


def _texts(row: EncodedRow, special: Sequence[int]) -> list[slice]:
    """Where the texts of a row are, without those that have no tokens."""
    own = np.flatnonzero(~np.isin(row.input_ids, special))
    second = np.searchsorted(own, len(row) if row.pair_start is None else row.pair_start)
    return [slice(part[0], part[-1] + 1) for part in np.split(own, [second]) if len(part)]


def _cut(text: slice, share: float) -> int:
    """The end of the first part of a text."""
    return int(text.start + round(share * (text.stop - text.start)))


def _piece(row: EncodedRow, start: int, stop: int) -> NDArray[np.int64]:
    """Ids and types of tokens that follow each other: `[tokens, 2]`."""
    return np.stack([row.input_ids[start:stop], row.token_type_ids[start:stop]], axis=1)
