"""Run one window of rows through the chain.

Exit 0 answers first, if the model has one. After each segment the rule decides which rows stop.
The others are regrouped, and the next segment runs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from .artifact.manifest import LOGITS
from .backends.backend import Backend, Execution, Pending
from .backends.buffers import B, Hidden
from .backends.shapes import Bucket, Limits
from .batching import RowNumbers, fits, make_groups, plan_joins
from .encoding import EncodedRow
from .errors import BackendError
from .exit_0 import ExitZero
from .rules.measures import Integers, Mask
from .rules.runner import PatienceState, RuleRunner


@dataclass(frozen=True)
class WindowResult:
    """The exits and logits of a window of rows.

    Attributes:
        exits: `[rows]` int64, the exit of each row.
        logits: `[exits, rows, labels]` float32, NaN at exits that a row did not reach.
        first_exit: the exit of the first logits.
        limited: `[rows]` whether the deadline stopped a row before its rule did.
    """

    exits: Integers
    logits: NDArray[np.float32]
    first_exit: int
    limited: Mask

    @property
    def at_exit(self) -> NDArray[np.float32]:
        """The logits of each row at its exit, `[rows, labels]`."""
        return self.logits[self.exits - self.first_exit, np.arange(len(self.exits))]


@dataclass(slots=True, eq=False)
class Group(Generic[B]):
    """Rows that run together.

    Attributes:
        rows: `[rows]` what the rows are to the caller, such as their numbers in a window.
        lengths: `[rows]` their tokens.
        hidden: their hidden states.
        state: what the rule remembers of them.
        keep: positions in the group of the rows that go on; None if all do.
    """

    rows: NDArray[Any]
    lengths: NDArray[np.intp]
    hidden: Hidden[B]
    state: PatienceState
    keep: RowNumbers | None = None

    @property
    def going(self) -> RowNumbers:
        """Positions of the rows that go on."""
        return np.arange(len(self.rows)) if self.keep is None else self.keep


def not_finite(target: str, exit_number: int) -> BackendError:
    """The error for logits that are NaN or infinite, from which no label or exit can follow."""
    return BackendError(
        f"target {target} gives logits that are not finite numbers at exit {exit_number}",
        "check the engines folder, or choose another `target`",
    )


@dataclass(eq=False)
class Chain(Generic[B]):
    """The chain of segments, for one call in a `with` statement.

    Args:
        backend: its pool lends what runs segments, when the first row needs it.
        limits: the shapes that it runs.
        exit_0: the classifier before layer 1; None: there is none.
    """

    backend: Backend[B]
    limits: Limits
    exit_0: ExitZero | None = None
    _lent: Execution[B] | None = field(default=None, init=False)

    @property  # up to Python 3.11, one lock of a cached_property would make all chains wait
    def execution(self) -> Execution[B]:
        """What runs segments."""
        if self._lent is None:
            self._lent = self.backend.check_out()
        return self._lent

    def __enter__(self) -> Chain[B]:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            self.backend.give_back(lent, failed=error is not None)

    def run(
        self, rows: Sequence[EncodedRow], runner: RuleRunner, deadline: float = math.inf
    ) -> WindowResult:
        """Run rows until the rule or the deadline has stopped all of them.

        Args:
            rows: the window, at least one row.
            runner: the rule.
            deadline: when the answers should be there, in seconds of `perf_counter`. Rows that
                would miss it if the next segment took as long as the one before it stop at the
                exit that they have reached. Without exit 0, the first segment always runs.

        Raises:
            BackendError: a row is longer than the target takes, or the logits at an exit that it
                reached are not finite.
        """
        return _Window(self, rows, runner, deadline).run()

    def bucket(self, rows: int, longest: int, alone: bool = False) -> Bucket:
        """The padded shape of a group, see `Limits.bucket`.

        Raises:
            BackendError: the row is longer than the target takes.
        """
        if longest > self.limits.max_sequence:
            raise BackendError(
                f"a row has {longest} tokens; this target takes {self.limits.max_sequence}",
                "give a smaller `max_length`, or build the target for longer rows",
            )
        return self.limits.bucket(rows, longest, alone)

    def begin(
        self, encoded: Sequence[EncodedRow], rows: NDArray[Any], state: PatienceState
    ) -> Group[B]:
        """A group before segment 1.

        Args:
            encoded: the rows, at least one and as many as fit into a group.
            rows: `[rows]` what the caller calls them.
            state: what the rule remembers of them.

        Raises:
            BackendError: a row is longer than the target takes.
        """
        count, lengths = len(encoded), np.array([len(row) for row in encoded], np.intp)
        bucket = self.bucket(count, int(lengths.max()), alone=count == 1)
        return Group(rows, lengths, self.execution.begin(encoded, bucket), state)

    def plan(self, groups: Sequence[Group[B]]) -> list[list[Group[B]]]:
        """The groups to `join`, where the backend joins groups; those without rows are released.

        Args:
            groups: groups before the same segment, with the same rule.
        """
        alive = []
        for group in groups:
            if group.keep is None or len(group.keep):
                alive.append(group)
            else:
                self.execution.release(group.hidden)
        if not self.backend.joins:
            return [[group] for group in alive]
        lengths = [group.lengths[group.going].tolist() for group in alive]
        return [[alive[at] for at in part] for part in plan_joins(lengths, self.limits)]

    def has_room(self, parts: Sequence[Group[B]]) -> bool:
        """Whether another row fits into a group that is joined from these."""
        lengths = np.concatenate([part.lengths[part.going] for part in parts])
        return fits(len(lengths) + 1, int(lengths.max()), self.limits)

    def join(self, parts: Sequence[Group[B]]) -> Group[B]:
        """Make one group of the rows that go on."""
        if len(parts) == 1 and parts[0].keep is None:
            return parts[0]
        keeps = [part.going for part in parts]
        lengths = np.concatenate([part.lengths[part.going] for part in parts])
        bucket = self.bucket(len(lengths), int(lengths.max()))
        hidden = self.execution.regroup([part.hidden for part in parts], keeps, bucket)
        for part in parts:
            self.execution.release(part.hidden)
        state = PatienceState.join([part.state.take(part.going) for part in parts])
        rows = np.concatenate([part.rows[part.going] for part in parts])
        return Group(rows, lengths, hidden, state)

    def time_exits(self, rows: int, tokens: int) -> list[float]:
        """Time the way from each exit to the next once; see `Engine.time_exits`."""
        bucket, ids = self.bucket(rows, tokens), np.zeros(tokens, np.int64)
        made_up, times = [EncodedRow(ids, ids, truncated=False)] * rows, []
        if self.exit_0 is not None:
            started = perf_counter()
            self.exit_0(made_up)
            times.append(perf_counter() - started)
        hidden = self.execution.begin(made_up, bucket)
        for segment in range(self.backend.segments):
            started = perf_counter()
            self.execution.enqueue(segment, hidden).result()
            times.append(perf_counter() - started)
        self.execution.release(hidden)
        return times


@dataclass(eq=False)
class _Window(Generic[B]):
    """A window of several rows on its way through the chain; see `Chain.run`."""

    _chain: Chain[B]
    _rows: Sequence[EncodedRow]
    _runner: RuleRunner
    _deadline: float

    def __post_init__(self) -> None:
        chain, rows, runner = self._chain, self._rows, self._runner
        self._lengths = np.array([len(row) for row in rows], np.intp)
        self._exits = np.zeros(len(rows), np.int64)
        shape = len(runner.exits), len(rows), chain.backend.labels
        self._logits = np.full(shape, np.nan, np.float32)
        self._limited = np.zeros(len(rows), np.bool_)
        self._decided = perf_counter()  # when a segment was last read
        going, state = np.arange(len(rows)), runner.start(len(rows))
        if chain.exit_0 is not None:
            stops = self._decide(0, going, state, chain.exit_0(rows))
            if stops is not None:
                going = np.flatnonzero(~stops)
                state = state.take(going)
        groups = make_groups(self._lengths[going], chain.limits) if len(going) else []
        self._parts = [(going[places], state.take(places)) for places in groups]

    def run(self) -> WindowResult:
        """Run all groups until every row has stopped."""
        if self._parts:
            self._execution = self._chain.execution
            groups = map(self._begin, self._parts)
            if len(self._parts) == 1 and self._execution.lookahead:
                self._run_ahead(next(groups))
            else:
                self._run_groups(groups)
        return WindowResult(self._exits, self._logits, self._runner.exits[0], self._limited)

    def _begin(self, part: tuple[RowNumbers, PatienceState]) -> Group[B]:
        rows, state = part
        return self._chain.begin([self._rows[row] for row in rows], rows, state)

    def _run_groups(self, ready: Iterable[Group[B]]) -> None:
        """Read the exits of groups in turn, and enqueue the next segment of each at once.

        A device thus always has the other groups to run. A group that has room for more rows waits
        until the next one has been read, which it may be joined with. A group that is left alone
        looks ahead.
        """
        chain = self._chain
        running: deque[tuple[Group[B], Pending]] = deque()
        waiting: list[Group[B]] = []
        while True:
            for group in ready:
                pending = self._execution.enqueue(group.hidden.segment, group.hidden)
                running.append((group, pending))
            if not running:
                return
            group, pending = running.popleft()
            exit_number = group.hidden.segment
            stops = self._decide(exit_number, group.rows, group.state, pending.result()[LOGITS])
            if stops is not None:
                group.keep = np.flatnonzero(~stops)
            is_last = not running or running[0][0].hidden.segment > exit_number
            may_join = chain.backend.joins and not is_last
            ready = [group]
            if stops is not None or waiting or may_join:
                plan, waiting = chain.plan([*waiting, group]), []
                if may_join and plan and chain.has_room(plan[-1]):
                    waiting = plan.pop()
                ready = [chain.join(parts) for parts in plan]
            if not running and len(ready) == 1 and self._execution.lookahead:
                self._run_ahead(ready[0])
                return

    def _run_ahead(self, group: Group[B]) -> None:
        """Run one group, and enqueue each segment before reading the exit before it.

        The device therefore never waits for the rule. A row that stops has run one segment more
        than necessary.

        Three arrays hold the positions of the remaining rows. For example, of the rows a, b and c,
        row b stops at exit 1, after segment 2 has been enqueued for all three. Then:

        - `ahead_at` is [0, 2], where a and c are in the outputs of segment 2. It becomes `read_at`
          when these outputs are read.
        - `hidden_at` is [0, 1] if the group is regrouped without b, otherwise [0, 2].
        """
        rows, hidden, state = group.rows, group.hidden, group.state
        first = hidden.segment
        pending = self._execution.enqueue(first, hidden)
        read_at = hidden_at = np.arange(len(rows))
        unread = None  # the buffers before regrouping, until the outputs in them are read
        segments = self._chain.backend.segments
        for segment in range(first, segments):
            ahead, ahead_at = pending, hidden_at
            if segment + 1 < segments:
                ahead = self._execution.enqueue(segment + 1, hidden)
            logits = pending.result()[LOGITS][read_at]
            if unread is not None:
                self._execution.release(unread)
                unread = None
            stops = self._decide(segment + 1, rows, state, logits)
            if stops is not None:
                keep = np.flatnonzero(~stops)
                if not len(keep):
                    break
                rows, state = rows[keep], state.take(keep)
                hidden_at, ahead_at = hidden_at[keep], ahead_at[keep]
                bucket = self._chain.bucket(len(rows), int(self._lengths[rows].max()))
                tokens, fewer = (each.batch * each.sequence for each in (hidden.bucket, bucket))
                if 2 * fewer <= tokens and segment + 2 < segments:  # else a copy does not pay
                    unread = hidden
                    hidden = self._execution.regroup([hidden], [hidden_at], bucket)
                    hidden_at = np.arange(len(rows))
            pending, read_at = ahead, ahead_at
        self._execution.release(hidden)

    def _decide(
        self, exit_number: int, rows: RowNumbers, state: PatienceState, logits: NDArray[np.float32]
    ) -> NDArray[np.bool_] | None:
        """Record the logits of some rows at an exit, and apply rule and deadline to them.

        Returns:
            `[rows]` bool, which of them stop; None if no row does.
        """
        if not np.isfinite(logits).all():
            raise not_finite(self._chain.backend.name, exit_number)
        self._logits[self._runner.exits.index(exit_number), rows] = logits
        stops, _ = self._runner.decide(exit_number, state, logits.astype(np.float64))
        before, self._decided = self._decided, perf_counter()
        if 2 * self._decided - before > self._deadline:  # another segment takes as long
            limited = np.ones(len(rows), np.bool_) if stops is None else ~stops
            self._limited[rows[limited]] = True
            stops = np.ones(len(rows), np.bool_)
        if stops is not None:
            self._exits[rows[stops]] = exit_number
        return stops
