"""The scheduler: rows of different callers share the chain, and each is answered at its exit."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..artifact.manifest import LOGITS
from ..backends.backend import Pending
from ..backends.shapes import Limits
from ..batching import fits
from ..chain import Chain, Group, not_finite
from ..encoding import EncodedRow, Text, characters
from ..engine import Engine
from ..errors import BackendError, InputError, OverloadedError, seconds_of, whole_number
from ..results import Prediction
from ..rules.runner import PatienceState, RuleRunner

if TYPE_CHECKING:
    from .metrics import Metrics

_MOST_ROWS = 1000
# Longer texts of a request are tokenized in another thread than that of the event loop. It is one
# thread for all requests, so that the memory which this takes does not grow with their number.
_SHORT_CHARACTERS = 20_000
# Rows of up to so many tokens are padded to one another: a call takes about as long as so many.
_SHORT_TOKENS = 16


@dataclass(slots=True, eq=False)
class _Row:
    """A row that is not answered yet.

    Attributes:
        encoded: its tokens.
        runner: its rule.
        last: the exit at which it stops at the latest.
        future: its answer.
        arrived: when it was submitted, in seconds of `perf_counter`.
        deadline: when it should be answered, in the same seconds.
        at_exit_0: its logits there, `[labels]`, if the model has exit 0.
    """

    encoded: EncodedRow
    runner: RuleRunner
    last: int
    future: Future[Prediction]
    arrived: float
    deadline: float
    at_exit_0: NDArray[np.float32] | None = None


class Scheduler:
    """Answers the texts of many callers with one engine. Thread-safe; a context manager.

    Rows of different callers run together. New rows join between two segments, and each row is
    answered as soon as it stops. Answers are those of `Engine.predict`, within the target's
    tolerance. One thread runs the segments. If a group fails, all of its rows get the error; a row
    whose logits are not finite numbers gets an error alone.

    Args:
        engine: the engine, which the scheduler does not close.
        max_rows: most rows that are unanswered at a time, tokenization included; more are refused.
        metrics: count what happens.

    Raises:
        InputError: `max_rows` is not a whole number from 1.

    Example:
        ```python
        from fpabee.runtime import Engine
        from fpabee.runtime.serving import Scheduler

        with Engine.load("engines/") as engine, Scheduler(engine) as scheduler:
            answers = [scheduler.submit(text) for text in ("play some jazz", "wake me at six")]
            print([answer.result().labels for answer in answers])
        ```
    """

    def __init__(
        self, engine: Engine, max_rows: int = _MOST_ROWS, metrics: Metrics | None = None
    ) -> None:
        self._engine, self._model = engine, engine.model
        self._runner = self._model.runner(engine.rule)
        self._most = whole_number("max_rows", max_rows, InputError)
        self._metrics = metrics
        self._changed = threading.Condition()
        self._arrived: list[_Row] = []
        self._unanswered = 0
        self._closed = self._cancels = False
        self._tokenizer = ThreadPoolExecutor(1, "fpabee tokenizer")
        # What follows belongs to the worker thread.
        self._waiting: list[_Row] = []
        self._groups: list[Group[Any]] = []
        # With the number of the exit, and with when the segment was started.
        self._unread = deque[tuple[Group[Any], int, Pending, float]]()
        self._running: list[_Row] = []
        self._read_at = 0.0
        self._seconds = 0.0  # of a segment; each counts half as much as the one after it
        self._thread = threading.Thread(target=self._work, name="fpabee scheduler", daemon=True)
        self._thread.start()

    def submit(
        self, text: Text, deadline_ms: float | None = None, max_exit: int | None = None
    ) -> Future[Prediction]:
        """Queue a text.

        Args:
            text: a string, or a (text, text_pair) tuple.
            deadline_ms: milliseconds from now, tokenization included. A row that would miss it if
                another segment took as long as the last ones is answered at the exit that it has
                reached, and marked as in `Engine.predict`. There is always an answer, if need be a
                late one.
            max_exit: the row stops at this exit at the latest.

        Returns:
            A future of the answer. Its `cancel` takes the row out of the queue, or out of its group
            before the next segment. If the row cannot be answered, `result` raises the error
            that `predict` would raise.

        Raises:
            InputError: it is neither a text nor a pair, or the deadline is not a number.
            RuleError: `max_exit` does not fit the model.
            BackendError: the scheduler or the engine is closed, or the row is longer than the
                target takes, or the scheduler was made before this process was forked.
            OverloadedError: the queue is full.
        """
        return self.submit_all([text], deadline_ms, max_exit)[0]

    def submit_all(
        self,
        texts: Sequence[Text],
        deadline_ms: float | None = None,
        max_exit: int | None = None,
    ) -> list[Future[Prediction]]:
        """Queue several texts, or none of them if one is refused; see `submit`."""
        arrived = perf_counter()
        with self._accepted(len(texts)) as futures:
            self._queue(futures, self._engine.encode(texts), deadline_ms, max_exit, arrived)
        return futures

    async def classify(
        self,
        texts: Sequence[Text],
        deadline_ms: float | None = None,
        max_exit: int | None = None,
        check: Callable[[Sequence[EncodedRow]], object] | None = None,
    ) -> list[Prediction]:
        """Classify texts in asyncio; the other arguments and the errors are those of `submit`.

        Long texts do not keep the event loop waiting.

        Args:
            texts: as in `submit_all`.
            deadline_ms: as in `submit`.
            max_exit: as in `submit`.
            check: is called with the tokenized texts before they are queued, and may raise an
                error.

        Returns:
            One prediction for each text, in the same order. Cancelling this cancels the rows.
        """
        arrived = perf_counter()
        with self._accepted(len(texts)) as futures:
            rows = await self._encode(texts)
            if check is not None:
                check(rows)
            self._queue(futures, rows, deadline_ms, max_exit, arrived)
            return await asyncio.gather(*map(asyncio.wrap_future, futures))

    @property
    def is_closed(self) -> bool:
        """Whether new rows are refused."""
        return self._closed

    def close(self, cancel: bool = False) -> None:
        """Refuse new rows, and return when the others are answered.

        Args:
            cancel: cancel them instead; only the segment that runs is waited for.
        """
        with self._changed:
            self._closed = True
            self._cancels |= cancel
            self._changed.notify()
        self._thread.join()
        self._tokenizer.shutdown(wait=False, cancel_futures=cancel)

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError("this scheduler is closed", "make another one")
        if not self._thread.is_alive():  # a fork copies no threads
            raise BackendError(
                "this scheduler was made before this process was forked, and does not run in it",
                "load an engine and make a scheduler after the fork",
            )

    @contextmanager
    def _accepted(self, rows: int) -> Iterator[list[Future[Prediction]]]:
        """The futures of new rows, which count as unanswered from now on; an error cancels them."""
        self._check_open()  # before the lock, which a fork may have copied while it was held
        with self._changed:
            if self._unanswered + rows > self._most:
                if self._metrics is not None:
                    self._metrics.refused(rows)
                raise OverloadedError(
                    f"{self._unanswered} of at most {self._most} rows are unanswered, and "
                    f"{rows} more were submitted",
                    "try again later, submit fewer rows at a time, or raise `max_rows`",
                )
            self._unanswered += rows
        futures: list[Future[Prediction]] = [Future() for _ in range(rows)]
        for future in futures:
            future.add_done_callback(self._forget)
        try:
            yield futures
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    async def _encode(self, texts: Sequence[Text]) -> list[EncodedRow]:
        if sum(map(characters, texts)) <= _SHORT_CHARACTERS:
            return self._engine.encode(texts)
        with self._changed:
            self._check_open()  # a pool that is shut down takes nothing
            tokenized = self._tokenizer.submit(self._engine.encode, texts)
        return await asyncio.wrap_future(tokenized)

    def _queue(
        self,
        futures: Sequence[Future[Prediction]],
        encoded: Sequence[EncodedRow],
        deadline_ms: float | None,
        max_exit: int | None,
        arrived: float,
    ) -> None:
        """Hand accepted rows to the worker."""
        ends = math.inf if deadline_ms is None else arrived + seconds_of("deadline_ms", deadline_ms)
        rule, runner = self._engine.rule, self._runner
        if runner.rule is not rule:  # rows of one runner run together
            runner = self._runner = self._model.runner(rule)
        last = runner.last
        if max_exit is not None:
            last = self._model.runner(rule.capped(max_exit)).last
        chain = self._model.chain()
        for row in encoded:
            chain.bucket(1, len(row))
        queued = [
            _Row(row, runner, last, future, arrived, ends)
            for row, future in zip(encoded, futures, strict=True)
        ]
        with self._changed:
            self._check_open()
            self._arrived += queued
            self._changed.notify()

    def _forget(self, future: Future[Prediction]) -> None:
        if future.cancelled():
            future.set_running_or_notify_cancel()  # `concurrent.futures.wait` waits for this
        with self._changed:
            self._unanswered -= 1

    def _work(self) -> None:
        while self._wait():
            try:
                with self._model.chain() as chain:
                    while self._waiting or self._groups or self._arrived:
                        self._try_step(chain)
            except Exception as error:  # noqa: BLE001 - it belongs to all rows
                with self._changed:
                    rows, self._arrived = self._arrived + self._waiting, []
                self._fail([*rows, *(row for group in self._groups for row in group.rows)], error)
                self._waiting, self._groups, self._unread = [], [], deque()

    def _wait(self) -> bool:
        """Wait for rows; False when the scheduler is closed and has answered all."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._waiting or self._closed)
            return bool(self._arrived or self._waiting)

    def _try_step(self, chain: Chain[Any]) -> None:
        """Take a step. If a group fails, its rows get the error, and the others go on."""
        self._running = []  # rows to which an error belongs
        try:
            self._step(chain)
        except Exception as error:
            if not self._running:
                raise
            failed = set(self._running)
            lost = [group for group in self._groups if not failed.isdisjoint(group.rows)]
            self._groups = [group for group in self._groups if group not in lost]
            self._unread = deque(unread for unread in self._unread if unread[0] not in lost)
            self._fail(failed.union(*(group.rows for group in lost)), error)
            chain.execution.recover([group.hidden for group in self._groups])

    def _step(self, chain: Chain[Any]) -> None:
        """Take new rows, start a segment of one group, and read the segment that started first.

        A device gets its next segment before this one is read, so that it does not wait for us.
        """
        self._admit(chain)
        if self._cancels:
            for row in (*self._waiting, *(row for group in self._groups for row in group.rows)):
                row.future.cancel()
        self._answer_late()
        self._waiting = [row for row in self._waiting if not row.future.done()]
        self._regroup(chain)
        group = self._choose(chain) or self._ahead()
        if group is not None:
            self._running, started = list(group.rows), perf_counter()
            if self._metrics is not None:
                self._metrics.ran(len(group.rows))
                if group.hidden.segment == 0:
                    self._metrics.started([started - row.arrived for row in self._running])
            pending = chain.execution.enqueue(group.hidden.segment, group.hidden)
            self._unread.append((group, group.hidden.segment, pending, started))
            if chain.execution.lookahead and len(self._unread) == 1:
                return
        if self._unread:
            self._read()

    def _ahead(self) -> Group[Any] | None:
        """The group that runs, if it can run one more segment before this one is read."""
        if not self._unread:
            return None
        group, exit_number, *_ = self._unread[0]
        soon = self._after(1 + len(self._unread))
        if any(row.future.done() or row.deadline < soon for row in group.rows):
            return None
        return group if max(row.last for row in group.rows) > exit_number else None

    def _ready(self) -> list[Group[Any]]:
        """The groups whose rows have all been read."""
        return [group for group in self._groups if not self._is_unread(group)]

    def _is_unread(self, group: Group[Any]) -> bool:
        return any(unread is group for unread, *_ in self._unread)

    def _read(self) -> None:
        """Answer the rows that stop at the exit of the segment that started first."""
        group, exit_number, pending, started = self._unread.popleft()
        self._running = list(group.rows)
        logits = pending.result()[LOGITS]
        now = perf_counter()
        # A device runs one segment after another.
        self._seconds = (self._seconds + now - max(started, self._read_at)) / 2
        self._read_at = now
        self._decide(exit_number, self._running, group.state, logits)

    def _admit(self, chain: Chain[Any]) -> None:
        """Let the rows that have arrived wait, and ask exit 0, which answers some of them."""
        with self._changed:
            rows, self._arrived = self._arrived, []
            self._waiting += rows  # before anything can fail
        if chain.exit_0 is None:
            return
        for runner in {row.runner for row in rows}:
            part = [row for row in rows if row.runner is runner]
            try:
                logits = chain.exit_0([row.encoded for row in part])
                self._decide(0, part, runner.start(len(part)), logits)
            except Exception as error:  # noqa: BLE001 - it belongs to these rows, and others go on
                self._fail(part, error)
                continue
            for row, row_logits in zip(part, logits, strict=True):
                row.at_exit_0 = row_logits

    def _choose(self, chain: Chain[Any]) -> Group[Any] | None:
        """The group that runs next, which may be a new one."""
        segments, now = chain.backend.segments, perf_counter()

        def gain(rows: Iterable[_Row], stage: int = 0) -> tuple[float, int]:
            return (self._worth(rows, segments - stage, now) if chain.backend.joins else 0.0), stage

        def gain_of(group: Group[Any]) -> tuple[float, int]:
            return gain(group.rows, group.hidden.segment)

        best = max(self._ready(), key=gain_of, default=None)
        under_way = sum(int(group.lengths.sum()) for group in self._groups)
        if not self._waiting or (self._groups and under_way > self._model.window_tokens):
            return best
        first = min(self._waiting, key=lambda row: row.deadline)
        # Time for the segment of another group, and then for segment 1 of that row.
        is_urgent = first.deadline < self._after(2)
        rows = self._rows_with(first if is_urgent else self._waiting[0], chain.limits)
        if best and not is_urgent and gain(rows) <= gain_of(best):
            return best
        return self._begin(chain, rows)

    def _worth(self, rows: Iterable[_Row], left: int, now: float) -> float:
        """The gain of running rows that have so many segments left, where groups are joined.

        A small group takes about as long as a full one there, so it waits until other rows have
        joined it, but not for long. Tokens are counted instead of rows, because otherwise long
        texts would wait for all shorter ones that arrive in the meantime. Elsewhere waiting gains
        nothing, and the rows that are nearly finished come first.
        """
        age = max(0.0, now - min(row.arrived for row in rows))
        return age * sum(len(row.encoded) for row in rows) / left

    def _rows_with(self, first: _Row, limits: Limits) -> list[_Row]:
        """A group of a waiting row and others of similar length, the oldest ones."""
        rows, longest = [first], len(first.encoded)
        size = max(longest, _SHORT_TOKENS)
        for row in self._waiting:
            tokens = len(row.encoded)
            if row is first or row.runner is not first.runner:
                continue
            if not size <= 2 * max(tokens, _SHORT_TOKENS) <= 4 * size:
                continue
            if fits(len(rows) + 1, max(longest, tokens), limits):
                rows.append(row)
                longest = max(longest, tokens)
        return rows

    def _begin(self, chain: Chain[Any], rows: list[_Row]) -> Group[Any]:
        taken = set(rows)
        self._waiting = [row for row in self._waiting if row not in taken]
        self._running = rows
        runner = rows[0].runner
        state = runner.start(len(rows))
        if chain.exit_0 is not None:
            runner.decide(0, state, np.array([row.at_exit_0 for row in rows], np.float64))
        group = chain.begin([row.encoded for row in rows], np.array(rows, object), state)
        self._groups.append(group)
        return group

    def _answer_late(self) -> None:
        """Answer the rows that would miss their deadline while another segment runs."""
        soon = self._after(1 + len(self._unread))
        for row in self._waiting:
            if row.deadline < soon and row.at_exit_0 is not None:
                self._answer(0, [row], row.at_exit_0[None], limited=True)
        for group in self._ready():
            late = np.array([row.deadline < soon for row in group.rows])
            if late.any() and group.state.earlier is not None:
                logits = group.state.earlier.logits[late].astype(np.float32)
                self._answer(group.hidden.segment, list(group.rows[late]), logits, limited=True)

    def _decide(
        self, exit_number: int, rows: Sequence[_Row], state: PatienceState, logits: Any
    ) -> None:
        """Apply the rule to a group at an exit, and answer the rows that stop.

        Args:
            exit_number: the exit.
            rows: the rows; those that have their answer already stay as they are.
            state: what the rule remembers of them.
            logits: `[rows, labels]` float32 at the exit.
        """
        finite = np.isfinite(logits).all(axis=1)
        clean = np.where(finite[:, None], logits, np.float32(0))
        stops, _ = rows[0].runner.decide(exit_number, state, clean.astype(np.float64))
        done = np.array([row.last <= exit_number for row in rows])
        if stops is not None:
            done |= stops
        failed = [rows[place] for place in np.flatnonzero(~finite).tolist()]
        self._fail(failed, not_finite(self._model.target, exit_number))
        places = np.flatnonzero(done & finite)
        self._answer(exit_number, [rows[place] for place in places.tolist()], clean[places])

    def _regroup(self, chain: Chain[Any]) -> None:
        """Drop the rows that are answered or cancelled, and join groups of the same stage."""
        peers: dict[tuple[int, RuleRunner], list[Group[Any]]] = {}
        for group in sorted(self._ready(), key=lambda group: int(group.lengths.max())):
            going = np.array([not row.future.done() for row in group.rows])
            group.keep = None if going.all() else np.flatnonzero(going)
            peers.setdefault((group.hidden.segment, group.rows[0].runner), []).append(group)
        for groups in peers.values():
            # The groups that stay are listed before anything can fail.
            self._groups = [group for group in self._groups if group not in groups]
            self._running = [row for group in groups for row in group.rows]
            self._groups += [chain.join(parts) for parts in chain.plan(groups)]

    def _answer(
        self, exit_number: int, rows: Sequence[_Row], logits: Any, limited: bool = False
    ) -> None:
        kept = [number for number, row in enumerate(rows) if not row.future.done()]
        if not kept:
            return
        now = perf_counter()
        taken = [rows[number] for number in kept]
        predictions = self._engine.answers(
            [row.encoded for row in taken],
            np.full(len(taken), exit_number),
            logits[kept],
            np.full(len(taken), limited),
            np.array([now > row.deadline for row in taken]),
        )
        if self._metrics is not None:
            seconds = [now - row.arrived for row in taken]
            self._metrics.answered(predictions, seconds)
            if exit_number == 0:
                self._metrics.started(seconds)
        for row, prediction in zip(taken, predictions, strict=True):
            with suppress(InvalidStateError):  # it was cancelled in the meantime
                row.future.set_result(prediction)

    def _fail(self, rows: Iterable[_Row], error: Exception) -> None:
        failed = [row for row in rows if not row.future.done()]
        if self._metrics is not None:
            self._metrics.failed(len(failed))
        for row in failed:
            with suppress(InvalidStateError):
                row.future.set_exception(error)

    def _after(self, segments: int) -> float:
        """When so many more segments are done, if they take as long as the last ones."""
        return perf_counter() + segments * self._seconds
