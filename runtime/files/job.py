"""Classify the rows of inputs in blocks, and continue where an earlier run stopped.

Blocks are cut by the rows alone, and each is run by itself. So a run that continues with the block
in which another stopped batches the same rows together and writes the same bytes: the last digits
of a row may depend on the rows in its batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..blocks import blocks
from ..engine import Engine
from ..errors import InputError, Remedy, RowError
from ..results import Prediction
from ..rules.base import ExitRule
from .destination import Sink
from .records import RecordSchema
from .rows import Row
from .summary import Summary

BLOCK_ROWS = 4096
BLOCK_CHARACTERS = 512 * 2**10

Item = Row | RowError

_START_AGAIN = Remedy("start again without {resume}")


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        engine: the engine.
        rule: decides where rows stop; None: every row runs all layers.
        schema: what is written for a row.
        skip: whether a row that cannot be read becomes a record of its error; otherwise it ends
            the run.
        unbuffered: whether the record of a row is written before the next row is read.
    """

    engine: Engine
    rule: ExitRule | None
    schema: RecordSchema
    skip: bool = False
    unbuffered: bool = False


def run(
    job: Job,
    items: Iterable[Item],
    sink: Sink,
    summary: Summary,
    advance: Callable[[Summary, int], None],
) -> None:
    """Classify rows and write their records in order.

    Args:
        job: what is run.
        items: the rows.
        sink: where records go; rows that are completed already are only counted.
        summary: counts every row.
        advance: called after every record with the number of rows read so far.

    Raises:
        InputError: a row cannot be read and is not to be skipped, or the completed rows are not
            those of these inputs.
    """
    most_rows = 1 if job.unbuffered else BLOCK_ROWS
    for block in blocks(_checked(job, items, summary), _characters, BLOCK_CHARACTERS, most_rows):
        start = summary.rows
        for item, record in zip(block, itertools.islice(sink.completed, len(block)), strict=False):
            if isinstance(item, RowError) != ("error" in record) or not job.schema.fits(record):
                raise InputError(
                    f"row {summary.rows} of the earlier run is not from these inputs", _START_AGAIN
                )
            summary.add_completed(item, record)
        done = summary.rows - start
        if done == len(block):
            continue
        # The whole block is run even if some of its rows are completed already.
        for item, prediction in itertools.islice(_predicted(job, block), done, None):
            if isinstance(item, RowError):
                sink.write(job.schema.error(summary.rows, item))
                summary.add_error(item)
            else:
                assert prediction is not None
                sink.write(job.schema.record(summary.rows, item, prediction))
                summary.add(item, prediction)
            advance(summary, start + len(block))
    if next(sink.completed, None) is not None:
        raise InputError("the earlier run has more rows than the inputs", _START_AGAIN)


def _characters(item: Item) -> int:
    return len(item.text) + len(item.text_pair or "") if isinstance(item, Row) else 0


def _checked(job: Job, items: Iterable[Item], summary: Summary) -> Iterator[Item]:
    """The rows; an error in place of each row that cannot be scored, if scores are wanted."""
    for item in items:
        checked = item if isinstance(item, RowError) else summary.label_error(item) or item
        if isinstance(checked, RowError) and not job.skip:
            raise checked
        yield checked


def _predicted(job: Job, block: list[Item]) -> Iterator[tuple[Item, Prediction | None]]:
    rows = [item.content for item in block if isinstance(item, Row)]
    predictions = job.engine.stream(rows, rule=job.rule, full_depth=job.rule is None)
    for item in block:
        yield item, next(predictions) if isinstance(item, Row) else None
