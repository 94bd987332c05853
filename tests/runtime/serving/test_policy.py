"""Which rows run next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpabee.runtime.backends.shapes import Limits
from fpabee.runtime.batching import CostCurve
from fpabee.runtime.serving.policy import rows_with, segments_left, worth

LIMITS = Limits(max_batch=32, max_sequence=64, group_tokens=512)
LINEAR = CostCurve((1, 1000), (1e-3, 1.0), 0.0)
FLAT = CostCurve((1, 1000), (1.0, 1.0), 0.0)


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


def test_on_a_linear_target_only_the_depth_counts() -> None:
    groups = ([10] * 30, [10], [60] * 5)
    found = [worth(lengths, 2.0, 1.0, LIMITS, LINEAR) for lengths in groups]
    assert found == pytest.approx([found[0]] * 3)
    assert worth([10], 1.0, 1.0, LIMITS, LINEAR) > worth([10] * 30, 2.0, 1.0, LIMITS, LINEAR)
    assert worth([10], 1.0, 1.0, LIMITS, None) > worth([10] * 30, 2.0, 1.0, LIMITS, None)


def test_on_a_flat_target_full_groups_come_first() -> None:
    assert worth([10] * 30, 6.0, 1.0, LIMITS, FLAT) > worth([10], 1.0, 1.0, LIMITS, FLAT)
    assert worth([10] * 30, 6.0, 1.0, LIMITS, FLAT) < worth([10] * 10, 1.0, 1.0, LIMITS, FLAT)


@pytest.mark.parametrize("cost", [LINEAR, FLAT, None])
def test_no_row_waits_forever(cost: CostCurve | None) -> None:
    """However much more others are worth, their age is small when a row has waited long enough."""
    assert worth([10], 6.0, 200.0, LIMITS, cost) > worth([10] * 30, 1.0, 1.0, LIMITS, cost)


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=100),
    st.data(),
    st.sampled_from([LINEAR, FLAT, None]),
)
def test_a_group_has_the_row_and_fits(
    lengths: list[int], data: st.DataObject, cost: CostCurve | None
) -> None:
    head = data.draw(st.integers(0, len(lengths) - 1))
    rows = rows_with(head, lengths, LIMITS, cost).tolist()
    assert head in rows
    assert len(set(rows)) == len(rows) <= LIMITS.max_batch
    assert len(rows) * max(lengths[row] for row in rows) <= LIMITS.group_tokens


def test_groups_are_padded_only_where_it_pays() -> None:
    lengths = [10, 50, 10, 11, 50, 12]
    assert sorted(rows_with(0, lengths, LIMITS, LINEAR)) in ([0], [0, 2])
    assert sorted(rows_with(0, lengths, LIMITS, FLAT)) == [0, 1, 2, 3, 4, 5]
    # Up to 40 tokens take the same time, so a little padding pays and much of it does not.
    both = CostCurve((40, 1000), (40e-3, 1.0), 0.0)
    assert sorted(rows_with(0, lengths, LIMITS, both)) == [0, 2, 3, 5]


def test_rows_are_padded_to_the_batches_of_the_target() -> None:
    limits = Limits(16, 64, 128, batch_sizes=(1, 16), sequence_lengths=(16, 64))
    for head in range(3):
        rows = rows_with(head, [60, 60, 5], limits, FLAT).tolist()
        assert head in rows
        assert len(rows) == 1
