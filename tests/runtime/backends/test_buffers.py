"""Which unused buffers are kept, and which are dropped."""

from __future__ import annotations

from fpabee.runtime.backends.buffers import BufferName, Buffers, Store
from fpabee.runtime.backends.shapes import Bucket


class FakeBuffers(Buffers[int, int]):
    """Buffers of which a token takes one byte."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket)
        self.nbytes = bucket.batch * bucket.sequence
        self.is_free = False

    def _allocate(self, name: BufferName) -> int:
        raise NotImplementedError

    def _prepare(self, segment: int) -> int:
        raise NotImplementedError

    def free(self) -> None:
        assert not self.is_free
        self.is_free = True


def test_buffers_are_used_again() -> None:
    store = Store(FakeBuffers, most_bytes=100)
    first = store.take(Bucket(1, 10))
    assert store.nbytes == 0, "a group uses them"
    store.give(first)
    assert store.nbytes == 10
    assert store.take(Bucket(1, 10)) is first
    assert store.take(Bucket(1, 10)) is not first, "two groups of one shape"


def test_the_least_recently_used_shape_is_dropped_first() -> None:
    store = Store(FakeBuffers, most_bytes=20)
    first, second, third = (store.take(Bucket(1, tokens)) for tokens in (8, 9, 10))
    store.give(first)
    store.give(second)
    assert store.take(first.bucket) is first
    store.give(first)
    store.give(third)
    assert [buffers.is_free for buffers in (first, second, third)] == [False, True, False]
    assert store.nbytes == 18


def test_shrinking_drops_everything() -> None:
    store = Store(FakeBuffers, most_bytes=100)
    made = [store.take(Bucket(1, tokens)) for tokens in (1, 1, 2)]
    for buffers in made:
        store.give(buffers)
    store.shrink(0)
    assert store.nbytes == 0
    assert all(buffers.is_free for buffers in made)
