"""Split a stream of items into lists, so that memory stays flat however large the items are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def blocks(
    items: Iterable[T], size: Callable[[T], int], most: int, most_items: int | None = None
) -> Iterator[list[T]]:
    """Lists of items, bounded in total size and in number.

    Args:
        items: the items; nothing is read beyond the list that is asked for.
        size: the size of an item.
        most: a list ends when its items have at least this size together.
        most_items: most items in a list; None: any number.
    """
    block: list[T] = []
    total = 0
    for item in items:
        block.append(item)
        total += size(item)
        if total >= most or len(block) == most_items:
            yield block
            block, total = [], 0
    if block:
        yield block
