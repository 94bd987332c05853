"""Altered texts, from which the exits of a classifier learn as well.

An exit imitates the classifier, which can be asked about anything. So the texts that train are
altered, and the classifier answers these, too. Exits that have learnt from both agree with it more
often, and are less often certain where they should not be. Tang et al. (arXiv 1903.12136) distil
BERT with masked and cut texts; that the parts of two texts are joined is our own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...runtime.encoding import EncodedRow

# More texts than these hardly need them, and each of them costs a run of the classifier.
_MOST = 4000
# The share of tokens that a text loses, and the share of each of two texts that are joined.
_LOST = (0.05, 0.5)
_JOINED = (0.3, 0.7)


def altered(
    rows: Sequence[EncodedRow], special: NDArray[np.int64], max_length: int, most_tokens: int
) -> list[EncodedRow]:
    """A shortened and a joined copy of each row, in random order, but at most 4,000 copies.

    They are the same in every call.

    Args:
        rows: tokenized texts or pairs.
        special: ids of tokens that belong to no text. They stay.
        max_length: the most tokens of a copy.
        most_tokens: of all copies together.
    """
    random = np.random.default_rng(0)
    copies: list[EncodedRow] = []
    for number in random.permutation(len(rows))[: _MOST // 2]:
        row = rows[number]
        other = rows[int(random.integers(len(rows)))]
        both = joined(row, other, special, random)
        if both is None or len(both) > max_length:
            both = shortened(row, special, random)
        copies += [shortened(row, special, random), both]
    tokens = np.cumsum([len(copy) for copy in copies])
    return copies[: int(np.searchsorted(tokens, most_tokens, side="right"))]


def shortened(
    row: EncodedRow, special: NDArray[np.int64], random: np.random.Generator
) -> EncodedRow:
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
    row: EncodedRow, other: EncodedRow, special: NDArray[np.int64], random: np.random.Generator
) -> EncodedRow | None:
    """The beginning of each text of a row, and then the end of the same text of another row.

    Args:
        row: the row.
        other: the other row.
        special: ids of tokens that belong to no text.
        random: it decides how much of them stays, which is the same share of both texts of a pair.

    Returns:
        The new row; None if one is a pair and the other is not, or a text has no tokens.
    """
    texts = _texts(row, special)
    ends = _texts(other, special)
    expected = 1 if row.pair_start is None else 2
    if (row.pair_start is None) != (other.pair_start is None):
        return None
    if not len(texts) == len(ends) == expected:
        return None
    beginning, end = random.uniform(*_JOINED, size=2)
    pieces: list[NDArray[np.int64]] = []
    grown = []
    done = 0
    for mine, its in zip(texts, ends, strict=True):
        stop = mine.start + _count(mine, beginning)
        start = its.stop - _count(its, end)
        pieces += [_piece(row, done, stop), _piece(other, start, its.stop)]
        grown.append((its.stop - start) - (mine.stop - stop))
        done = mine.stop
    pieces.append(_piece(row, done, len(row)))
    ids, types = np.concatenate(pieces).T
    # The second text begins later by what the first has gained.
    pair_start = None if row.pair_start is None else row.pair_start + grown[0]
    return EncodedRow(ids, types, row.truncated, pair_start)


def _texts(row: EncodedRow, special: NDArray[np.int64]) -> list[slice]:
    """Where the texts of a row are, without those that have no tokens."""
    own = np.flatnonzero(~np.isin(row.input_ids, special))
    second = np.searchsorted(own, len(row) if row.pair_start is None else row.pair_start)
    return [slice(part[0], part[-1] + 1) for part in np.split(own, [second]) if len(part)]


def _count(text: slice, share: float) -> int:
    """How many tokens a share of a text is, at least one."""
    return max(1, int(share * (text.stop - text.start)))


def _piece(row: EncodedRow, start: int, stop: int) -> NDArray[np.int64]:
    """Ids and types of tokens that follow each other: `[tokens, 2]`."""
    return np.stack([row.input_ids[start:stop], row.token_type_ids[start:stop]], axis=1)
