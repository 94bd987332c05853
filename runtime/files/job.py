"""Classify the rows of inputs in blocks, and continue where an earlier run stopped.

Where a block ends depends only on the rows, and each block runs separately. A resumed run repeats
the unfinished block with the same batches, so it writes the same bytes. (The last digits of a row's
scores may depend on the rows in its batch.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

from ..blocks import blocks
from ..errors import InputError, Remedy, RowError
from ..results import Prediction
from .records import Record, RecordSchema
from .rows import Row
from .summary import Summary

BLOCK_ROWS = 4096
BLOCK_CHARACTERS = 512 * 2**10

Item = Row | RowError

_START_AGAIN = Remedy("start again without {resume}")


def run(
    items: Iterable[Item],
    write: Callable[[Record], object],
    completed: Iterator[Record],
    schema: RecordSchema,
    summary: Summary,
    advance: Callable[[Summary, int], None],
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
        advance: called after every record with the number of rows read so far.
        unbuffered: whether the record of a row is written before the next row is read.

    Raises:
        InputError: a row cannot be read and is not to be skipped, or the completed rows are not
            those of these inputs.
    """
    most_rows = 1 if unbuffered else BLOCK_ROWS
    checked = _checked(items, summary, schema.errors)
    for block in blocks(checked, _characters, BLOCK_CHARACTERS, most_rows):
        start = summary.rows
        done = _count_completed(block, completed, schema, summary)
        if done == len(block):
            continue
        # The whole block is run even if some of its rows are completed already.
        for item, prediction in itertools.islice(_predicted(summary, block), done, None):
            if isinstance(item, RowError):
                write(schema.error(summary.rows, item))
                summary.add_error(item)
            else:
                assert prediction is not None
                write(schema.record(summary.rows, item, prediction))
                summary.add(item, prediction)
            advance(summary, start + len(block))
    if next(completed, None) is not None:
        raise InputError("the earlier run has more rows than the inputs", _START_AGAIN)


def _count_completed(
    block: list[Item], completed: Iterator[Record], schema: RecordSchema, summary: Summary
) -> int:
    """Count the first rows of a block, which an earlier run has completed; returns how many.

    Raises:
        InputError: a completed record cannot be that of its row.
    """
    done, exits = 0, summary.engine.manifest.exits
    for item, record in zip(block, itertools.islice(completed, len(block)), strict=False):
        if isinstance(item, RowError) != ("error" in record) or not schema.fits(record, exits):
            raise InputError(
                f"row {summary.rows} of the earlier run is not from these inputs", _START_AGAIN
            )
        summary.add_completed(item, record)
        done += 1
    return done


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


def _predicted(summary: Summary, block: list[Item]) -> Iterator[tuple[Item, Prediction | None]]:
    rows = [item.content for item in block if isinstance(item, Row)]
    rule = summary.rule
    predictions = summary.engine.stream(rows, rule=rule, full_depth=rule is None)
    for item in block:
        yield item, next(predictions) if isinstance(item, Row) else None
