"""An open-loop load test of the HTTP server on this machine, against two simpler servers.

Requests of one text arrive at random times (a Poisson process), whether or not earlier ones have
been answered. The time of an answer counts from the moment at which its request was due. Rates are
relative to the measured capacity at full depth in batches of 32. The client is a process of its
own; every server has the same HTTP code, and differs in how it runs the rows.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import queue
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.encoding import EncodedRow, Text
from ..runtime.engine import Engine
from ..runtime.errors import OverloadedError
from ..runtime.progress import Progress, silent
from ..runtime.results import Prediction
from ..runtime.rules.base import ExitRule
from ..runtime.rules.rules import Budget
from ..runtime.serving import Scheduler

SCHEDULER = "at the exit"
BATCHES = "full depth, batches of 32"
THREADS = "predict, a thread per request"
SUSTAINABLE_MS = 1000.0
SUSTAINABLE_SECONDS = 300.0

_BATCH = 32
_WINDOW_SECONDS = 0.005
_MOST_ROWS = 1000
_MOST_THREADS = 256
_CAPACITY_SECONDS = 20.0
# After the last request, how long the client waits for answers.
_PATIENCE_SECONDS = 10.0
_HEAD = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@dataclass(frozen=True)
class Load:
    """What one server did under one load.

    Attributes:
        server: which one.
        share: the rate of requests, as a multiple of the capacity at full depth.
        rate: requests in a second.
        seconds: how long they were sent.
        requests: how many were sent.
        answered: how many were answered; the others were refused or took too long.
        per_second: answers in a second.
        mean_ms: the mean time of an answer.
        p50_ms: the median.
        p99_ms: the 99th percentile.
        mean_layer: encoder layers that ran for an answer, on average.
    """

    server: str
    share: float
    rate: float
    seconds: float
    requests: int
    answered: int
    per_second: float
    mean_ms: float
    p50_ms: float
    p99_ms: float
    mean_layer: float

    @property
    def held(self) -> bool:
        """Whether all requests were answered, 99 % of them within a second."""
        return self.answered == self.requests and self.p99_ms < SUSTAINABLE_MS

    @property
    def sustainable(self) -> bool | None:
        """Whether the server held for at least five minutes; None if it held for less."""
        return self.held if not self.held or self.seconds >= SUSTAINABLE_SECONDS else None


class _Rows(ABC):
    """What the HTTP server needs: rows in, answers out."""

    is_closed = False

    def __init__(self, engine: Engine, rule: ExitRule) -> None:
        self._engine = engine
        self._rule = rule
        self._unanswered = 0

    async def classify(
        self,
        texts: Sequence[Text],
        _: float | None,
        __: int | None,
        check: Callable[[Sequence[EncodedRow]], object],
    ) -> list[Prediction]:
        if self._unanswered >= _MOST_ROWS:
            raise OverloadedError("the queue is full")
        rows = self._engine.encode(texts)
        check(rows)
        self._unanswered += len(rows)
        try:
            return await asyncio.gather(*(asyncio.wrap_future(self.submit(row)) for row in rows))
        finally:
            self._unanswered -= len(rows)

    @abstractmethod
    def submit(self, row: EncodedRow) -> Future[Prediction]:
        """Queue a row."""

    @abstractmethod
    def close(self) -> None:
        """Free what runs the rows."""

    def _run(self, rows: Sequence[EncodedRow]) -> list[Prediction]:
        result = self._engine.run_encoded(rows, self._rule)
        no = np.zeros(len(rows), np.bool_)
        return self._engine.answers(rows, result.exits, result.at_exit, no, no)


class _Batches(_Rows):
    """Runs up to 32 rows as a batch; it waits for more until 5 ms after the first has arrived."""

    def __init__(self, engine: Engine, rule: ExitRule) -> None:
        super().__init__(engine, rule)
        # Rows, their answers, and until when a batch waits for more rows.
        self._queue: queue.Queue[tuple[EncodedRow, Future[Prediction], float] | None]
        self._queue = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, row: EncodedRow) -> Future[Prediction]:
        future: Future[Prediction] = Future()
        self._queue.put((row, future, time.perf_counter() + _WINDOW_SECONDS))
        return future

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, ends = [first], first[2]
            while len(batch) < _BATCH:
                try:
                    item = self._queue.get(timeout=max(0.0, ends - time.perf_counter()))
                except queue.Empty:
                    break
                if item is None:
                    self._queue.put(None)
                    break
                batch.append(item)
            batch = [item for item in batch if item[1].set_running_or_notify_cancel()]
            answers = self._run([row for row, _, _ in batch]) if batch else []
            for (_, future, _), answer in zip(batch, answers, strict=True):
                future.set_result(answer)


class _Threads(_Rows):
    """Runs each row in a thread of its own."""

    def __init__(self, engine: Engine, rule: ExitRule) -> None:
        super().__init__(engine, rule)
        self._pool = ThreadPoolExecutor(_MOST_THREADS)

    def submit(self, row: EncodedRow) -> Future[Prediction]:
        return self._pool.submit(lambda: self._run([row])[0])

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def capacity(engine: Engine, texts: Sequence[Text]) -> float:
    """Rows in a second at full depth, in batches of 32 texts chosen at random."""
    rule = Budget(exit=engine.manifest.exits[-1])
    rows, choose = engine.encode(texts), random.Random(0)
    engine.run_encoded(choose.choices(rows, k=_BATCH), rule)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < _CAPACITY_SECONDS:
        engine.run_encoded(choose.choices(rows, k=_BATCH), rule)
        done += _BATCH
    return done / (time.perf_counter() - started)


def run_load_test(
    engine: Engine,
    texts: Sequence[Text],
    shares: Sequence[float],
    seconds: float,
    servers: Sequence[str] = (SCHEDULER, BATCHES, THREADS),
    progress: Progress = silent,
) -> tuple[float, list[Load]]:
    """Send requests to each server at each rate.

    Args:
        engine: the engine, with the rule of the scheduler and of the threads.
        texts: what is sent, in random order.
        shares: the rates, as multiples of the capacity at full depth.
        seconds: how long requests are sent at each rate.
        servers: which of the three.
        progress: is told about each step.

    Returns:
        The capacity in rows a second, and what each server did at each rate.
    """
    steps = len(shares) * len(servers)
    progress("capacity at full depth", 0, steps)
    full = capacity(engine, texts)
    bodies = [json.dumps({"input": [text]}).encode() for text in texts]
    loads = []
    # A child that is forked would inherit the threads of the inference library.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as client:
        for number, (share, server) in enumerate(itertools.product(shares, servers)):
            progress(f"{server}, load {share:g}", number, steps)
            engine.reset_tally()  # what other servers answered must not guide the scheduler
            with _served(engine, server) as port:
                # The same texts arrive at the same times at every server.
                sent = client.submit(_send, port, bodies, share * full, seconds).result()
            loads.append(_summary(server, share, share * full, seconds, *sent))
    return full, loads


def _summary(
    server: str, share: float, rate: float, seconds: float, requests: int, found: list[Any]
) -> Load:
    times, layers, ends = np.array(found or [(np.nan, np.nan, np.nan)], np.float64).T
    percentiles = np.percentile(1000 * times, [50, 99])
    return Load(
        server=server,
        share=share,
        rate=rate,
        seconds=seconds,
        requests=requests,
        answered=len(found),
        per_second=len(found) / max(seconds, float(ends.max())),
        mean_ms=float(1000 * times.mean()),
        p50_ms=float(percentiles[0]),
        p99_ms=float(percentiles[1]),
        mean_layer=float(layers.mean()),
    )


@contextmanager
def _served(engine: Engine, server: str) -> Iterator[int]:
    """A server on a free port."""
    import uvicorn

    from ..runtime.serving.metrics import Metrics
    from ..runtime.serving.server import listen, make_app

    metrics = Metrics(engine)
    rows: Any
    if server == SCHEDULER:
        rows = Scheduler(engine, _MOST_ROWS, metrics)
    elif server == BATCHES:
        rows = _Batches(engine, Budget(exit=engine.manifest.exits[-1]))
    else:
        rows = _Threads(engine, engine.rule)
    config = uvicorn.Config(
        make_app(engine, rows, metrics),
        log_config=None,
        log_level="critical",  # a request that is still open at the end is not an error
        access_log=False,
        lifespan="off",
        timeout_keep_alive=3600,  # otherwise a request may meet a connection that is closed
    )
    http = uvicorn.Server(config)
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=http.run, args=[[listener]], daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            http.should_exit = http.force_exit = True
            thread.join()
            rows.close()


def _send(
    port: int, bodies: Sequence[bytes], rate: float, seconds: float
) -> tuple[int, list[tuple[float, int, float]]]:
    """The client: how many requests were sent, and of each answer its time, layer and end."""
    return asyncio.run(_Client(port).send(bodies, rate, seconds, random.Random(rate)))


class _Client:
    """Each connection is for one request at a time, and is used again once that is answered."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._found: list[tuple[float, int, float]] = []

    async def send(
        self, bodies: Sequence[bytes], rate: float, seconds: float, choose: random.Random
    ) -> tuple[int, list[tuple[float, int, float]]]:
        await asyncio.wait_for(self._ask(bodies[0], time.perf_counter(), 0.0), 60)
        self._found.clear()
        begun = time.perf_counter()
        due, tasks = begun, []
        while (due := due + choose.expovariate(rate)) < begun + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.ensure_future(self._ask(choose.choice(bodies), due, begun)))
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_PATIENCE_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for _, writer in self._idle:
            writer.close()
        return len(tasks), self._found

    async def _ask(self, body: bytes, due: float, begun: float) -> None:
        reader, writer = (
            self._idle.pop()
            if self._idle
            else await asyncio.open_connection("127.0.0.1", self._port)
        )
        writer.write(b"%sContent-Length: %d\r\n\r\n%s" % (_HEAD, len(body), body))
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split(None, 1)[0])
            content = await reader.readexactly(length)
        except BaseException:  # also if this task is cancelled, because the answer took too long
            writer.close()
            raise
        self._idle.append((reader, writer))
        if head.split(None, 2)[1] == b"200":
            now = time.perf_counter()
            self._found.append((now - due, json.loads(content)["data"][0]["layer"], now - begun))
