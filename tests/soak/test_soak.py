"""Many threads ask one scheduler, with cancellations, deadlines and one failing row in a thousand.

Rows stop at exit 0 and later, and fail there and later. Every future must be finished exactly once,
and memory must stay flat. Then many clients ask one server, and some leave or send nonsense.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.runtime import EncodedRow, Engine, FPabee, OverloadedError
from fpabee.runtime.backends.host import HostExecution
from fpabee.runtime.exit_0 import ExitZero
from fpabee.runtime.serving import Scheduler

from ..child_process import MIB, memory_of
from ..closeness import exits_may_differ
from ..conftest import WORDS
from ..runtime.serving.test_serve import ask, served

_THREADS = 8
_WAIT = 120


class _MadeUpError(Exception):
    pass


class _Counted(Future[Any]):
    """A future that counts how often it was finished, and how often it then was cancelled."""

    twice = too_late = 0
    is_finished = False

    def set_running_or_notify_cancel(self) -> bool:
        _Counted.twice += self.is_finished
        self.is_finished = True
        goes_on = super().set_running_or_notify_cancel()
        _Counted.too_late += not goes_on
        return goes_on


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory in Linux's /proc")
def test_no_answer_is_lost_or_wrong(
    exit_0_engines: Mapping[str, Path],
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose = random.Random(5)
    texts = [" ".join(choose.choices(WORDS, k=choose.randint(1, 40))) for _ in range(200)]
    rule = FPabee(threshold=1.2, exit_0_threshold=0.6)
    begin = HostExecution.begin
    call = ExitZero.__call__
    called: list[None] = []  # no futures, to keep the memory flat

    with Engine.load(exit_0_engines["bert"], rule=rule, threads=1) as engine:
        expected = [engine.predict([text])[0] for text in texts]
        logits = np.concatenate([engine.trace([text]).logits for text in texts], axis=1)
        near = exits_may_differ(logits, rule, engine.manifest.task, first_exit=0)
        # The rows that fail at exit 0, and at segment 1.
        bad = [[answer.exit == 0 for answer in expected].index(stops) for stops in (True, False)]
        good = [number for number in range(len(texts)) if number not in bad]
        ids = [engine.core.encode([texts[number]])[0].input_ids for number in bad]
        engine.reset_tally()

        def check(rows: Sequence[EncodedRow], number: int) -> None:
            if any(np.array_equal(row.input_ids, ids[number]) for row in rows):
                raise _MadeUpError

        def begin_fails(execution: Any, rows: Sequence[EncodedRow], bucket: Any) -> Any:
            check(rows, 1)
            return begin(execution, rows, bucket)

        def exit_0_fails(exit_0: ExitZero, rows: Sequence[EncodedRow]) -> Any:
            check(rows, 0)
            return call(exit_0, rows)

        monkeypatch.setattr(HostExecution, "begin", begin_fails)
        monkeypatch.setattr(ExitZero, "__call__", exit_0_fails)
        monkeypatch.setattr("fpabee.runtime.serving.scheduler.Future", _Counted)

        def ask(seed: int) -> Counter[str]:
            choose = random.Random(seed)
            found: Counter[str] = Counter()
            while time.monotonic() < ends:
                batch: list[tuple[int, float | None, Any]] = []
                for _ in range(choose.randint(1, 40)):
                    number = choose.choice(bad if choose.random() < 1e-3 else good)
                    limit = choose.choice([None, None, max(0.0, choose.uniform(-1, 20))])
                    try:
                        future = scheduler.submit(texts[number], limit)
                    except OverloadedError:
                        found["refused"] += 1
                        continue
                    future.add_done_callback(lambda _: called.append(None))
                    batch.append((number, limit, future))
                for _, _, future in choose.sample(batch, len(batch) // 10):
                    future.cancel()
                for number, limit, future in batch:
                    try:
                        answer = future.result(_WAIT)
                    except CancelledError:
                        found["cancelled"] += 1
                        continue
                    except _MadeUpError:
                        found["failed"] += 1
                        continue
                    # A deadline may stop a row at exit 0, before it fails.
                    assert number in good or (answer.deadline_limited and answer.exit == 0)
                    found["answered"] += 1
                    found["limited"] += answer.deadline_limited
                    found["at exit 0"] += answer.exit == 0
                    if not answer.deadline_limited and not near[number]:
                        assert answer.exit == expected[number].exit
                        assert answer.labels == expected[number].labels
                    assert limit is not None or not answer.deadline_limited
            return found

        with Scheduler(engine, max_rows=200) as scheduler:
            seconds = pytestconfig.getoption("--seconds")
            ends = time.monotonic() + seconds
            with ThreadPoolExecutor(_THREADS) as pool:
                found = pool.map(ask, range(_THREADS))
                time.sleep(seconds / 3)
                warm = memory_of("VmRSS")
                counts = sum(found, Counter[str]())
            assert memory_of("VmRSS") - warm <= max(0.05 * warm, 32 * MIB)
            assert scheduler._unanswered == 0
        print(dict(counts))
        assert counts["answered"] > 100
        assert counts["at exit 0"] > 10
        assert _Counted.twice == 0
        assert len(called) == counts["answered"] + counts["failed"] + counts["cancelled"]
        # Each answered row was counted once, even if it was cancelled just then.
        assert counts["answered"] <= engine.tally.rows <= counts["answered"] + _Counted.too_late


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory in Linux's /proc")
def test_a_server_loses_no_answer(
    exit_0_engines: Mapping[str, Path], pytestconfig: pytest.Config
) -> None:
    choose = random.Random(5)
    folder = exit_0_engines["bert"]
    lengths = [*(choose.randint(1, 40) for _ in range(100)), 3000, 5000]
    texts: list[Any] = [" ".join(choose.choices(WORDS, k=length)) for length in lengths]
    texts += [(choose.choice(texts), choose.choice(texts)) for _ in range(50)]
    with Engine.load(folder, threads=1) as engine:
        expected = engine.predict(texts)
        logits = engine.trace(texts).logits
        near = exits_may_differ(logits, engine.rule, engine.manifest.task, first_exit=0)
    bad = [{"input": 5}, {"input": ["a"] * 300}, {"input": texts[100], "truncate": False}]

    def client(seed: int) -> int:
        choose = random.Random(seed)
        answered = 0
        while time.monotonic() < ends:
            numbers = choose.choices(range(len(texts)), k=choose.choice([1, 1, 1, 8]))
            asked = {"input": [texts[number] for number in numbers]}
            does = choose.random()
            if does < 0.1:
                with socket.create_connection(("127.0.0.1", port)) as left:
                    body = json.dumps(asked).encode()
                    head = "POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length:"
                    left.sendall(f"{head} {len(body)}\r\n\r\n".encode() + body)
            elif does < 0.2:
                assert ask(port, "/classify", choose.choice(bad))[0] in (400, 413)
            else:
                status, found = ask(port, "/classify", asked)
                assert status == 200
                for number, answer in zip(numbers, found["data"], strict=True):
                    one = expected[number]
                    assert answer["truncated"] == one.truncated
                    if not near[number]:
                        assert (answer["exit"], tuple(answer["labels"])) == (one.exit, one.labels)
                answered += len(numbers)
        return answered

    seconds = pytestconfig.getoption("--seconds")
    with served(folder, "--threads", "1") as (process, port):
        ends = time.monotonic() + seconds
        with ThreadPoolExecutor(_THREADS) as pool:
            answers = pool.map(client, range(_THREADS))
            time.sleep(seconds / 3)
            warm = memory_of("VmRSS", process.pid)
            assert sum(answers) > 50
        assert memory_of("VmRSS", process.pid) - warm <= max(0.05 * warm, 32 * MIB)
