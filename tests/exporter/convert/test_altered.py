"""Altered copies of rows that train the exits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpabee.exporter.convert.altered import altered, joined, shortened
from fpabee.runtime.encoding import EncodedRow

CLS = 101
SEP = 102
SPECIAL = (0, CLS, SEP)


def row(first: list[int], second: list[int] | None = None) -> EncodedRow:
    """A row as BERT has it; a pair if there is a second text."""
    start = [CLS, *first, SEP]
    end = [] if second is None else [*second, SEP]
    types = np.repeat([0, 1], [len(start), len(end)])
    pair_start = len(start) if second else None
    return EncodedRow(np.array([*start, *end]), types, False, pair_start)


def texts_of(made: EncodedRow) -> list[list[int]]:
    """The tokens of each text; the row has special tokens, types and a start as BERT has them."""
    ids = made.input_ids.tolist()
    assert ids[0] == CLS
    assert ids[-1] == SEP
    ends = [place for place, token in enumerate(ids) if token == SEP]
    assert made.token_type_ids.tolist() == [int(place > ends[0]) for place in range(len(ids))]
    if len(ends) == 1:
        assert made.pair_start is None
        return [ids[1:-1]]
    assert made.pair_start == ends[0] + 1
    return [ids[1 : ends[0]], ids[ends[0] + 1 : -1]]


def is_part(some: list[int], whole: list[int]) -> bool:
    """Whether tokens occur in a text in their order."""
    left = iter(whole)
    return all(token in left for token in some)


TEXT = st.lists(st.integers(200, 999), min_size=1, max_size=12)
ROWS = st.builds(row, TEXT, st.none() | TEXT)
SEEDS = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@given(ROWS, SEEDS)
def test_a_shortened_row_has_some_tokens_of_each_text(
    made: EncodedRow, random: np.random.Generator
) -> None:
    whole = texts_of(made)
    parts = texts_of(shortened(made, SPECIAL, random))
    assert len(parts) == len(whole)
    for part, text in zip(parts, whole, strict=True):
        assert part
        assert is_part(part, text)


@given(ROWS, ROWS, SEEDS)
def test_a_joined_row_begins_as_one_row_and_ends_as_the_other(
    made: EncodedRow, other: EncodedRow, random: np.random.Generator
) -> None:
    both = joined(made, other, SPECIAL, random)
    begins = texts_of(made)
    ends = texts_of(other)
    if both is None:
        assert len(begins) != len(ends)
        return
    for part, begin, end in zip(texts_of(both), begins, ends, strict=True):
        places = [
            place
            for place in range(len(part) + 1)
            if part[:place] == begin[:place]
            and end[len(end) - (len(part) - place) :] == part[place:]
        ]
        assert places, "the beginning of one text, then the end of the other"
        assert len(part) <= max(len(begin), len(end))


def test_all_texts_of_a_pair_are_cut_at_the_same_share() -> None:
    one = row(list(range(200, 210)), list(range(300, 320)))
    other = row(list(range(400, 410)), list(range(500, 520)))
    both = joined(one, other, SPECIAL, np.random.default_rng(0))
    assert both is not None
    first, second = texts_of(both)
    shares = [np.mean(np.array(text) < limit) for text, limit in ((first, 400), (second, 400))]
    assert 0.25 < shares[0] < 0.75
    assert abs(shares[0] - shares[1]) <= 0.05


@pytest.mark.parametrize("second", [None, [300, 301]])
def test_each_row_has_two_copies_unless_they_are_too_many(second: list[int] | None) -> None:
    rows = [row([200 + number, 201 + number, 202 + number], second) for number in range(40)]
    copies = altered(rows, SPECIAL, 16, 10_000)
    assert len(copies) == 80
    again = altered(rows, SPECIAL, 16, 10_000)
    for copy, same in zip(copies, again, strict=True):
        np.testing.assert_array_equal(copy.input_ids, same.input_ids)
    some = altered(rows, SPECIAL, 16, 100)
    assert 5 < len(some) < 80
    assert sum(map(len, some)) <= 100
    assert altered(rows, SPECIAL, 16, -5) == []


def test_no_copy_is_longer_than_a_row_may_be() -> None:
    rows = [row(list(range(200, 210)), [300]), row([400], list(range(500, 510)))] * 20
    longest = max(map(len, rows))
    assert max(map(len, altered(rows, SPECIAL, longest, 10_000))) <= longest


def test_of_many_rows_4000_copies_are_made() -> None:
    assert len(altered([row([200, 201])] * 2500, SPECIAL, 16, 10**9)) == 4000


def test_a_row_of_special_tokens_stays_as_it_is() -> None:
    empty = row([])
    for copy in altered([empty, row([200])], SPECIAL, 16, 100):
        assert len(copy) in (2, 3)
