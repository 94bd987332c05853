"""Run one window of rows through the chain: segment, rule, drop or join, next segment."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from .backends.base import Bucket, Execution, H, Limits
from .batching import CostCurve, RowNumbers, cut_groups, plan_joins
from .distributions import Answers, Array
from .encoding import EncodedRow
from .errors import BackendError
from .exit_rules import Decider
from .manifest import LOGITS

_PROBE_ROWS = (1, 4, 16)
_PROBE_LENGTH = 32
_PROBE_REPEATS = 3


class Regroup(str, Enum):
    """Whether undecided rows of several groups are joined into full groups."""

    AUTO = "auto"
    """Where the measured cost of small groups says that it pays."""
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True)
class WindowResult:
    """What the chain gave for a window of rows.

    Attributes:
        exits: `[rows]` exit of each row, counted from 1.
        logits: `[exits, rows, labels]` float32, NaN at exits that a row did not reach.
        probabilities: `[rows, labels]` float64 at its exit.
        answers: `[rows]` class indices, or `[rows, labels]` of 0 and 1.
    """

    exits: Answers
    logits: NDArray[np.float32]
    probabilities: Array
    answers: Answers


@dataclass(frozen=True, eq=False)
class _Group(Generic[H]):
    rows: RowNumbers
    hidden: H


class Chain(Generic[H]):
    """The chain of segments on one execution: one thread's.

    Args:
        execution: where segments run.
        limits: the shapes it takes.
        segments: number of segments.
        labels: number of labels.
    """

    def __init__(self, execution: Execution[H], limits: Limits, segments: int, labels: int) -> None:
        self._execution = execution
        self._limits = limits
        self._segments = segments
        self._labels = labels

    def run(
        self, rows: Sequence[EncodedRow], decider: Decider, cost: CostCurve | None
    ) -> WindowResult:
        """Run rows until the rule has stopped all of them.

        Args:
            rows: the window.
            decider: the rule, fresh for these rows.
            cost: when given, undecided rows of several groups are joined where it says
                that this pays.
        """
        lengths = np.array([len(row) for row in rows], np.intp)
        result = _empty_result(self._segments, len(rows), self._labels, decider)
        groups = [
            self._begin(rows, numbers, lengths) for numbers in cut_groups(lengths, self._limits)
        ]
        for segment in range(self._segments):
            going = []
            for group in groups:
                hidden, pending = self._execution.enqueue(segment, group.hidden)
                logits = np.asarray(pending.result()[LOGITS])
                keep = _settle(result, decider, segment, group.rows, logits)
                going.append((group.rows, hidden, keep))
            groups = self._next_groups(going, lengths, cost)
            if not groups:
                break
        return result

    def _begin(
        self, rows: Sequence[EncodedRow], numbers: RowNumbers, lengths: NDArray[np.intp]
    ) -> _Group[H]:
        longest = int(lengths[numbers].max())
        if longest > self._limits.max_sequence:
            raise BackendError(
                f"a row has {longest} tokens; this target takes {self._limits.max_sequence}",
                "load the engine with a smaller max_length, or build the target for longer rows",
            )
        bucket = self._limits.bucket(len(numbers), longest)
        encoded = [rows[number] for number in numbers]
        return _Group(numbers, self._execution.begin(encoded, bucket))

    def _next_groups(
        self,
        going: list[tuple[RowNumbers, H, RowNumbers]],
        lengths: NDArray[np.intp],
        cost: CostCurve | None,
    ) -> list[_Group[H]]:
        alive = []
        for rows, hidden, keep in going:
            if len(keep):
                alive.append((rows, hidden, keep))
            else:
                self._execution.release(hidden)
        plan = [[number] for number in range(len(alive))]
        if cost is not None and len(alive) > 1:
            plan = plan_joins(
                [lengths[rows[keep]].tolist() for rows, _, keep in alive], self._limits, cost
            )
        return [self._join([alive[number] for number in part], lengths) for part in plan]

    def _join(
        self, parts: list[tuple[RowNumbers, H, RowNumbers]], lengths: NDArray[np.intp]
    ) -> _Group[H]:
        numbers = np.concatenate([rows[keep] for rows, _, keep in parts])
        bucket = self._limits.bucket(len(numbers), int(lengths[numbers].max()))
        hiddens = [hidden for _, hidden, _ in parts]
        if len(parts) == 1 and bucket == hiddens[0].bucket and len(numbers) == hiddens[0].rows:
            return _Group(numbers, hiddens[0])
        keeps = [keep for _, _, keep in parts]
        return _Group(numbers, self._execution.regroup(hiddens, keeps, bucket))

    def measure(self) -> CostCurve:
        """Measure a middle segment and the joining of groups: some thousand tokens' work."""
        sequence = min(_PROBE_LENGTH, self._limits.max_sequence)
        buckets = [
            self._limits.bucket(min(rows, self._limits.max_batch), sequence) for rows in _PROBE_ROWS
        ]
        sizes = [bucket.batch * bucket.sequence for bucket in buckets]
        seconds = [self._time_segment(bucket) for bucket in buckets]
        copy = min(self._time_copy(buckets[-1]) for _ in range(_PROBE_REPEATS)) / sizes[-1]
        return CostCurve(tuple(sizes), tuple(seconds), copy)

    def _probe(self, bucket: Bucket) -> H:
        row = EncodedRow(
            np.zeros(bucket.sequence, np.int64), np.zeros(bucket.sequence, np.int64), False
        )
        hidden = self._execution.begin([row] * bucket.batch, bucket)
        hidden, pending = self._execution.enqueue(0, hidden)
        pending.result()
        return hidden

    def _time_segment(self, bucket: Bucket) -> float:
        hidden = self._probe(bucket)
        # The last segment hands nothing on that could be fed to it again.
        repeats = _PROBE_REPEATS if self._segments > 2 else 1
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            hidden, pending = self._execution.enqueue(1, hidden)
            pending.result()
            times.append(time.perf_counter() - started)
        self._execution.release(hidden)
        return min(times)

    def _time_copy(self, bucket: Bucket) -> float:
        hidden = self._probe(bucket)
        everything = np.arange(bucket.batch, dtype=np.intp)
        started = time.perf_counter()
        hidden = self._execution.regroup([hidden], [everything], bucket)
        seconds = time.perf_counter() - started
        self._execution.release(hidden)
        return seconds


def _empty_result(exits: int, rows: int, labels: int, decider: Decider) -> WindowResult:
    return WindowResult(
        exits=np.zeros(rows, np.int64),
        logits=np.full((exits, rows, labels), np.nan, np.float32),
        probabilities=np.zeros((rows, labels)),
        answers=np.zeros((rows, labels) if decider.multi_label else (rows,), np.int64),
    )


def _settle(
    result: WindowResult,
    decider: Decider,
    segment: int,
    rows: RowNumbers,
    logits: NDArray[np.float32],
) -> RowNumbers:
    """Record what an exit says; returns the positions in the group that go on."""
    result.logits[segment, rows] = logits
    stops, outputs, _ = decider.decide(segment + 1, rows, logits)
    stopped = rows[stops]
    result.exits[stopped] = segment + 1
    result.probabilities[stopped] = outputs.probabilities[stops]
    result.answers[stopped] = outputs.answers[stops]
    return np.flatnonzero(~stops)
