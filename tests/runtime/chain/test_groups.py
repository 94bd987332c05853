"""Groups contain every row once and keep to the budget."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from fpabee.runtime.backends.buffers import Bucket, Limits
from fpabee.runtime.chain.groups import shapes, split

row_lengths = st.lists(st.integers(1, 64), max_size=60)
some_limits = st.builds(
    Limits,
    max_batch=st.sampled_from([1, 3, 8, 32]),
    max_sequence=st.just(64),
    group_tokens=st.sampled_from([1, 50, 200, 5000]),
    batch_sizes=st.sampled_from([(), (1, 2, 4, 8, 16, 32)]),
    sequence_lengths=st.sampled_from([(), (16, 32, 64)]),
)


def padded(bucket: Bucket) -> int:
    return bucket.batch * bucket.sequence


@example([1, 1, 1], Limits(4, 64, group_tokens=50, batch_sizes=(1, 2, 4), sequence_lengths=(16,)))
@given(row_lengths, some_limits)
def test_every_row_is_in_one_group_of_similar_rows_within_the_budget(
    lengths: list[int], limits: Limits
) -> None:
    groups = split(np.array(lengths, np.intp), limits)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    descending: list[int] = []
    for group in groups:
        assert 0 < len(group) <= limits.max_batch
        rows = sorted((lengths[row] for row in group), reverse=True)
        assert len(rows) == 1 or padded(limits.bucket(len(rows), rows[0])) <= limits.group_tokens
        descending += rows
    assert descending == sorted(lengths, reverse=True)


@example([5], Limits(8, 64, group_tokens=50, batch_sizes=(2, 8), sequence_lengths=(64,)))
@given(row_lengths, some_limits)
def test_every_group_has_one_of_the_shapes_as_its_rows_leave(
    lengths: list[int], limits: Limits
) -> None:
    if not (limits.batch_sizes and limits.sequence_lengths):
        return
    buckets = {limits.bucket(*shape) for shape in shapes(limits)}
    for group in split(np.array(lengths, np.intp), limits):
        left = [lengths[row] for row in group]
        while left:
            assert limits.bucket(len(left), max(left)) in buckets
            left.pop(0)


def test_groups_are_as_large_as_the_budget_allows() -> None:
    limits = Limits(max_batch=3, max_sequence=64, group_tokens=40)
    groups = split(np.array([50, 20, 20, 5, 5, 5, 5], np.intp), limits)
    assert [len(group) for group in groups] == [1, 2, 3, 1]


def test_buckets_round_up_to_the_next_step_if_there_is_one() -> None:
    limits = Limits(64, 64, 100, batch_sizes=(1, 4), sequence_lengths=(16, 64))
    assert limits.bucket(1, 16) == Bucket(1, 16)
    assert limits.bucket(2, 17) == Bucket(4, 64)
    assert limits.bucket(5, 65) == Bucket(5, 65)
    assert Limits(64, 64, 100).bucket(3, 17) == Bucket(3, 17)
