"""Classify the rows of inputs, block by block, and go on where an earlier run stopped.

A block is cut by the rows alone and gets windows of its own. So a run that goes on with the
block where another stopped puts the same rows together, and gets the same bytes: a row's last
digits may depend on the rows that it is computed with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..engine import Engine
from ..errors import InputError, RowError
from ..results import Prediction
from ..rules.rules import ExitRule
from . import Row
from .destination import Sink
from .records import Record, RecordSchema
from .summary import Summary

BLOCK_ROWS = 4096
BLOCK_CHARACTERS = 512 * 2**10

Item = Row | RowError

_AGAIN = "start again without --resume"


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        engine: the engine.
        rule: when rows stop.
        full_depth: run every layer for every row instead.
        schema: what is written for a row.
        skip: whether a row that cannot be read becomes a record of its error; else it ends
            the run.
        unbuffered: whether a row's record is written before the next row is read.
    """

    engine: Engine
    rule: ExitRule
    full_depth: bool
    schema: RecordSchema
    skip: bool = False
    unbuffered: bool = False


def run(
    job: Job,
    items: Iterable[Item],
    sink: Sink,
    summary: Summary,
    advance: Callable[[Summary, int], None],
) -> RowError | None:
    """Classify rows and write their records in order.

    Args:
        job: what is run.
        items: the rows.
        sink: where records go; rows that stand there already are not run again, only counted.
        summary: counts every row.
        advance: told of every record with the number of rows read so far.

    Returns:
        The error of the first row that was skipped.

    Raises:
        InputError: a row cannot be read and is not to be skipped, or the rows that stand
            there are not of these inputs.
    """
    first_error: RowError | None = None
    most = 1 if job.unbuffered else BLOCK_ROWS
    for block in blocks(_checked(job, items, summary), most):
        first_error = first_error or next((x for x in block if isinstance(x, RowError)), None)
        start = summary.rows
        for item, record in zip(block, itertools.islice(sink.completed, len(block)), strict=False):
            _count_completed(job, summary, item, record)
        kept = summary.rows - start
        if kept == len(block):
            continue
        read = start + len(block)
        for number, (item, prediction) in enumerate(_predicted(job, block)):
            # The rows of a block are run together even where some of them stand already.
            if number < kept:
                continue
            if isinstance(item, RowError):
                sink.write(job.schema.error(summary.rows, item))
                summary.add_error()
            else:
                assert prediction is not None
                sink.write(job.schema.record(summary.rows, item, prediction))
                summary.add(item, prediction)
            advance(summary, read)
    if next(sink.completed, None) is not None:
        raise InputError("more rows are written than the inputs have", _AGAIN)
    return first_error


def _count_completed(job: Job, summary: Summary, item: Item, record: Record) -> None:
    if isinstance(item, RowError) != ("error" in record) or not job.schema.fits(record):
        raise InputError(f"row {summary.rows} that is written is not of these inputs", _AGAIN)
    if isinstance(item, RowError):
        summary.add_error()
    else:
        summary.add_record(item, record)


def blocks(items: Iterable[Item], most: int) -> Iterator[list[Item]]:
    """Rows in blocks of at most so many, whose characters are bounded too."""
    block: list[Item] = []
    characters = 0
    for item in items:
        block.append(item)
        if isinstance(item, Row):
            characters += len(item.text) + len(item.text_pair or "")
        if len(block) == most or characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _checked(job: Job, items: Iterable[Item], summary: Summary) -> Iterator[Item]:
    for item in items:
        error = item if isinstance(item, RowError) else summary.unavailable_reason(item)
        if error is not None and not job.skip:
            raise error
        yield item if error is None else error


def _predicted(job: Job, block: list[Item]) -> Iterator[tuple[Item, Prediction | None]]:
    rows = [item.content for item in block if isinstance(item, Row)]
    predictions = job.engine.stream(rows, rule=job.rule, full_depth=job.full_depth)
    for item in block:
        yield item, next(predictions) if isinstance(item, Row) else None
