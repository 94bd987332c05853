"""Which rows run next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpabee.runtime.backends.shapes import Limits
from fpabee.runtime.serving.policy import rows_with, segments_left, worth

LIMITS = Limits(max_batch=32, max_sequence=64, group_tokens=512)


def test_segments_left_without_rows_are_all() -> None:
    assert segments_left([0, 0, 0]).tolist() == [3, 2, 1]


def test_segments_left_of_rows_that_stop_early() -> None:
    # Of 9 + 1 rows, 10 run segment 1, 4 segment 2 and 1 segment 3.
    assert segments_left([6, 3, 0]).tolist() == pytest.approx([1.5, 1.25, 1.0])


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=24))
def test_deeper_rows_never_have_more_left(stopped: list[int]) -> None:
    left = segments_left(stopped)
    assert (np.diff(left) <= 0).all()
    assert left[-1] == 1
    assert (left >= 1).all()


def test_without_joining_only_the_depth_and_the_age_count() -> None:
    assert worth(300, 2.0, 1.0, joins=False) == worth(10, 2.0, 1.0, joins=False)
    assert worth(10, 1.0, 1.0, joins=False) > worth(300, 2.0, 1.0, joins=False)


def test_with_joining_full_groups_come_first() -> None:
    assert worth(300, 6.0, 1.0, joins=True) > worth(10, 1.0, 1.0, joins=True)
    assert worth(300, 6.0, 1.0, joins=True) < worth(100, 1.0, 1.0, joins=True)


@pytest.mark.parametrize("joins", [False, True])
def test_no_row_waits_forever(joins: bool) -> None:
    """However much more others are worth, their age is small when a row has waited long enough."""
    assert worth(10, 6.0, 200.0, joins) > worth(300, 1.0, 1.0, joins)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=100), st.data(), st.booleans())
def test_a_group_has_the_row_and_fits(lengths: list[int], data: st.DataObject, joins: bool) -> None:
    head = data.draw(st.integers(0, len(lengths) - 1))
    rows = rows_with(head, lengths, LIMITS, joins).tolist()
    assert head in rows
    assert len(set(rows)) == len(rows) <= LIMITS.max_batch
    assert len(rows) * max(lengths[row] for row in rows) <= LIMITS.group_tokens


def test_groups_are_padded_only_where_it_pays() -> None:
    lengths = [10, 50, 10, 11, 50, 12]
    assert sorted(rows_with(0, lengths, LIMITS, joins=False)) == [0, 2, 3, 5]
    assert sorted(rows_with(1, lengths, LIMITS, joins=False)) == [1, 4]
    assert sorted(rows_with(0, lengths, LIMITS, joins=True)) == [0, 1, 2, 3, 4, 5]


def test_rows_are_padded_to_the_batches_of_the_target() -> None:
    limits = Limits(16, 64, 128, batch_sizes=(1, 16), sequence_lengths=(16, 64))
    for head in range(3):
        rows = rows_with(head, [60, 60, 5], limits, joins=True).tolist()
        assert head in rows
        assert len(rows) == 1
