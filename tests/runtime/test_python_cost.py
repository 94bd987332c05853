"""How many functions our own Python calls for a request and for a segment, counted, not timed.

A segment of a small model takes less than a millisecond, so that a slow path in our own code shows
in every answer. The number of calls is the same on every machine, unlike the time.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fpabee.runtime import Budget, Confidence, Engine, ExitRule, FPabee

from ..conftest import WORDS
from ..doubles.device import install

NEVER = FPabee(threshold=0.0)  # computes a score at every exit, and stops no row
TEXTS = [" ".join(WORDS[start : start + 6]) for start in range(8)]

# Calls of functions in Python and C, about 10 % above what was counted when this was written: of a
# request with its first segment, and of each further segment, by the target and the number of rows.
MOST_CALLS = {
    ("cpu", 1): (420, 82),
    ("cpu", 8): (950, 82),
    ("stepwise", 1): (480, 123),
    ("stepwise", 8): (1010, 123),
}
DOUBLES = str(Path(install.__code__.co_filename).parent)


def calls_of(function: Callable[[], object]) -> Counter[str]:
    """Counts the calls that a function makes in this thread, by what is called.

    A call of a double is one call, whatever the double does.
    """
    counts = Counter[str]()
    depth = 0

    def count(frame: FrameType, event: str, called: Any) -> None:
        nonlocal depth
        code = frame.f_code
        is_double = code.co_filename.startswith(DOUBLES)
        if event == "return":
            depth -= is_double
        elif depth:
            depth += event == "call" and is_double
        elif event == "call":
            counts[f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_name}"] += 1
            depth += is_double
        elif event == "c_call":
            counts[f"{called.__module__ or ''} {called.__qualname__}"] += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return counts


def test_calls_of_a_text_that_stops_at_exit_0(exit_0_engines: Mapping[str, Path]) -> None:
    rule = Confidence(threshold=0.9, exit_0_threshold=0.0)
    with Engine.load(exit_0_engines["bert"], threads=1, rule=rule) as engine:
        assert [p.exit for p in engine.predict(TEXTS[:1])] == [0]
        counts = calls_of(lambda: engine.predict(TEXTS[:1]))
    assert counts.total() <= 310, counts.most_common(20)


@pytest.mark.parametrize(("where", "rows"), MOST_CALLS)
def test_calls_of_a_request_and_of_a_segment(
    where: str, rows: int, engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, and on a double of a GPU."""

    def calls(rule: ExitRule) -> Counter[str]:
        for _ in range(3):  # loads the segments and fills caches
            engine.predict(TEXTS[:rows], rule=rule)
        return calls_of(lambda: engine.predict(TEXTS[:rows], rule=rule))

    folder = engine_copy()
    target = None if where == "cpu" else install(monkeypatch, folder).target
    with Engine.load(folder, target, threads=1) as engine:
        request = calls(Budget(exit=1))
        further = calls(NEVER)
    further.subtract(request)
    counted = [("a request", 1, request), ("further segments", 2, further)]
    found = {what: counts.total() / segments for what, segments, counts in counted}
    most = dict(zip(found, MOST_CALLS[where, rows], strict=True))
    tops = "".join(
        f"\n{what}: " + ", ".join(f"{number} {name}" for name, number in counts.most_common(15))
        for what, _, counts in counted
    )
    assert all(found[what] <= most[what] for what in found), f"{found}, at most {most}{tops}"
