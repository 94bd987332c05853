"""The scheduler: rows of different callers share the chain, and each is answered at its exit."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..backends.buffers import Limits
from ..backends.forks import Origin
from ..chain.chain import Chain, Decision, not_finite
from ..chain.groups import Group, RowNumbers, fits, shapes
from ..encoding import EncodedRow, Text, characters
from ..engine import Engine
from ..errors import BackendError, InputError, OverloadedError, seconds_of, whole_number
from ..predictions import Prediction, Stopped
from ..ranking import Ranked, RankedQuery, pairs_of, ranked, top_of
from ..rules.measures import Mask

if TYPE_CHECKING:
    from .metrics import Metrics

logger = logging.getLogger(__name__)

_MOST_ROWS = 1000
# Longer texts of a request are tokenized in another thread than that of the event loop. It is one
# thread for all requests, so that the memory which this takes does not grow with their number.
_SHORT_CHARACTERS = 20_000
# Tokens that may be unanswered for each of `max_rows`. Most rows have fewer.
_TOKENS_OF_A_ROW = 128
# Rows with at most this many tokens may share a group, whatever their lengths: a segment takes
# about as long for shorter rows.
_SHORT_TOKENS = 16


@dataclass(slots=True, eq=False)
class _Row:
    """A row that is not answered yet.

    Attributes:
        encoded: its tokens.
        future: its answer.
        arrived: when it was submitted, in seconds of the engine's clock.
        deadline: when it should be answered, in the same seconds.
        turn: the round that it belongs to, see `Scheduler`. Rows of a round are in the order of
            their arrival. It says nothing about documents, because queries take other turns.
        query: the query that it is a document of; None for classification.
        place: of the document in its query, from 0.
    """

    encoded: EncodedRow
    future: Future[Prediction]
    arrived: float
    deadline: float
    turn: int
    query: _Query | None = None
    place: int = 0


@dataclass(slots=True, eq=False)
class _Query:
    """A query whose documents run.

    Attributes:
        ranking: decides which documents leave.
        arrived: when it was submitted, in seconds of the engine's clock.
        rows: its documents.
        nbytes: memory of all its documents while they run.
        tokens_left: tokens that segments may still run for it: those of all documents that go on,
            once for each exit that is not decided yet.
        has_begun: whether a segment was started for it.
    """

    ranking: RankedQuery
    arrived: float
    rows: list[_Row] = field(default_factory=list)
    nbytes: int = 0
    tokens_left: int = 0
    has_begun: bool = False

    def count_left(self) -> None:
        """Count `tokens_left` again."""
        going = np.flatnonzero(self.ranking.going)
        tokens = sum(len(self.rows[number].encoded) for number in going)
        self.tokens_left = tokens * self.ranking.undecided


class Scheduler:
    """Answers the texts of many callers with one engine. Thread-safe; a context manager.

    Rows of different callers run together. New rows join between two segments, and each row is
    answered as soon as it stops. Answers are those of `Engine.predict`, within the target's
    tolerance. One thread runs the segments. If a group fails, all of its rows get the error; a row
    whose logits are not finite numbers gets an error alone.

    Calls take turns: in each round, a call starts rows of about as many tokens as fit into a group.
    So a text does not wait for all texts of a long list that was submitted before it. All documents
    of a query run a segment before any of them goes on. Between two groups of documents, another
    query may run: the one with the fewest tokens left to run goes first, but every second turn
    belongs to the oldest query. So a small query does not wait for a large one, and a large one
    always goes on. What runs beside the oldest query takes at most 256 MiB. Other calls of the
    engine have their turn between groups.

    A scheduler that is dropped without `close` answers what was submitted, and its thread ends.

    Args:
        engine: the engine, which the scheduler does not close.
        max_rows: most rows that are unanswered at a time, tokenization included; more are refused.
            None are taken while the unanswered rows have 128 times as many tokens.
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
        self._origin = Origin(self, "this scheduler")
        self._core = engine.core
        self._most = whole_number("max_rows", max_rows, InputError)
        self._metrics = metrics
        self._lock = threading.RLock()
        # Itself whenever rows have arrived, and None after the last ones.
        self._news = SimpleQueue[Scheduler | None]()
        self._arrived: list[Group] = []
        self._unanswered = 0
        self._tokens: dict[Future[Prediction], int] = {}  # of the rows that were queued
        self._closed = self._cancels = self._some_cancelled = False
        self._tokenizer = ThreadPoolExecutor(1, "fpabee tokenizer")
        # What follows belongs to the worker thread.
        # Before segment 1: one for each query; or else one for each rule, in order of turns.
        self._waiting: list[Group] = []
        self._round = 0
        self._tokens_beside = 0  # run for other queries since the oldest one had its turn
        self._groups: list[Group] = []
        self._some_left = False
        # The thread holds the scheduler, and with it the engine, only while there are rows.
        self._thread = threading.Thread(
            target=_work, args=[self._news], name="fpabee scheduler", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._news.put, None).atexit = False

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
            that `predict` would raise. Its callbacks must not call the engine, which may wait for
            them.

        Raises:
            InputError: it is neither a text nor a pair, the deadline is not a number, or the model
                is a reranker.
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
        self._core.check_method("predict")
        arrived = self._core.clock()
        with self._accepted(len(texts)) as futures:
            self._queue(futures, self._core.encode(texts), deadline_ms, max_exit, arrived)
        return futures

    def warm_up(self) -> None:
        """Load the segments, and prepare what would make the first rows wait.

        On a GPU, every padded shape runs once, as each takes longer at first. This can take
        minutes when TensorRT for RTX compiles for a GPU for the first time; what it compiled is
        kept for later processes. On a CPU, one short row runs.

        Raises:
            BackendError: the engine is closed, or memory is lacking.
            ArtifactError: a segment is missing or damaged.
        """
        every = shapes(self._core.limits) if self._core.backend.prepares_shapes else []
        self._core.prepare(every or [(1, 1)])

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
        self._core.check_method("predict")
        arrived = self._core.clock()
        with self._accepted(len(texts)) as futures:
            rows = await self._encode(texts)
            if check is not None:
                check(rows)
            self._queue(futures, rows, deadline_ms, max_exit, arrived)
            return await asyncio.gather(*map(asyncio.wrap_future, futures))

    async def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        deadline_ms: float | None = None,
        *,
        scores: Sequence[float] | None = None,
        all: bool = False,
        check: Callable[[Sequence[EncodedRow]], object] | None = None,
    ) -> list[Ranked]:
        """Rank documents in asyncio, see `Engine.rank`; a query is admitted whole or refused.

        Args:
            query: as in `Engine.rank`.
            documents: as in `Engine.rank`.
            top_k: as in `Engine.rank`.
            deadline_ms: as in `submit`.
            scores: as in `Engine.rank`.
            all: as in `Engine.rank`.
            check: as in `classify`.

        Returns:
            As `Engine.rank`. Cancelling this cancels the documents.

        Raises:
            FpabeeError: as in `submit` and `Engine.rank`.
        """
        self._core.check_method("rank")
        arrived = self._core.clock()
        runner = self._core.runner()
        pairs = pairs_of(query, documents)
        most = top_of(runner.rule, top_k, len(pairs))
        asked = _Query(RankedQuery(runner, len(pairs)), arrived)
        with self._accepted(len(pairs)) as futures:
            encoded = await self._encode(pairs)
            rows = self._core.with_scores(encoded, scores)
            self._core.check_query(rows)
            if check is not None:
                check(rows)
            self._queue(futures, rows, deadline_ms, None, arrived, asked)
            answers = await asyncio.gather(*map(asyncio.wrap_future, futures))
        stopped = Stopped(
            rows=rows,
            exits=np.array([answer.exit for answer in answers], np.int64),
            logits=np.array([answer.logits for answer in answers], np.float32).reshape(-1, 1),
            limited=np.array([answer.deadline_limited for answer in answers], np.bool_),
        )
        missed = np.array([answer.deadline_missed for answer in answers], np.bool_)
        activation = self._core.manifest.task.activation
        return ranked(stopped, missed, ~asked.ranking.going, activation, most, all)

    @property
    def is_closed(self) -> bool:
        """Whether new rows are refused."""
        return self._closed

    def close(self, cancel: bool = False) -> None:
        """Refuse new rows, and return when the others are answered.

        Texts of `classify` and `rank` that are still being tokenized are refused, too.
        Does nothing in a process that was forked after the scheduler was made. In a callback of a
        future, which the thread that answers the others runs, it does not wait for them.

        Args:
            cancel: cancel them instead; only the segment that runs is waited for.
        """
        if self._origin.is_elsewhere:
            return
        with self._lock:
            self._closed = True
            self._cancels |= cancel
            self._news.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._tokenizer.shutdown(wait=False, cancel_futures=cancel)

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        self._origin.check()
        if self._closed:
            raise BackendError("this scheduler is closed", "make another one")

    @contextmanager
    def _accepted(self, rows: int) -> Iterator[list[Future[Prediction]]]:
        """The futures of new rows, which count as unanswered from now on; an error cancels them."""
        self._check_open()  # before the lock, which a fork may have copied while it was held
        with self._lock:
            if self._unanswered + rows > self._most:
                state = f"{self._unanswered} of at most {self._most} rows are unanswered"
                raise self._full(state, rows)
            self._unanswered += rows
        futures = [self._future() for _ in range(rows)]
        try:
            yield futures
        except BaseException:
            while futures:  # they may hold the error, whose traceback holds the list
                futures.pop().cancel()
            raise

    def _full(self, state: str, rows: int) -> OverloadedError:
        """The error for rows that a queue in this state refuses, which are counted."""
        if self._metrics is not None:
            self._metrics.refused(rows)
        return OverloadedError(
            f"{state}, and {rows} more were submitted",
            "try again later, submit fewer rows at a time, or raise `max_rows`",
        )

    def _future(self) -> Future[Prediction]:
        forget = weakref.WeakMethod(self._forget)  # a future may be kept for longer than this

        def done(future: Future[Prediction]) -> None:
            if future.cancelled():
                future.set_running_or_notify_cancel()  # `concurrent.futures.wait` waits for this
            if (call := forget()) is not None:
                call(future)

        future: Future[Prediction] = Future()
        future.add_done_callback(done)
        return future

    async def _encode(self, texts: Sequence[Text]) -> list[EncodedRow]:
        if sum(map(characters, texts)) <= _SHORT_CHARACTERS:
            return self._core.encode(texts)
        with self._lock:
            self._check_open()  # a pool that is shut down takes nothing
            tokenized = self._tokenizer.submit(self._core.encode, texts)
        return await asyncio.wrap_future(tokenized)

    def _queue(
        self,
        futures: Sequence[Future[Prediction]],
        encoded: Sequence[EncodedRow],
        deadline_ms: float | None,
        max_exit: int | None,
        arrived: float,
        query: _Query | None = None,
    ) -> None:
        """Hand accepted rows to the worker; those of a query are its documents, in their order."""
        ends = math.inf if deadline_ms is None else arrived + seconds_of("deadline_ms", deadline_ms)
        self._core.check_open()
        runner = self._core.runner(max_exit=max_exit)
        limits = self._core.limits
        if query is not None:
            runner = self._core.full_depth  # the query decides who leaves
        lengths = [len(row) for row in encoded]
        # Not this round, which might never end if rows could join it.
        turns = [self._round + 1 + (n - 1) // limits.group_tokens for n in accumulate(lengths)]
        rows = [
            _Row(row, future, arrived, ends, turn, query, place)
            for place, (row, future, turn) in enumerate(zip(encoded, futures, turns, strict=True))
        ]
        named = np.fromiter(rows, np.object_, len(rows))
        group = Group.of(named, encoded, runner, ends, limits)
        if query is not None:
            query.rows += rows
            query.nbytes = self._core.query_bytes(encoded)
            query.count_left()
            group.keep(np.argsort(-group.lengths, kind="stable"))
        with self._lock:
            self._check_open()
            tokens = sum(self._tokens.values())
            most = self._most * _TOKENS_OF_A_ROW
            if rows and tokens >= most:
                state = f"the unanswered rows have {tokens} tokens, expected fewer than {most}"
                raise self._full(state, len(rows))
            group.watched = self._core.choose_watched(len(rows), runner, ends)
            self._tokens.update(zip(futures, lengths, strict=True))
            self._arrived += [group] if rows else []
            self._news.put(self)

    def _forget(self, future: Future[Prediction]) -> None:
        with self._lock:
            self._some_cancelled |= future.cancelled()
            self._unanswered -= 1
            self._tokens.pop(future, None)

    def _answer_arrived(self) -> None:
        while self._is_busy:
            try:
                with self._core.chain() as chain:
                    while self._goes_on(chain):
                        self._try_step(chain)
            except Exception as error:  # noqa: BLE001 - it belongs to all rows
                self._fail_all(error)

    def _goes_on(self, chain: Chain) -> bool:
        """Whether the chain has work. No new group begins while another call waits for its turn."""
        if self._groups or (chain.watched and not self._closed):
            return True
        return self._is_busy and not chain.gives_way

    @property
    def _is_busy(self) -> bool:
        return bool(self._arrived or self._waiting or self._groups)

    def _fail_all(self, error: Exception) -> None:
        # Not in the function that catches the error: the futures hold it, and its traceback that
        # function's variables, so these must not hold the futures.
        with self._lock:
            groups = [*self._arrived, *self._waiting, *self._groups]
            self._arrived = []
            self._waiting = []
            self._groups = []
        for group in groups:
            group.lose_watched()
            self._fail(group.rows, error)

    def _try_step(self, chain: Chain) -> None:
        """Take a step. If a group fails, its rows get the error, and the others go on."""
        chain.current = None
        try:
            self._step(chain)
        except Exception as error:
            lost = chain.current
            if lost is None:
                raise
            self._fail(lost.rows, error)
            self._waiting = [group for group in self._waiting if group is not lost]
            self._groups = [group for group in self._groups if group is not lost]
            chain.lose(lost, error, self._groups)

    def _step(self, chain: Chain) -> None:
        """Take new rows, and let one group take a step of the chain."""
        if not chain.gives_way:
            self._admit(chain)
            if self._waiting:
                chain.borrow()  # before the next line, because rows may be late after a wait
        self._clear(chain)
        group = self._choose(chain)
        if group is None and not self._groups:
            group = chain.next_watched()
        if group is not None and not group.is_answered and self._metrics is not None:
            self._metrics.ran(len(group))
            if group.hidden is None:
                now = self._core.clock()
                self._metrics.started([now - row.arrived for row in group.rows])
        decision = chain.step(group)
        if decision is not None:
            self._answer(decision)

    def _admit(self, chain: Chain) -> None:
        """Let the rows that have arrived wait, and ask exit 0, which answers some of them."""
        ranks = self._core.manifest.task.ranks
        with self._lock:
            arrived = self._arrived if ranks else _one_for_each_rule(self._arrived)
            self._arrived = []
            self._waiting += arrived  # before anything can fail
        for group in arrived:
            chain.current = group
            for decision in chain.ask_exit_0(group):
                self._answer(decision)
        chain.current = None
        if arrived and not ranks:
            self._waiting = _one_for_each_rule(self._waiting)
            for group in self._waiting:
                group.keep(np.argsort([row.turn for row in group.rows], kind="stable"))

    def _clear(self, chain: Chain) -> None:
        """Drop the rows that are answered or cancelled, and answer those that would be late."""
        with self._lock:
            some_cancelled = self._some_cancelled or self._cancels or self._some_left
            self._some_cancelled = self._some_left = False
        for group in (*self._waiting, *self._groups):
            if self._cancels:
                group.lose_watched()
                group.watched = np.full(len(group), None)
                for row in group.rows:
                    row.future.cancel()
            if some_cancelled:
                # Watched rows run on, because those that clients do not wait for may be special.
                pairs = zip(group.rows, group.watched, strict=True)
                kept = [watched is not None or not row.future.done() for row, watched in pairs]
                chain.keep(group, np.array(kept))
            if len(group) and group.running is None:
                for decision in chain.stop_late(group):
                    self._answer(decision)
        self._waiting = [group for group in self._waiting if len(group)]
        self._groups = [group for group in self._groups if len(group)]

    def _choose(self, chain: Chain) -> Group | None:
        """The group that runs next, which may be a new one."""
        ready = self._joined(chain)
        if self._core.manifest.task.ranks:
            return self._next_of_queries(chain, ready)
        now = self._core.clock()

        def gain(group: Group) -> tuple[float, int]:
            left = chain.backend.segments - group.segment
            return (_worth(group, left, now) if chain.backend.joins else 0.0), group.segment

        best = max(ready, key=gain, default=None)
        under_way = sum(group.hidden.nbytes for group in self._groups if group.hidden)
        if not self._waiting or under_way > self._core.window_bytes or chain.gives_way:
            return best
        waiting = min(self._waiting, key=lambda group: float(group.deadlines.min()))
        first = int(waiting.deadlines.argmin())
        # Time for the segment of another group, and then for segment 1 of that row.
        is_urgent = waiting.deadlines[first] < chain.soon(2)
        if not is_urgent:
            if best is not None and not chain.backend.joins:
                return best
            waiting = min(self._waiting, key=_turn)
            first = 0
        places = _similar(waiting.lengths, first, chain.limits)
        group = waiting.take(places)
        if best is not None and not is_urgent and gain(group) <= gain(best):
            return best
        self._begin(chain, group, waiting, places)
        if not is_urgent:
            self._round = group.rows[0].turn
        return group

    def _next_of_queries(self, chain: Chain, ready: Sequence[Group]) -> Group | None:
        """The group of a query that runs next, which may be a new one; see `Scheduler`.

        It is the one that is the farthest behind. So all documents of a query pass an exit before
        any of them goes on.
        """
        queries = {row.query for group in (*self._waiting, *self._groups) for row in group.rows}
        behind: dict[_Query, Group] = {}
        for group in sorted((*self._waiting, *ready), key=lambda group: -group.segment):
            behind.update(dict.fromkeys((row.query for row in group.rows), group))
        if not behind:
            return None
        oldest = min(queries, key=lambda query: query.arrived)
        others = queries - {oldest}
        room = self._core.window_bytes - sum(each.nbytes for each in others if each.has_begun)
        can_run = [
            each
            for each in behind
            if each.has_begun or (not chain.gives_way and (each is oldest or each.nbytes <= room))
        ]
        query = min(can_run, key=lambda each: (each.tokens_left, each.arrived), default=None)
        if oldest in can_run and self._tokens_beside >= chain.limits.group_tokens:
            query = oldest
        if query is None:
            return None
        group = behind[query]
        if group.hidden is None:
            query.has_begun = True
            waiting = group
            places = _similar(waiting.lengths, 0, chain.limits)
            group = waiting.take(places)
            self._begin(chain, group, waiting, places)
        self._tokens_beside += int(group.lengths.sum())
        if query is oldest:
            self._tokens_beside = 0
        return group

    def _begin(self, chain: Chain, group: Group, waiting: Group, places: RowNumbers) -> None:
        """Let a new group go on without the group in which its rows waited, at these places."""
        chain.keep(waiting, ~np.isin(np.arange(len(waiting)), places))
        self._waiting = [each for each in self._waiting if len(each)]
        self._groups.append(group)

    def _joined(self, chain: Chain) -> list[Group]:
        """The groups that wait for a segment, joined as far as they fit."""
        ready = [group for group in self._groups if group.running is None]
        ready.sort(key=lambda group: int(group.lengths.max()))
        for number, group in enumerate(ready):
            others = [
                other
                for other in ready[number + 1 :]
                if len(other)
                and other.segment == group.segment
                and other.runner.rule == group.runner.rule
            ]
            if len(group):
                chain.join(group, others)
        self._groups = [group for group in self._groups if len(group)]
        return [group for group in ready if len(group)]

    def _answer(self, decision: Decision) -> None:
        """Answer the rows that stop."""
        if len(decision.failed):
            error = not_finite(self._core.backend.name, decision.exit)
            self._fail(decision.rows[decision.failed], error)
        if self._core.manifest.task.ranks:
            for query, places in _queries(decision).items():
                self._pass(query, decision, places)
            return
        at = decision.stopped
        exits = np.full(len(at), decision.exit)
        limited = np.full(len(at), decision.limited)
        self._give(decision.rows[at].tolist(), exits, decision.logits[at], limited)

    def _pass(self, query: _Query, decision: Decision, places: RowNumbers) -> None:
        """Tell a query what happened to its documents at these places, and answer some of them."""
        documents = np.array([row.place for row in decision.rows[places]], np.intp)
        ranking = query.ranking
        if decision.limited:
            settled = ranking.stop(documents)
        else:
            settled = ranking.passed(decision.exit, documents, decision.logits[places])
        query.count_left()
        if len(settled):
            rows = [query.rows[number] for number in settled]
            limited = ranking.limited[settled]
            self._give(rows, ranking.exits[settled], ranking.logits[settled, None], limited)
            self._some_left = True

    def _give(
        self,
        rows: Sequence[_Row],
        exits: NDArray[np.int64],
        logits: NDArray[np.float32],
        limited: Mask,
    ) -> None:
        """Give rows their answers, except those that are cancelled.

        Args:
            rows: the rows.
            exits: `[rows]` their exits.
            logits: `[rows, labels]` at these exits.
            limited: `[rows]` whether a deadline stopped them.
        """
        numbers = [number for number, row in enumerate(rows) if not row.future.done()]
        if not numbers:
            return
        now = self._core.clock()
        rows = [rows[number] for number in numbers]
        try:
            stopped = Stopped(
                rows=[row.encoded for row in rows],
                exits=exits[numbers],
                logits=logits[numbers],
                limited=limited[numbers],
            )
            missed = np.array([now > row.deadline for row in rows])
            predictions = self._core.answers(stopped, missed)
            self._core.count_depth(stopped.exits)
        except Exception as error:
            self._fail(rows, error)  # they have left their group
            raise
        if self._metrics is not None:
            seconds = [now - row.arrived for row in rows]
            self._metrics.answered(predictions, seconds)
            if stopped.exits[0] == 0:
                self._metrics.started(seconds)
        for row, prediction in zip(rows, predictions, strict=True):
            with suppress(InvalidStateError):  # it was cancelled in the meantime
                row.future.set_result(prediction)

    def _fail(self, rows: Iterable[_Row], error: Exception) -> None:
        failed = [row for row in rows if not row.future.done()]
        if self._metrics is not None:
            self._metrics.failed(len(failed))
        for row in failed:
            with suppress(InvalidStateError):
                row.future.set_exception(error)


def _work(news: SimpleQueue[Scheduler | None]) -> None:
    """Answer the rows of a scheduler until it is closed, or dropped."""
    while (scheduler := news.get()) is not None:
        scheduler._answer_arrived()
        del scheduler  # so that nothing holds it while this waits


def _worth(group: Group, left: int, now: float) -> float:
    """The gain of running a group next that has so many segments left, where groups are joined.

    A small group takes about as long as a full one there, so it waits until other rows have
    joined it, but not for long. Tokens are counted instead of rows, because otherwise long texts
    would wait for all shorter ones that arrive in the meantime. Elsewhere waiting gains nothing,
    and the rows that are nearly finished come first.
    """
    age = max(0.0, now - float(min(row.arrived for row in group.rows)))
    return age * int(group.lengths.sum()) / left


def _queries(decision: Decision) -> dict[_Query, RowNumbers]:
    """The queries of a decision, and where their documents are; failed ones are left out."""
    places: dict[_Query, list[int]] = {}
    failed = {*decision.failed.tolist()}
    for place, row in enumerate(decision.rows.tolist()):
        if row.query is not None and place not in failed:
            places.setdefault(row.query, []).append(place)
    return {query: np.array(each, np.intp) for query, each in places.items()}


def _turn(group: Group) -> tuple[int, float]:
    """What orders groups of rows that wait, as their first rows are ordered."""
    first: _Row = group.rows[0]
    return first.turn, first.arrived


def _one_for_each_rule(groups: Sequence[Group]) -> list[Group]:
    """Groups that have seen the same exits, joined if they have the same rule."""
    joined: list[Group] = []
    rest = [group for group in groups if len(group)]
    while rest:
        first = rest[0]
        rule = rest[0].runner.rule
        same = [group for group in rest[1:] if group.runner.rule == rule]
        if same:
            first.add(same)
        joined.append(first)
        rest = [group for group in rest if group.runner.rule != rule]
    return joined


def _similar(lengths: NDArray[np.intp], first: int, limits: Limits) -> RowNumbers:
    """A row and others of similar length, the first ones, as many as fit into a group.

    Args:
        lengths: `[rows]` tokens of the rows, in the order in which they start.
        first: the row.
        limits: the shapes that the backend runs.
    """
    sizes = np.maximum(lengths, _SHORT_TOKENS)
    similar = (2 * sizes >= sizes[first]) & (sizes <= 2 * sizes[first])
    similar[first] = False
    places = np.concatenate([[first], np.flatnonzero(similar)])
    longest = np.maximum.accumulate(lengths[places])
    rows = 1
    while rows < len(places) and fits(rows + 1, int(longest[rows]), limits):
        rows += 1
    return np.asarray(places[:rows], np.intp)
