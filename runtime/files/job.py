"""Classify the rows of inputs in blocks, and continue where an earlier run stopped.

Where a block ends depends only on the rows, and each block runs separately. A resumed run repeats
the unfinished block with the same batches, so it writes the same bytes. (The last digits of a row's
scores may depend on the rows in its batch.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from ..encoding import blocks
from ..errors import RowError
from .records import Record, RecordSchema
from .rows import Row
from .summary import Summary

BLOCK_ROWS = 4096
BLOCK_CHARACTERS = 512 * 2**10

Item = Row | RowError


def run(
    items: Iterable[Item],
    write: Callable[[Record], object],
    completed: Iterator[Record],
    schema: RecordSchema,
    summary: Summary,
    advance: Callable[[Summary], None],
    unbuffered: bool = False,
) -> None:
    """Classify rows and write their records in order.

    Args:
        items: the rows.
        write: takes the next record.
        completed: the records that an earlier run has written; they are only counted.
        schema: what is written for a row. If records may be errors, the record of a row that
            cannot be read is its error; otherwise such a row ends the run.
        summary: says which engine and rule run, and counts every row.
        advance: called after every record.
        unbuffered: whether the record of a row is written before the next row is read.

    Raises:
        RowError: a row cannot be read and is not to be skipped.
    """
    most_rows = 1 if unbuffered else BLOCK_ROWS
    checked = _checked(items, summary, schema.errors)
    for block in blocks(checked, _characters, BLOCK_CHARACTERS, most_rows):
        start = summary.rows
        for item, record in zip(block, itertools.islice(completed, len(block)), strict=False):
            summary.add(item, record)
            summary.completed += 1
        if summary.rows == start + len(block):
            continue
        # The whole block is run even if some of its rows are completed already.
        rows = [item.content for item in block if isinstance(item, Row)]
        rule = summary.rule
        predictions = summary.engine.stream(rows, rule=rule, full_depth=rule is None)
        for index, item in enumerate(block, start):
            if isinstance(item, RowError):
                record = schema.error(index, item)
            else:
                record = schema.record(index, item, next(predictions))
            if index == summary.rows:
                write(record)
                summary.add(item, record)
                advance(summary)


def _characters(item: Item) -> int:
    return len(item.text) + len(item.text_pair or "") if isinstance(item, Row) else 0


def _checked(items: Iterable[Item], summary: Summary, skip: bool) -> Iterator[Item]:
    """The rows; if scores are wanted, a row that cannot be scored is replaced by its error."""
    for item in items:
        try:
            if isinstance(item, RowError):
                raise item
            summary.check_label(item)
        except RowError as error:
            if not skip:
                raise
            yield error
        else:
            yield item
