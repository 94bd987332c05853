"""Distinct texts, and what each of them is for: nothing that certifies has trained or chosen.

A keyed hash decides, so that a text is always in the same part, whatever else is in the file. Exact
duplicates are one text with a weight, because a binomial tail would take them for news.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.errors import InputError
from ...runtime.files import Row

_KEY = b"fpabee-convert"
# The shares of the texts that train, choose, and certify; the rest is for the report.
_SHARES = (0.4, 0.1, 0.4)

Numbers = NDArray[np.intp]


@dataclass(frozen=True)
class Texts:
    """Distinct texts and their parts.

    Attributes:
        rows: the first row of each distinct text.
        weights: `[rows]` how often each text occurs.
        train: numbers of the texts that train heads and exit 0.
        choose: numbers of the texts that choose the form of the heads, and end the training of
            exit 0; then they train the heads as well.
        calibrate: numbers of the texts that certify.
        report: numbers of the texts that the report is about, which decide nothing.
    """

    rows: Sequence[Row]
    weights: NDArray[np.int64]
    train: Numbers
    choose: Numbers
    calibrate: Numbers
    report: Numbers

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """How many texts are in each part, in the order above."""
        return len(self.train), len(self.choose), len(self.calibrate), len(self.report)

    @property
    def taught(self) -> Numbers:
        """The half of the texts that `train` and `choose` have together."""
        return np.concatenate([self.train, self.choose])


def split(rows: Iterable[Row], group_column: str | None = None) -> Texts:
    """Remove duplicates, and deal the texts into parts.

    Args:
        rows: the rows.
        group_column: the field that names the group of a row; groups stay together, and one text
            of each certifies. A row without it, or with an empty cell, is a group of its own.

    Raises:
        InputError: all texts are equal, half of them are empty, there are far too few, or no row
            has a group.
    """
    first: dict[Any, Row] = {}
    counts: Counter[Any] = Counter()
    for row in rows:
        first.setdefault(row.content, row)
        counts[row.content] += 1
    total = counts.total()
    if len(first) < 2:
        problem = f"all {total:,} texts are equal" if first else "there are no texts"
        raise InputError(problem, "give texts like those to classify")
    empty = sum(n for text, n in counts.items() if not "".join(text).strip())
    if 2 * empty >= total:
        raise InputError(
            f"{empty:,} of {total:,} texts are empty",
            "leave them out, or name the column of the texts with `text_column`",
        )
    distinct = list(first.values())
    own = [_place([row.text, row.text_pair]) for row in distinct]
    groups = [row.fields.get(group_column) if group_column else None for row in distinct]
    places = [
        place if group in (None, "") else _place(group)
        for place, group in zip(own, groups, strict=True)
    ]
    if group_column is not None and places == own:
        raise InputError(f'no row has a field "{group_column}"', "correct `group_column`")
    parts = np.searchsorted(np.cumsum(_SHARES), places, side="right")
    train, choose, calibrate, report = (np.flatnonzero(parts == part) for part in range(4))
    if not all(map(len, (train, choose, calibrate, report))):
        raise InputError(
            f"{len(distinct):,} distinct texts are too few to train, choose, certify and report",
            "give more texts; about 800 are the least for 1 % of changed decisions",
        )
    # Of each group the text with the smallest hash; texts that share a place are a group.
    one = {places[n]: n for n in sorted(calibrate, key=own.__getitem__, reverse=True)}
    weights = np.array([counts[row.content] for row in distinct])
    calibrate = np.array(sorted(one.values()), np.intp)
    return Texts(distinct, weights, train, choose, calibrate, report)


def _place(content: Any) -> float:
    """A number from 0 to 1 that depends on the content only."""
    text = json.dumps(content, ensure_ascii=True, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, key=_KEY, digest_size=8).digest(), "big") / 2**64
