"""Distinct texts or queries, and what each is for: nothing that certifies has trained or chosen.

A keyed hash decides, so that a text is always in the same part, whatever else is in the file. Exact
duplicates are one text with a weight, because a binomial tail would take them for news. A query has
the hash of its own text, so that its documents stay together.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...runtime.encoding import Text
from ...runtime.errors import InputError
from ...runtime.files import ReadOptions, Row, read_rows

_KEY = b"fpabee-convert"
# The shares of the texts that train, choose, and certify; the rest is for the report.
_SHARES = (0.4, 0.1, 0.4)
# The same if other texts train and choose, and the share of those that train.
_SHARES_WITHOUT_TRAINING = (0.0, 0.0, 0.9)
_SHARE_OF_TRAIN_TEXTS = 0.8
_FEWEST_TRAIN_TEXTS = 100

Numbers = NDArray[np.intp]


class Unit(Protocol):
    """What is dealt as a whole: a text, or a query with its documents."""

    @property
    def content(self) -> Text:
        """What two of them have in common that are the same."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """The other fields of its row, one of which may name a group."""


AnyUnit = TypeVar("AnyUnit", bound=Unit)


@dataclass(frozen=True)
class Texts(Generic[AnyUnit]):
    """Distinct texts, or queries, and their parts.

    Attributes:
        units: the first one of each distinct text; those that only train and choose come last.
        weights: `[own]` how often each text occurs; there are none for train texts.
        train: numbers of the texts that train heads and exit 0.
        choose: numbers of the texts that choose which layers have an exit, and end the training of
            exit 0; then they train the heads as well.
        calibrate: numbers of the texts that certify.
        report: numbers of the texts that the report is about, which decide nothing.
        removed: how many distinct train texts were left out because they, or texts of their group,
            are among the other texts.
    """

    units: Sequence[AnyUnit]
    weights: NDArray[np.int64]
    train: Numbers
    choose: Numbers
    calibrate: Numbers
    report: Numbers
    removed: int = 0

    @property
    def own(self) -> Sequence[AnyUnit]:
        """The distinct texts without the train texts."""
        return self.units[: len(self.weights)]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """How many texts are in each part, in the order above."""
        return len(self.train), len(self.choose), len(self.calibrate), len(self.report)

    @property
    def share_that_certifies(self) -> float:
        """The share of their own texts that is dealt to certify; groups may make it less."""
        others_train = len(self.units) > len(self.weights)
        return (_SHARES_WITHOUT_TRAINING if others_train else _SHARES)[2]

    @property
    def taught(self) -> Numbers:
        """What `train` and `choose` have together."""
        return np.concatenate([self.train, self.choose])


def read_texts(source: str | Path, reading: ReadOptions, group_column: str | None) -> Iterator[Row]:
    """The rows of a file of texts; a text that names its group is also one of their fields."""
    for row in read_rows(source, reading):
        texts = {reading.text_column: row.text, reading.pair_column: row.text_pair}
        own = {group_column: texts[group_column]} if group_column in texts else {}
        yield replace(row, fields=row.fields | own)


def split(
    units: Iterable[AnyUnit],
    group_column: str | None = None,
    train_units: Iterable[AnyUnit] | None = None,
    what: str = "texts",
) -> Texts[AnyUnit]:
    """Remove duplicates, of which the first stays, and deal the texts into parts.

    Args:
        units: the texts, or queries with their documents.
        group_column: the field that names the group of a text; groups stay together, and one text
            of each certifies, so a promise is about one text of each new group. A text without it,
            or with an empty cell, is a group of its own.
        train_units: others that train and choose; then none of `units` do. Those that are among
            `units`, or whose group is, are left out. None: a half of `units` trains and chooses.
        what: what messages call them.

    Raises:
        InputError: all texts are equal, half of them are empty, there are far too few, or no row
            has a group.
    """
    distinct = _Distinct(units, group_column, what)
    every = [*distinct.units]
    removed = 0
    if train_units is None:
        train, choose, calibrate, report = _dealt(distinct.places, _SHARES)
    else:
        _, _, calibrate, report = _dealt(distinct.places, _SHARES_WITHOUT_TRAINING)
        others = _Distinct(train_units, group_column, f"train {what}")
        known = {*distinct.own, *distinct.places}
        new = [
            number
            for number, places in enumerate(zip(others.own, others.places, strict=True))
            if known.isdisjoint(places)
        ]
        removed = len(others.units) - len(new)
        if len(new) < _FEWEST_TRAIN_TEXTS:
            raise InputError(
                f"{removed:,} of {len(others.units):,} distinct train {what} are among the other "
                f"{what}, and {len(new):,} are left; expected at least {_FEWEST_TRAIN_TEXTS}",
                "give more `train_texts`, or leave them out",
            )
        share = _SHARE_OF_TRAIN_TEXTS
        numbers = _dealt([others.places[number] for number in new], (share, 1 - share))
        train, choose = (len(every) + part for part in numbers[:2])
        every += [others.units[number] for number in new]
    if not all(map(len, (train, choose, calibrate, report))):
        raise InputError(
            f"{len(every):,} distinct {what} are too few to train, choose, certify and report",
            f"give more {what}; about 800 are the least for 1 %, and 150 for 5 %",
        )
    # Of each group the text with the smallest hash; texts that share a place are a group.
    by_hash = sorted(calibrate, key=distinct.own.__getitem__, reverse=True)
    one = {distinct.places[number]: number for number in by_hash}
    calibrate = np.array(sorted(one.values()), np.intp)
    return Texts(every, distinct.weights, train, choose, calibrate, report, removed)


class _Distinct(Generic[AnyUnit]):
    """The distinct texts of a file.

    Args:
        units: all of its texts.
        group_column: as in `split`.
        name: what messages call the texts.

    Attributes:
        units: the first one of each distinct text.
        weights: `[units]` how often each text occurs.
        own: a hash of each text.
        places: a hash of the group of each text, or of the text if it has none.

    Raises:
        InputError: all texts are equal, half of them are empty, or no row has a group.
    """

    def __init__(self, units: Iterable[AnyUnit], group_column: str | None, name: str) -> None:
        first: dict[Text, AnyUnit] = {}
        counts: Counter[Text] = Counter()
        for unit in units:
            first.setdefault(unit.content, unit)
            counts[unit.content] += 1
        total = counts.total()
        if len(first) < 2:
            problem = f"all {total:,} {name} are equal" if first else f"there are no {name}"
            raise InputError(problem, "give texts like those of the application")
        empty = sum(n for text, n in counts.items() if not "".join(text).strip())
        if 2 * empty >= total:
            raise InputError(
                f"{empty:,} of {total:,} {name} are empty",
                "leave them out, or name the column of the texts with `text_column`",
            )
        self.units = list(first.values())
        self.weights = np.array([counts[text] for text in first])
        # A single text has the hash of a pair without a second text.
        pairs = [(text, None) if isinstance(text, str) else text for text in first]
        self.own = [_place(pair) for pair in pairs]
        groups = [unit.fields.get(group_column) if group_column else None for unit in self.units]
        self.places = [
            # A table has text where JSON has numbers.
            place if group in (None, "") else _place(str(group))
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
