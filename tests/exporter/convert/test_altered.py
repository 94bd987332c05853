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
SPECIAL = np.array([CLS, SEP])


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


TEXT = st.lists(st.integers(200, 999), max_size=12)
ROWS = st.builds(row, TEXT, st.none() | TEXT.filter(bool))
SEEDS = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@given(ROWS, SEEDS)
def test_a_shortened_row_has_some_tokens_of_each_text(
    made: EncodedRow, random: np.random.Generator
) -> None:
    whole = texts_of(made)
    parts = texts_of(shortened(made, SPECIAL, random))
    assert len(parts) == len(whole)
    for part, text in zip(parts, whole, strict=True):
        assert bool(part) == bool(text)
        assert is_part(part, text)


@given(ROWS, ROWS, SEEDS)
def test_a_joined_row_begins_as_one_row_and_ends_as_the_other(
    made: EncodedRow, other: EncodedRow, random: np.random.Generator
) -> None:
    both = joined(made, other, SPECIAL, random)
    begins = texts_of(made)
    ends = texts_of(other)
    if both is None:
        assert len(begins) != len(ends) or not all([*begins, *ends])
        return
    for part, begin, end in zip(texts_of(both), begins, ends, strict=True):
        places = [
            place
            for place in range(1, len(part))
            if part[:place] == begin[:place] and part[place:] == end[place - len(part) :]
        ]
        assert places, "the beginning of one text, then the end of the other"


def test_the_same_share_of_both_texts_of_a_pair_is_joined() -> None:
    one = row(list(range(200, 210)), list(range(300, 320)))
    other = row(list(range(400, 410)), list(range(500, 520)))
    for seed in range(20):
        both = joined(one, other, SPECIAL, np.random.default_rng(seed))
        assert both is not None
        first, second = (np.array(text) for text in texts_of(both))
        for of_first, of_second in (
            (np.count_nonzero(first < 400), np.count_nonzero(second < 500)),
            (np.count_nonzero(first >= 400), np.count_nonzero(second >= 500)),
        ):
            assert 3 <= of_first <= 7
            assert abs(2 * of_first - of_second) <= 1


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
    rows = [row(list(range(200, 210 + number))) for number in range(40)]
    longest = max(map(len, rows))
    lengths = [len(copy) for copy in altered(rows, SPECIAL, longest, 10_000)]
    assert max(lengths) <= longest
    assert max(len(copy) for copy in altered(rows, SPECIAL, 2 * longest, 10_000)) > longest


def test_of_many_rows_4000_copies_are_made() -> None:
    assert len(altered([row([200, 201])] * 2500, SPECIAL, 16, 10**9)) == 4000


def test_a_text_without_tokens_stays_as_it_is() -> None:
    ids = {tuple(copy.input_ids) for copy in altered([row([]), row([200])], SPECIAL, 16, 100)}
    assert ids == {(CLS, SEP), (CLS, 200, SEP), (CLS, 200, 200, SEP)}


def test_a_row_without_special_tokens_keeps_a_token() -> None:
    plain = EncodedRow(np.array([200, 201]), np.zeros(2, np.int64), truncated=False)
    copies = altered([plain] * 30, np.array([], np.int64), 16, 1000)
    assert {len(copy) for copy in copies} == {1, 2}
