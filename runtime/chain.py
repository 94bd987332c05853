"""Run one window of rows through the chain: segment, rule, drop or join, next segment."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from .artifact.manifest import LOGITS, ProblemType
from .backends.base import Bucket, Execution, H, Limits
from .batching import CostCurve, RowNumbers, make_groups, plan_joins
from .encoding import EncodedRow
from .errors import BackendError
from .rules.measures import Answers, Array, Outputs
from .rules.one_row import OneRow
from .rules.runner import PatienceState, RuleRunner

_PROBE_ROWS = (1, 4, 16)
_PROBE_LENGTH = 32
_PROBE_REPEATS = 3


class Regroup(str, Enum):
    """Whether undecided rows of several groups are joined into full groups.

    It changes how long a run takes, not what it answers beyond the target's tolerance.
    """

    AUTO = "auto"
    """Where the measured cost of small groups says that it pays."""
    ALWAYS = "always"
    """Wherever neighbouring groups fit into one."""
    NEVER = "never"
    """Rows stay in the group that they began in."""


@dataclass(frozen=True)
class WindowResult:
    """What the chain gave for a window of rows.

    Attributes:
        exits: `[rows]` int64, exit of each row, counted from 1.
        logits: `[exits, rows, labels]` float32, NaN at exits that a row did not reach.
        wasted: segments that rows ran beyond their exit, on devices that look ahead.
    """

    exits: Answers
    logits: NDArray[np.float32]
    wasted: int = 0

    def outputs(self, problem_type: ProblemType, label_thresholds: Sequence[float] = ()) -> Outputs:
        """The outputs of each row at its exit.

        Args:
            problem_type: the task.
            label_thresholds: see `Task.label_thresholds`; empty means 0.5.
        """
        return Outputs(
            self.logits[self.exits - 1, np.arange(len(self.exits))], problem_type, label_thresholds
        )


@dataclass(slots=True, eq=False)
class _Group(Generic[H]):
    """Rows that run together; `keep` holds the positions that go on, None for all."""

    rows: RowNumbers
    hidden: H
    state: PatienceState
    keep: RowNumbers | None = None

    @property
    def going(self) -> RowNumbers:
        return self.rows if self.keep is None else self.rows[self.keep]


def not_finite(target: str, exit_number: int) -> BackendError:
    """Logits that are NaN or infinite: they would name a label, or decide an exit, all the same."""
    return BackendError(
        f"target {target} gives logits that are not finite numbers at exit {exit_number}",
        "see what it is: fpabee-inspect ENGINES --check, or choose another --target",
    )


class _Seen:
    """What the exits of a window have said so far."""

    def __init__(self, exits: int, rows: int, labels: int, target: str) -> None:
        self.wasted = 0
        self._target = target
        self._exits = np.zeros(rows, np.int64)
        self._logits: list[tuple[int, RowNumbers, Array]] = []
        self._shape = (exits, rows, labels)

    def decide(
        self,
        runner: RuleRunner,
        segment: int,
        rows: RowNumbers,
        state: PatienceState,
        logits: Array,
    ) -> NDArray[np.bool_] | None:
        """Note an exit of some rows; returns which of them stop, None if none does."""
        if not np.isfinite(logits).all():
            raise not_finite(self._target, segment + 1)
        self._logits.append((segment, rows, logits))
        stops, _ = runner.decide(segment + 1, state, logits)
        if stops is not None:
            self._exits[rows[stops]] = segment + 1
        return stops

    def result(self) -> WindowResult:
        """All of it, in the order of the rows."""
        logits = np.full(self._shape, np.nan, np.float32)
        for segment, rows, values in self._logits:
            logits[segment, rows] = values
        return WindowResult(self._exits, logits, self.wasted)


class Chain(Generic[H]):
    """The chain of segments on one execution: one thread's.

    Args:
        execution: where segments run.
        limits: the shapes it takes.
        segments: number of segments.
        labels: number of labels.
        target: the target's name, for messages.
    """

    def __init__(
        self, execution: Execution[H], limits: Limits, segments: int, labels: int, target: str
    ) -> None:
        self._execution = execution
        self._limits = limits
        self._segments = segments
        self._labels = labels
        self._target = target

    def run(
        self, rows: Sequence[EncodedRow], runner: RuleRunner, cost: CostCurve | None
    ) -> WindowResult:
        """Run rows until the rule has stopped all of them.

        Args:
            rows: the window.
            runner: the rule, fresh for these rows.
            cost: when given, undecided rows of several groups are joined where it says
                that this pays.

        Raises:
            BackendError: a row is longer than the target takes, or its logits at an exit that it
                reached are not finite.
        """
        if len(rows) == 1:
            return self._run_one(rows[0], OneRow(runner))
        lengths = np.array([len(row) for row in rows], np.intp)
        groups = [
            self._begin(rows, numbers, lengths, runner)
            for numbers in make_groups(lengths, self._limits)
        ]
        seen = _Seen(self._segments, len(rows), self._labels, self._target)
        if self._execution.lookahead and len(groups) == 1:
            self._run_ahead(groups[0], lengths, runner, seen)
        else:
            self._run_stages(groups, lengths, runner, cost, seen)
        return seen.result()

    def _run_stages(
        self,
        groups: list[_Group[H]],
        lengths: NDArray[np.intp],
        runner: RuleRunner,
        cost: CostCurve | None,
        seen: _Seen,
    ) -> None:
        """Segment by segment: enqueue all groups, then read and decide one after another."""
        for segment in range(self._segments):
            pendings = []
            for group in groups:
                group.hidden, pending = self._execution.enqueue(segment, group.hidden)
                pendings.append(pending)
            changed = False
            for group, pending in zip(groups, pendings, strict=True):
                logits = pending.result()[LOGITS].astype(np.float64)
                stops = seen.decide(runner, segment, group.rows, group.state, logits)
                if stops is not None:
                    group.keep = np.flatnonzero(~stops)
                    changed = True
            if changed:
                groups = self._next_groups(groups, lengths, cost)
                if not groups:
                    return

    def _run_ahead(
        self, group: _Group[H], lengths: NDArray[np.intp], runner: RuleRunner, seen: _Seen
    ) -> None:
        """One group: each segment is enqueued before the exit before it is read.

        So the device never waits for the rule, and a row that stops has run one segment in
        vain, which is counted.
        """
        rows, hidden, state = group.rows, group.hidden, group.state
        hidden, pending = self._execution.enqueue(0, hidden)
        # Where the rows are: in the outputs to be read next, and in the hidden states.
        read_at = hidden_at = np.arange(len(rows))
        for segment in range(self._segments):
            ahead, ahead_at = pending, hidden_at
            is_last = segment + 1 == self._segments
            if not is_last:
                hidden, ahead = self._execution.enqueue(segment + 1, hidden)
            logits = pending.result()[LOGITS][read_at].astype(np.float64)
            stops = seen.decide(runner, segment, rows, state, logits)
            if stops is not None:
                seen.wasted += 0 if is_last else int(np.count_nonzero(stops))
                keep = np.flatnonzero(~stops)
                if not len(keep):
                    break
                rows, state = rows[keep], state.take(keep)
                hidden_at, ahead_at = hidden_at[keep], ahead_at[keep]
                bucket = self._bucket(len(rows), int(lengths[rows].max()))
                if bucket != hidden.bucket and segment + 2 < self._segments:
                    hidden = self._execution.regroup([hidden], [hidden_at], bucket)
                    hidden_at = np.arange(len(rows))
            pending, read_at = ahead, ahead_at
        self._execution.release(hidden)

    def _run_one(self, row: EncodedRow, one: OneRow) -> WindowResult:
        execution = self._execution
        hidden = execution.begin([row], self._bucket(1, len(row)))
        hidden, pending = execution.enqueue(0, hidden)
        history: list[list[float]] = []
        wasted = 0
        for segment in range(1, self._segments + 1):
            ahead = pending
            if execution.lookahead and segment < self._segments:
                hidden, ahead = execution.enqueue(segment, hidden)
            history.append(pending.result()[LOGITS][0].tolist())
            if not all(map(math.isfinite, history[-1])):
                raise not_finite(self._target, segment)
            if one.stops(history[-1]):
                wasted = int(ahead is not pending)
                break
            if not execution.lookahead:
                hidden, ahead = execution.enqueue(segment, hidden)
            pending = ahead
        execution.release(hidden)
        logits = np.full((self._segments, 1, self._labels), np.nan, np.float32)
        logits[: len(history), 0] = history
        return WindowResult(np.array([len(history)], np.int64), logits, wasted)

    def _bucket(self, rows: int, longest: int) -> Bucket:
        if longest > self._limits.max_sequence:
            raise BackendError(
                f"a row has {longest} tokens; this target takes {self._limits.max_sequence}",
                "load the engine with a smaller max_length, or build the target for longer rows",
            )
        return self._limits.bucket(rows, longest)

    def _begin(
        self,
        rows: Sequence[EncodedRow],
        numbers: RowNumbers,
        lengths: NDArray[np.intp],
        runner: RuleRunner,
    ) -> _Group[H]:
        bucket = self._bucket(len(numbers), int(lengths[numbers].max()))
        hidden = self._execution.begin([rows[number] for number in numbers], bucket)
        return _Group(numbers, hidden, runner.start(len(numbers)))

    def _next_groups(
        self, groups: list[_Group[H]], lengths: NDArray[np.intp], cost: CostCurve | None
    ) -> list[_Group[H]]:
        alive = []
        for group in groups:
            if group.keep is None or len(group.keep):
                alive.append(group)
            else:
                self._execution.release(group.hidden)
        if cost is None or len(alive) < 2:
            return [self._join([group], lengths) for group in alive]
        plan = plan_joins([lengths[group.going].tolist() for group in alive], self._limits, cost)
        return [self._join([alive[number] for number in part], lengths) for part in plan]

    def _join(self, parts: list[_Group[H]], lengths: NDArray[np.intp]) -> _Group[H]:
        if len(parts) == 1 and parts[0].keep is None:
            return parts[0]
        numbers = np.concatenate([part.going for part in parts])
        bucket = self._limits.bucket(len(numbers), int(lengths[numbers].max()))
        keeps = [np.arange(len(p.rows)) if p.keep is None else p.keep for p in parts]
        hidden = self._execution.regroup([part.hidden for part in parts], keeps, bucket)
        state = PatienceState.join(
            [part.state.take(keep) for part, keep in zip(parts, keeps, strict=True)]
        )
        return _Group(numbers, hidden, state)

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

    def time_segments(self, rows: int, tokens: int) -> list[float]:
        """Seconds of each segment on a group of rows, its head's answer included."""
        hidden = self._padding(self._bucket(rows, tokens))
        times = []
        for segment in range(self._segments):
            started = time.perf_counter()
            hidden, pending = self._execution.enqueue(segment, hidden)
            pending.result()
            times.append(time.perf_counter() - started)
        self._execution.release(hidden)
        return times

    def _padding(self, bucket: Bucket) -> H:
        """A group of rows of the first token, before segment 1."""
        row = EncodedRow(
            np.zeros(bucket.sequence, np.int64), np.zeros(bucket.sequence, np.int64), False
        )
        return self._execution.begin([row] * bucket.batch, bucket)

    def _probe(self, bucket: Bucket) -> H:
        hidden, pending = self._execution.enqueue(0, self._padding(bucket))
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
