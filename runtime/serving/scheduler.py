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
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.forks import Origin
from ..chain.chain import Chain, Decision, not_finite
from ..chain.groups import Group, shapes
from ..chain.route import Route
from ..encoding import EncodedRow, Text, characters
from ..engine import Engine
from ..errors import BackendError, InputError, OverloadedError, seconds_of, whole_number
from ..predictions import Prediction
from ..rules.settling import Settled, State
from ..tasks.queries import Documents
from ..tasks.ranked import Ranked, pairs_of, top_of
from .turns import TURNS, Waiting

if TYPE_CHECKING:
    from .metrics import Metrics

logger = logging.getLogger(__name__)

_MOST_ROWS = 1000
# Longer texts of a request are tokenized in another thread than that of the event loop. It is one
# thread for all requests, so that the memory which this takes does not grow with their number.
_SHORT_CHARACTERS = 20_000
# Tokens that may be unanswered for each of `max_rows`. Most rows have fewer.
_TOKENS_OF_A_ROW = 128


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
        self._tokens: dict[Future[Any], int] = {}  # of the rows that were queued
        self._closed = self._cancels = self._some_cancelled = False
        self._tokenizer = ThreadPoolExecutor(1, "fpabee tokenizer")
        # It belongs to the worker thread.
        self._turns = TURNS[self._core.task.method](self._core)
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
            rows = self._core.encode(texts)
            route = self._core.route(max_exit=max_exit)
            self._queue(futures, rows, deadline_ms, route, arrived)
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
            route = self._core.route(max_exit=max_exit)
            self._queue(futures, rows, deadline_ms, route, arrived)
            answers: list[Prediction] = await asyncio.gather(*map(asyncio.wrap_future, futures))
            return answers

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
        pairs = pairs_of(query, documents)
        route = self._core.route()
        most = top_of(route.rule, top_k, len(pairs))
        with self._accepted(len(pairs)) as futures:
            encoded = await self._encode(pairs)
            rows = self._core.with_scores(encoded, scores)
            self._core.check_query(rows)
            if check is not None:
                check(rows)
            state = self._queue(futures, rows, deadline_ms, route, arrived)
            await asyncio.gather(*map(asyncio.wrap_future, futures))
        if not pairs:
            return []
        assert isinstance(state, Documents)
        settled = state.settled()
        missed = np.array([row.is_late for row in settled.rows])
        return self._core.in_order(_as_encoded(settled), route, missed, most, all)

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
    def _accepted(self, rows: int) -> Iterator[list[Future[Any]]]:
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

    def _future(self) -> Future[Any]:
        forget = weakref.WeakMethod(self._forget)  # a future may be kept for longer than this

        def done(future: Future[Any]) -> None:
            if future.cancelled():
                future.set_running_or_notify_cancel()  # `concurrent.futures.wait` waits for this
            if (call := forget()) is not None:
                call(future)

        future: Future[Any] = Future()
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
        futures: Sequence[Future[Any]],
        encoded: Sequence[EncodedRow],
        deadline_ms: float | None,
        route: Route,
        arrived: float,
    ) -> State:
        """Hand accepted rows to the worker; those of a query are its documents, in their order.

        Returns:
            The state of the rows, as it is before the first exit.
        """
        ends = math.inf if deadline_ms is None else arrived + seconds_of("deadline_ms", deadline_ms)
        self._core.backend.check_open()
        lengths = [len(row) for row in encoded]
        rows = [
            Waiting(row, future, arrived, ends, turn)
            for row, future, turn in zip(
                encoded, futures, self._turns.turns_of(lengths), strict=True
            )
        ]
        named = np.fromiter(rows, np.object_, len(rows))
        group = Group.of(named, encoded, route, ends)
        state = group.state
        with self._lock:
            self._check_open()
            tokens = sum(self._tokens.values())
            most = self._most * _TOKENS_OF_A_ROW
            if rows and tokens >= most:
                what = f"the unanswered rows have {tokens} tokens, expected fewer than {most}"
                raise self._full(what, len(rows))
            group.watched = self._core.choose_watched(len(rows), route, ends)
            self._tokens.update(zip(futures, lengths, strict=True))
            self._arrived += [group] if rows else []
            self._news.put(self)
        return state

    def _forget(self, future: Future[Any]) -> None:
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
        if self._turns.groups or (chain.watched and not self._closed):
            return True
        return self._is_busy and not chain.gives_way

    @property
    def _is_busy(self) -> bool:
        return bool(self._arrived or self._turns.every)

    def _fail_all(self, error: Exception) -> None:
        # Not in the function that catches the error: the futures hold it, and its traceback that
        # function's variables, so these must not hold the futures.
        with self._lock:
            groups = [*self._arrived, *self._turns.clear()]
            self._arrived = []
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
            self._turns.forget(lost)
            chain.lose(lost, error, self._turns.groups)

    def _step(self, chain: Chain) -> None:
        """Take new rows, and let one group take a step of the chain."""
        if not chain.gives_way:
            self._admit(chain)
            for waiting in self._turns.waiting:
                chain.borrow(waiting)  # before `_clear`, because rows may be late after a wait
        self._clear(chain)
        group = self._turns.choose(chain)
        if group is None and not self._turns.groups:
            group = chain.next_watched()
        if group is not None and not group.is_answered and self._metrics is not None:
            self._metrics.ran(len(group))
            if group.hidden is None and group.exit == 0:
                now = self._core.clock()
                self._metrics.started([now - row.arrived for row in group.rows])
        decision = chain.step(group)
        if decision is not None:
            self._answer(decision)
            if len(decision.group) and decision.group.hidden is None:
                self._turns.start_again(decision.group)

    def _admit(self, chain: Chain) -> None:
        """Let the rows that have arrived wait, and ask exit 0, which answers some of them."""
        with self._lock:
            arrived = self._turns.take(self._arrived)  # before anything can fail
            self._arrived = []
        for group in arrived:
            chain.current = group
            for decision in chain.ask_exit_0(group):
                self._answer(decision)
                if decision.settled is not None and self._metrics is not None:
                    now = self._core.clock()
                    self._metrics.started([now - row.arrived for row in decision.settled.rows])
        chain.current = None
        if arrived:
            self._turns.passed_exit_0()

    def _clear(self, chain: Chain) -> None:
        """Drop the rows that are answered or cancelled, and answer those that would be late."""
        with self._lock:
            some_cancelled = self._some_cancelled or self._cancels
            self._some_cancelled = False
        for group in self._turns.every:
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
            chain.let_go(group)
            if len(group) and group.running is None:
                self._give(chain.stop_late(group), group.route)
        self._turns.drop_empty()

    def _answer(self, decision: Decision) -> None:
        """Answer the rows that have settled."""
        if len(decision.failed):
            self._fail(decision.failed, not_finite(decision.target, decision.exit))
        self._give(decision.settled, decision.group.route)

    def _give(self, settled: Settled | None, route: Route) -> None:
        """Give rows their answers, except those that are cancelled; all have run on a route."""
        if settled is None:
            return
        open_places = [
            place for place, row in enumerate(settled.rows.tolist()) if not row.future.done()
        ]
        if not open_places:
            return
        now = self._core.clock()
        settled = settled.take(np.array(open_places))
        rows: list[Waiting] = settled.rows.tolist()
        try:
            missed = np.array([now > row.deadline for row in rows])
            answers = self._core.answers(_as_encoded(settled), missed, route)
            self._core.count_depth(settled.exits, route)
        except Exception as error:
            self._fail(rows, error)  # they have left their group
            raise
        if self._metrics is not None:
            self._metrics.answered(settled, missed, [now - row.arrived for row in rows])
        for row, answer, is_late in zip(rows, answers, missed.tolist(), strict=True):
            row.is_late = is_late
            with suppress(InvalidStateError):  # it was cancelled in the meantime
                row.future.set_result(answer)

    def _fail(self, rows: Iterable[Waiting], error: Exception) -> None:
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


def _as_encoded(settled: Settled) -> Settled:
    """The same rows, as their tokens."""
    rows = [row.encoded for row in settled.rows.tolist()]
    return settled._replace(rows=np.fromiter(rows, np.object_, len(rows)))
