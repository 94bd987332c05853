"""Many threads ask one scheduler, with cancellations, deadlines and one failing row in a thousand.

pytest -m slow tests/soak/test_scheduler_soak.py --seconds 600
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.runtime import EncodedRow, Engine, FPabee, OverloadedError
from fpabee.runtime.agreement import exits_near_ties
from fpabee.runtime.chain import Chain
from fpabee.runtime.serving import Scheduler

from ..conftest import WORDS

_BAD = "the the the alarm mum mum"
_THREADS = 8
_WAIT = 120


class _MadeUpError(Exception):
    pass


@pytest.mark.slow
def test_no_answer_is_lost_or_wrong(
    engines: Mapping[str, Path], pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = random.Random(5)
    texts = [" ".join(choose.choices(WORDS, k=choose.randint(1, 40))) for _ in range(200)]
    rule = FPabee(threshold=1.2)
    begin = Chain.begin

    with Engine.load(engines["bert"], rule=rule, threads=1) as engine:
        expected = [engine.predict([text])[0] for text in texts]
        logits = np.concatenate([engine.trace([text]).logits for text in texts], axis=1)
        near = exits_near_ties(logits, rule, engine.manifest.task, 1e-5)
        (bad,) = engine.encode([_BAD])
        engine.reset_tally()

        def fails(chain: Chain[Any], rows: Sequence[EncodedRow], *rest: Any) -> Any:
            if any(np.array_equal(row.input_ids, bad.input_ids) for row in rows):
                raise _MadeUpError
            return begin(chain, rows, *rest)

        monkeypatch.setattr(Chain, "begin", fails)

        def ask(seed: int) -> Counter[str]:
            choose = random.Random(seed)
            found: Counter[str] = Counter()
            while time.monotonic() < ends:
                batch: list[tuple[int, float | None, Any]] = []
                for _ in range(choose.randint(1, 40)):
                    number = choose.randrange(len(texts)) if choose.random() > 1e-3 else -1
                    text = _BAD if number < 0 else texts[number]
                    limit = choose.choice([None, None, choose.uniform(-1, 20)])
                    try:
                        batch.append((number, limit, scheduler.submit(text, limit)))
                    except OverloadedError:
                        found["refused"] += 1
                for _, _, future in choose.sample(batch, len(batch) // 10):
                    future.cancel()
                for number, limit, future in batch:
                    try:
                        answer = future.result(_WAIT)
                    except CancelledError:
                        found["cancelled"] += 1
                        continue
                    except _MadeUpError:
                        assert number < 0
                        found["failed"] += 1
                        continue
                    assert number >= 0
                    found["answered"] += 1
                    found["limited"] += answer.deadline_limited
                    if not answer.deadline_limited and not near[number]:
                        assert answer.exit == expected[number].exit
                        assert answer.labels == expected[number].labels
                    assert limit is not None or not answer.deadline_limited
            return found

        with Scheduler(engine, max_rows=200) as scheduler:
            ends = time.monotonic() + pytestconfig.getoption("--seconds")
            with ThreadPoolExecutor(_THREADS) as pool:
                counts = sum(pool.map(ask, range(_THREADS)), Counter[str]())
            assert scheduler.unanswered == 0
        print(dict(counts))
        assert counts["answered"] > 100
        # A row may be cancelled just when its answer has been counted.
        assert 0 <= engine.tally.rows - counts["answered"] <= counts["cancelled"]
