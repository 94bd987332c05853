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
# The same if other texts train and choose, and the share of those that train.
_SHARES_WITHOUT_TRAINING = (0.0, 0.0, 0.9)
_SHARE_OF_TRAIN_TEXTS = 0.8
_FEWEST_TRAIN_TEXTS = 100

Numbers = NDArray[np.intp]


@dataclass(frozen=True)
class Texts:
    """Distinct texts and their parts.

    Attributes:
        rows: the first row of each distinct text; those that only train and choose come last.
        weights: `[own]` how often each text occurs; there are none for train texts.
        train: numbers of the texts that train heads and exit 0.
        choose: numbers of the texts that choose the form of the heads, and end the training of
            exit 0; then they train the heads as well.
        calibrate: numbers of the texts that certify.
        report: numbers of the texts that the report is about, which decide nothing.
        removed: how many distinct train texts were left out because they, or texts of their group,
            are among the other texts.
    """

    rows: Sequence[Row]
    weights: NDArray[np.int64]
    train: Numbers
    choose: Numbers
    calibrate: Numbers
    report: Numbers
    removed: int = 0

    @property
    def own(self) -> Sequence[Row]:
        """The distinct texts without the train texts."""
        return self.rows[: len(self.weights)]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """How many texts are in each part, in the order above."""
        return len(self.train), len(self.choose), len(self.calibrate), len(self.report)

    @property
    def taught(self) -> Numbers:
        """What `train` and `choose` have together."""
        return np.concatenate([self.train, self.choose])


def split(
    rows: Iterable[Row],
    group_column: str | None = None,
    train_rows: Iterable[Row] | None = None,
) -> Texts:
    """Remove duplicates, and deal the texts into parts.

    Args:
        rows: the rows.
        group_column: the field that names the group of a row; groups stay together, and one text
            of each certifies. A row without it, or with an empty cell, is a group of its own.
        train_rows: other rows that train and choose; then none of `rows` do. Those that are among
            `rows`, or whose group is, are left out. None: a half of `rows` trains and chooses.

    Raises:
        InputError: all texts are equal, half of them are empty, there are far too few, or no row
            has a group.
    """
    distinct = _Distinct(rows, group_column, "texts")
    every = [*distinct.rows]
    removed = 0
    if train_rows is None:
        train, choose, calibrate, report = _dealt(distinct.places, _SHARES)
    else:
        _, _, calibrate, report = _dealt(distinct.places, _SHARES_WITHOUT_TRAINING)
        others = _Distinct(train_rows, group_column, "train texts")
        known = {*distinct.own, *distinct.places}
        new = [
            number
            for number, places in enumerate(zip(others.own, others.places, strict=True))
            if known.isdisjoint(places)
        ]
        removed = len(others.rows) - len(new)
        if len(new) < _FEWEST_TRAIN_TEXTS:
            raise InputError(
                f"{removed:,} of {len(others.rows):,} distinct train texts are among the other "
                f"texts, and {len(new):,} are left; expected at least {_FEWEST_TRAIN_TEXTS}",
                "give more `train_texts`, or leave them out",
            )
        share = _SHARE_OF_TRAIN_TEXTS
        numbers = _dealt([others.places[number] for number in new], (share, 1 - share))
        train, choose = (len(every) + part for part in numbers[:2])
        every += [others.rows[number] for number in new]
    if not all(map(len, (train, choose, calibrate, report))):
        raise InputError(
            f"{len(every):,} distinct texts are too few to train, choose, certify and report",
            "give more texts; about 800 are the least for 1 % of changed decisions",
        )
    # Of each group the text with the smallest hash; texts that share a place are a group.
    by_hash = sorted(calibrate, key=distinct.own.__getitem__, reverse=True)
    one = {distinct.places[number]: number for number in by_hash}
    calibrate = np.array(sorted(one.values()), np.intp)
    return Texts(every, distinct.weights, train, choose, calibrate, report, removed)


class _Distinct:
    """The distinct texts of a file.

    Args:
        rows: its rows.
        group_column: as in `split`.
        name: what messages call the texts.

    Attributes:
        rows: the first row of each distinct text.
        weights: `[rows]` how often each text occurs.
        own: a hash of each text.
        places: a hash of the group of each text, or of the text if it has none.

    Raises:
        InputError: all texts are equal, half of them are empty, or no row has a group.
    """

    def __init__(self, rows: Iterable[Row], group_column: str | None, name: str) -> None:
        first: dict[Any, Row] = {}
        counts: Counter[Any] = Counter()
        for row in rows:
            first.setdefault(row.content, row)
            counts[row.content] += 1
        total = counts.total()
        if len(first) < 2:
            problem = f"all {total:,} {name} are equal" if first else f"there are no {name}"
            raise InputError(problem, "give texts like those to classify")
        empty = sum(n for text, n in counts.items() if not "".join(text).strip())
        if 2 * empty >= total:
            raise InputError(
                f"{empty:,} of {total:,} {name} are empty",
                "leave them out, or name the column of the texts with `text_column`",
            )
        self.rows = list(first.values())
        self.weights = np.array([counts[row.content] for row in self.rows])
        self.own = [_place([row.text, row.text_pair]) for row in self.rows]
        groups = [row.fields.get(group_column) if group_column else None for row in self.rows]
        self.places = [
            place if group in (None, "") else _place(group)
            for place, group in zip(self.own, groups, strict=True)
        ]
        if group_column is not None and self.places == self.own:
            raise InputError(
                f'no row of the {name} has a field "{group_column}"', "correct `group_column`"
            )


def _dealt(places: Sequence[float], shares: Sequence[float]) -> list[Numbers]:
    """The numbers of the texts of each share, and of the rest."""
    parts = np.searchsorted(np.cumsum(shares), places, side="right")
    return [np.flatnonzero(parts == part) for part in range(len(shares) + 1)]


def _place(content: Any) -> float:
    """A number from 0 to 1 that depends on the content only."""
    text = json.dumps(content, ensure_ascii=True, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, key=_KEY, digest_size=8).digest(), "big") / 2**64
