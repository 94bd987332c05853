"""Time a chain on made-up rows: how long its exits, its segments and the joining of groups take."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .backends.buffers import Hidden
from .backends.shapes import Bucket
from .batching import CostCurve
from .chain import Chain
from .encoding import EncodedRow

_PROBE_ROWS = (1, 4, 16)
_PROBE_LENGTH = 32
_PROBE_REPEATS = 3


def measure(chain: Chain[Any]) -> CostCurve:
    """Measure how long a middle segment takes by the size of a group, and how long joining."""
    limits = chain.limits
    sequence = min(_PROBE_LENGTH, limits.max_sequence)
    buckets = [limits.bucket(min(rows, limits.max_batch), sequence) for rows in _PROBE_ROWS]
    sizes = [bucket.batch * bucket.sequence for bucket in buckets]
    seconds = [_time_segment(chain, bucket) for bucket in buckets]
    copy = min(_time_copy(chain, buckets[-1]) for _ in range(_PROBE_REPEATS)) / sizes[-1]
    return CostCurve(tuple(sizes), tuple(seconds), copy)


def time_exits(chain: Chain[Any], rows: int, tokens: int) -> list[float]:
    """Seconds from each exit to the next, on a group of rows.

    The first number is that of exit 0, if there is one. The others are those of the segments,
    including the time to read the outputs of their heads.

    Args:
        chain: the chain.
        rows: rows in the group.
        tokens: tokens in each row.

    Raises:
        BackendError: the rows are longer than the target takes.
    """
    bucket = chain.bucket(rows, tokens)
    times = []
    if chain.exit_0 is not None:
        made_up = [_made_up_row(tokens)] * rows
        started = time.perf_counter()
        chain.exit_0(made_up)
        times.append(time.perf_counter() - started)
    hidden = _made_up(chain, bucket)
    times += [_timed(chain, segment, hidden) for segment in range(chain.backend.segments)]
    chain.execution.release(hidden)
    return times


def _made_up(chain: Chain[Any], bucket: Bucket) -> Hidden[Any]:
    """A group of made-up rows before segment 1."""
    row = _made_up_row(bucket.sequence)
    return chain.execution.begin([row] * bucket.batch, bucket)


def _made_up_row(tokens: int) -> EncodedRow:
    ids = np.zeros(tokens, np.int64)
    return EncodedRow(ids, ids, truncated=False)


def _timed(chain: Chain[Any], segment: int, hidden: Hidden[Any]) -> float:
    started = time.perf_counter()
    chain.execution.enqueue(segment, hidden).result()
    return time.perf_counter() - started


def _time_segment(chain: Chain[Any], bucket: Bucket) -> float:
    hidden = _made_up(chain, bucket)
    _timed(chain, 0, hidden)
    # The last segment writes no hidden states, so it cannot run a second time.
    repeats = _PROBE_REPEATS if chain.backend.segments > 2 else 1
    seconds = min(_timed(chain, 1, hidden) for _ in range(repeats))
    chain.execution.release(hidden)
    return seconds


def _time_copy(chain: Chain[Any], bucket: Bucket) -> float:
    hidden = _made_up(chain, bucket)
    _timed(chain, 0, hidden)
    started = time.perf_counter()
    copied = chain.execution.regroup([hidden], [np.arange(bucket.batch)], bucket)
    chain.execution.wait()
    seconds = time.perf_counter() - started
    for group in (hidden, copied):
        chain.execution.release(group)
    return seconds
