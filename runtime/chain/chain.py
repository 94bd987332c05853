"""The chain: exit 0, then segment and rule, segment and rule, until every row has stopped."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..backends.base import Backend, Execution
from ..backends.buffers import Bucket
from ..encoding import EncodedRow
from ..errors import BackendError, FpabeeError
from ..predictions import Trace
from ..rules.measures import Mask
from ..rules.settling import Settled
from .groups import Group, RowNumbers, Running, fits, split
from .route import Route

logger = logging.getLogger(__name__)

_NONE: RowNumbers = np.zeros(0, np.intp)


class Decision(NamedTuple):
    """The outcome of an exit for the rows of a group.

    Attributes:
        group: the group, which has only the rows that go on.
        exit: the number of the exit.
        rows: `[rows]` the rows that have passed the exit, as the caller calls them.
        logits: `[rows, labels]` float32 of these rows at the exit.
        settled: the rows that have their answers now, of this group or another one; None: there
            are none, or nobody waits for them.
        failed: `[rows]` further rows, whose logits are not finite numbers, and which have left.
        target: the target that gave the logits.
    """

    group: Group
    exit: int
    rows: NDArray[Any]
    logits: NDArray[np.float32]
    settled: Settled | None = None
    failed: NDArray[Any] = _NONE
    target: str = ""


@dataclass(eq=False)
class Chain:
    """The chain of segments, for one caller at a time, in a `with` statement.

    A caller makes groups and takes steps. A step starts the next segment of a group; as soon as
    as many segments run as the backend can have in flight, it also waits for the oldest one and
    applies the rule to its exit. On a CPU that is one segment. On a device it is two, of different
    groups, so that the device runs one while the rule is applied to the other.

    Rows that are still in doubt at the last exit of a leg start again, as rows of the next one.

    Args:
        exit_0: gives the logits `[rows, labels]` before layer 1; None: there is no exit 0.
        full_depth: the route of watched rows after their answer; None: no rows are watched.
        clock: the time in seconds, of deadlines too.

    Attributes:
        running: the groups whose segments run, oldest first.
        watched: groups of answered rows that run on, see `next_watched`.
        seconds: how long the last segment took.
        current: the group that an error of a step belongs to.
    """

    exit_0: Callable[[Sequence[EncodedRow]], NDArray[np.float32]] | None = None
    full_depth: Route | None = None
    clock: Callable[[], float] = perf_counter
    running: deque[Group] = field(default_factory=deque, init=False)
    watched: list[Group] = field(default_factory=list, init=False)
    seconds: float = field(default=0.0, init=False)
    current: Group | None = field(default=None, init=False)
    _finished: float = field(default=0.0, init=False)
    _seconds_of: dict[Backend, float] = field(default_factory=dict, init=False)
    _lent: dict[Backend, Execution] = field(default_factory=dict, init=False)

    def execution(self, group: Group) -> Execution:
        """The execution that runs the segments of a group, borrowed on first use."""
        backend = group.legs[0].backend
        if backend not in self._lent:
            self.borrow(group)
        return self._lent[backend]

    def borrow(self, group: Group) -> None:
        """Borrow what runs the legs of a group; this may wait for it, see `Backend.check_out`."""
        # The exact pass first: every route of an engine ends with it, so no call waits for it while
        # it has what runs a quick pass. Two calls that each have what the other one waits for would
        # wait for ever.
        for leg in group.legs[::-1]:
            if leg.backend not in self._lent:
                self._lent[leg.backend] = leg.backend.check_out()

    @property
    def gives_way(self) -> bool:
        """Whether another call waits for what this one has borrowed."""
        return any(backend.is_awaited for backend in self._lent)

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for group in [*self.watched]:
            group.lose_watched()
            if error is None:
                self.drop(group)
        lent = self._lent
        self._lent = {}
        for backend, execution in lent.items():
            backend.give_back(execution, failed=error is not None)

    def run(self, window: Group) -> Iterator[Decision]:
        """Run rows until all of them have stopped; then those of them that are watched run on.

        Args:
            window: any number of rows. They are split into groups of similar length, and each
                group takes a segment in turn. Rows in doubt wait until all others have stopped,
                because few rows take nearly as long as many.

        Yields:
            The decision about each group at each exit.

        Raises:
            BackendError: the library or the device failed, or logits are not finite.
            ArtifactError: a segment is loaded now, and is missing or damaged.
        """
        yield from map(_sound, self.ask_exit_0(window))
        waiting = deque(_parts(window))
        in_doubt: list[Group] = []
        while waiting or self.running or in_doubt or self.watched:
            if in_doubt and not waiting and not self.running:
                in_doubt[0].add(in_doubt[1:])
                self.let_go(in_doubt[0])  # what others have decided since
                waiting.extend(_parts(in_doubt[0]))
                in_doubt = []
                continue
            group = self._next(waiting)
            if group is None and not self.running:
                group = self.next_watched()
            if group is not None:
                self.let_go(group)
                if len(group):
                    # Before the next line, because rows may be late after a wait.
                    self.borrow(group)
                if (late := self.stop_late(group)) is not None:
                    yield Decision(group, group.exit, late.rows[:0], late.logits[:0], late)
                if not len(group):
                    continue
            try:
                decision = self.step(group)
            except FpabeeError as error:
                if self.current is None or not self.current.is_answered:
                    raise
                self.lose(self.current, error, waiting)
                continue
            if decision is not None:
                yield _sound(decision)
                if len(decision.group) and not decision.group.is_answered:
                    goes_on = waiting if decision.group.hidden is not None else in_doubt
                    goes_on.append(decision.group)

    def trace(self, rows: Sequence[EncodedRow], route: Route) -> Trace:
        """Run rows, and keep the logits of all exits that they reach.

        Args:
            rows: any number of rows.
            route: how they run; `Route.whole` shows every row all exits.

        Raises:
            RuleError: the rule compares rows.
            FpabeeError: as in `run`.
        """
        route.runner.check_alone()
        first = route.exits.first
        logits = np.full((len(route.exits), len(rows), len(route.task.labels)), np.nan, np.float32)
        exits = np.full(len(rows), first, np.int64)
        for decision in self.run(Group.of(np.arange(len(rows)), rows, route, math.inf)):
            logits[decision.exit - first, decision.rows] = decision.logits
            if (settled := decision.settled) is not None:
                exits[settled.rows] = settled.exits
        at_exit = logits[exits - first, np.arange(len(rows))]
        lengths = np.array([len(row) for row in rows], np.intp)
        return Trace(logits, exits, route.task.outputs(at_exit).answers, lengths, first)

    def _next(self, waiting: deque[Group]) -> Group | None:
        """The group that takes the next step; None if all run, or it waits for others to join."""
        if not waiting:
            return None
        first = waiting[0]
        if first.legs[0].backend.joins and first.hidden is not None:
            same = [group for group in waiting if group.step == first.step]
            rows = sum(map(len, same))
            longest = max(int(group.lengths.max()) for group in same)
            others_come = any(group.step == first.step for group in self.running)
            if others_come and fits(rows + 1, longest, first.limits):
                return None
            self.join(first, same[1:])
        return waiting.popleft()

    def next_watched(self) -> Group | None:
        """The group of answered rows that takes the next step; None if there is none.

        Callers ask for it when no other rows are left. The rows that have the longest way to go run
        first, so that others can join them.
        """
        ready = [group for group in self.watched if group.running is None]
        if not ready:
            return None
        first = min(ready, key=lambda group: group.segment)
        if first.hidden is not None:
            same = [group for group in ready if group.step == first.step]
            self.join(first, [group for group in same if group is not first])
        return first

    def step(self, group: Group | None) -> Decision | None:
        """Start the next segment of a group, and finish the oldest one if enough are in flight.

        Args:
            group: the group, none of whose segments runs; None: only finish a segment.

        Returns:
            The decision about the group whose segment is finished; None: none was finished.

        Raises:
            BackendError: the library or the device failed. The error belongs to `current`.
            ArtifactError: as in `run`.
        """
        if group is not None:
            self.enqueue(group)
            if len(self.running) < group.legs[0].backend.in_flight:
                return None
        return self.finish() if self.running else None

    def soon(self, groups: Sequence[Group]) -> float:
        """When one more segment of each group is done, if it takes as long as the last of its pass.

        Before the first segment of a pass, it is the last one of any pass.

        Args:
            groups: some groups, each as often as one of its segments runs.
        """
        backends = (group.legs[0].backend for group in (*self.running, *groups))
        return self.clock() + sum(self._seconds_of.get(each, self.seconds) for each in backends)

    def ask_exit_0(self, group: Group) -> list[Decision]:
        """Apply the rule at exit 0 to new rows; no decision if the model has no exit 0."""
        if self.exit_0 is None or not len(group):
            return []
        return [self._decide(group, 0, self.exit_0(group.encoded.tolist()))]

    def let_go(self, group: Group) -> None:
        """Drop the rows of a group that go on no further, because others have decided so."""
        going = group.route.runner.goes_on(group.state)
        if going is not None and len(group):
            self.keep(group, going)

    def stop_late(self, group: Group) -> Settled | None:
        """Stop the rows that would miss their deadline while another segment runs.

        They are answered at the last exit that they have reached. Rows that have not reached an
        exit go on.

        Returns:
            The rows that have their answers now; None: no row is late.
        """
        self.current = group
        earliest = group.earliest
        if earliest == math.inf or not group.state.has_exit:
            return None
        soon = self.soon([group] * group.legs[0].segments_to_exit(group.segment))
        if earliest >= soon:
            return None
        late = np.flatnonzero(group.deadlines < soon)
        settled = group.route.runner.stop(group.exit, group.state, group.rows, late)
        self.keep(group, group.deadlines >= soon)
        return settled

    def join(self, group: Group, others: Sequence[Group]) -> None:
        """Take the rows of other groups into a group, as far as they fit.

        A device runs full groups most efficiently. A CPU gains almost nothing, so nothing is
        joined there.

        Args:
            group: the group.
            others: groups of the same route and the same step that run no segment now. Those whose
                rows are taken are empty afterwards.
        """
        self.current = group
        if not group.legs[0].backend.joins:
            return
        taken = []
        rows = len(group)
        longest = int(group.lengths.max())
        for other in others:
            rows_of_both = rows + len(other)
            longest_of_both = max(longest, int(other.lengths.max()))
            if fits(rows_of_both, longest_of_both, group.limits):
                taken.append(other)
                rows = rows_of_both
                longest = longest_of_both
        if taken:
            self._gather([group, *taken])
            group.add(taken)
            for other in taken:
                self.keep(other, np.zeros(len(other), np.bool_))

    def lose(self, group: Group, error: Exception, others: Iterable[Group]) -> None:
        """Drop a group that an error of a step belongs to, so that others can go on.

        Args:
            group: the group.
            error: the error, which is logged if the rows of the group were answered before.
            others: the groups of the caller that go on.
        """
        group.lose_watched()
        if group.is_answered:
            logger.error("watched rows failed after their answer", exc_info=error)
        self.drop(group)
        going = [each.hidden for each in (*others, *self.running, *self.watched)]
        hiddens = [hidden for hidden in going if hidden is not None]
        for execution in self._lent.values():
            execution.recover(hiddens)

    def keep(self, group: Group, rows: Mask) -> None:
        """Drop the other rows of a group, and free the group if none is left."""
        places = rows.nonzero()[0]
        if len(places):
            group.keep(places)
        else:
            self.drop(group)

    def drop(self, group: Group) -> None:
        """Free a group, which has no rows afterwards; nobody waits for its segment that runs."""
        if group.running is not None:
            self.running.remove(group)
            group.running = None
        if group.hidden is not None:
            self._free(group)
        if group in self.watched:
            self.watched.remove(group)
        group.rows = group.rows[:0].copy()  # not a view, which would hold the rows
        group.watched = group.watched[:0].copy()
        group.lengths = group.lengths[:0]
        group.deadlines = group.deadlines[:0]
        group.encoded = group.encoded[:0]

    def _free(self, group: Group) -> None:
        """Free the hidden states of a group, which has some."""
        assert group.hidden is not None
        self.execution(group).release(group.hidden)
        group.hidden = None

    def enqueue(self, group: Group) -> None:
        """Start the next segment of a group, without the rows that have stopped."""
        self.current = group
        if group.hidden is None:
            bucket = self._bucket([group], alone=len(group) == 1)
            group.hidden = self.execution(group).begin(group.encoded.tolist(), bucket)
            group.places = np.arange(len(group))
            if group.legs[0] is group.route.legs[-1]:
                group.encoded = group.encoded[:0]
        elif len(group) < group.hidden.rows:
            self._gather([group])
        started = self.clock()
        group.running = Running(self.execution(group).enqueue(group.hidden), started)
        self.running.append(group)

    def finish(self) -> Decision:
        """Wait for the oldest segment that runs, and apply the rule to its exit, if it has one."""
        group = self.running.popleft()
        self.current = group
        running = group.running
        assert running is not None
        group.running = None
        logits = running.outputs()[group.places]
        for backend in self._lent:
            backend.progressed()
        now = self.clock()
        # A device runs one segment after another.
        self.seconds = now - max(running.started, self._finished)
        self._finished = now
        assert group.hidden is not None
        leg = group.legs[0]
        self._seconds_of[leg.backend] = self.seconds
        segments = group.hidden.segment
        exit_number = leg.exit_after(segments)
        if segments <= leg.silent:
            return Decision(group, exit_number, group.rows[:0], logits[:0])
        decision = self._decide(group, exit_number, logits)
        if segments == leg.backend.segments and len(group):
            self._free(group)  # in doubt at the end of the leg
            group.legs = group.legs[1:]
        return decision

    def _decide(self, group: Group, exit_number: int, logits: NDArray[np.float32]) -> Decision:
        failed: NDArray[Any] = _NONE
        finite = np.isfinite(logits)
        if not np.logical_and.reduce(finite, axis=None):
            sound = np.logical_and.reduce(finite, axis=1)
            failed = group.rows[~sound]
            for row in group.watched_in(np.flatnonzero(~sound)).values():
                row.lost()
            self.keep(group, sound)
            logits = logits[sound]
            if not len(group):
                group.state = group.state.take(_NONE)
        rows = group.rows
        settled, going = group.route.runner.settle(exit_number, group.state, rows, logits)
        if going is not None:
            self._watch(group, exit_number, logits, (~going).nonzero()[0])
            self.keep(group, going)
        if group.is_answered:  # nobody waits for them
            settled = None
            failed = _NONE
        target = group.legs[0].backend.name
        return Decision(group, exit_number, rows, logits, settled, failed, target)

    def _watch(
        self,
        group: Group,
        exit_number: int,
        logits: NDArray[np.float32],
        stopped: RowNumbers,
    ) -> None:
        """Tell watched rows that they have stopped; those that are answered now run on."""
        watched = group.watched_in(stopped)
        run_on = [n for n, row in watched.items() if row.stopped(exit_number, logits[n])]
        if not run_on:
            return
        assert self.full_depth is not None
        places = np.array(run_on)
        part = group.take(places)
        part.route = self.full_depth
        part.legs = self.full_depth.legs
        part.is_answered = True
        if group.hidden is None or group.legs[0].backend is not part.legs[0].backend:
            self.watched += _parts(part)
        else:
            places = group.places[places]
            bucket = self._bucket([part])
            try:
                part.hidden = self.execution(part).regroup([group.hidden], [places], bucket)
            except BackendError as error:  # such as too little memory; the answers are there
                logger.error("watched rows cannot run on", exc_info=error)
                part.lose_watched()
                return
            part.places = np.arange(len(part))
            self.watched.append(part)

    def _gather(self, groups: Sequence[Group]) -> None:
        """Copy the rows of groups into new hidden states, which belong to the first one."""
        first = groups[0]
        hiddens = [group.hidden for group in groups if group.hidden is not None]
        places = [group.places for group in groups]
        execution = self.execution(first)
        first.hidden = execution.regroup(hiddens, places, self._bucket(groups))
        first.places = np.arange(sum(map(len, places)))
        execution.release(hiddens[0])

    def _bucket(self, groups: Sequence[Group], alone: bool = False) -> Bucket:
        longest = max(int(group.lengths.max()) for group in groups)
        return groups[0].legs[0].limits.bucket(sum(map(len, groups)), longest, alone)


def _parts(group: Group) -> list[Group]:
    """A group that has not begun a leg, divided into groups of similar length that may run."""
    parts = split(group.lengths, group.limits)
    return [group] if len(parts) == 1 else [group.take(part) for part in parts]


def _sound(decision: Decision) -> Decision:
    """A decision none of whose rows has failed.

    Raises:
        BackendError: the logits of a row are not finite.
    """
    if len(decision.failed):
        raise not_finite(decision.target, decision.exit)
    return decision


def not_finite(target: str, exit_number: int) -> BackendError:
    """The error for logits that are NaN or infinite, from which no label or exit can follow."""
    return BackendError(
        f"target {target} gives logits that are not finite numbers at exit {exit_number}",
        "check the engines folder, or choose another `target`",
    )
