"""Deadlines: the deepest exit that meets them, with made-up times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpabee.runtime import (
    Budget,
    Engine,
    Entropy,
    ExitRule,
    FPabee,
    FpabeeError,
    InputError,
    RuleError,
)
from fpabee.runtime import engine as engine_module
from fpabee.runtime.backends.shapes import Limits
from fpabee.runtime.deadline import ExitTimes
from fpabee.runtime.encoding import Text

LIMITS = Limits(max_batch=16, max_sequence=100, group_tokens=128)
TEXTS: list[Text] = ["the film is not bad", "rain", ("turn the lights", "off"), "", "play music"]
NEVER = FPabee(threshold=-1.0)


class Device:
    """Takes 1 ms per token for segment 1 and 2 ms for the others, and records its runs."""

    def __init__(self, segments: int = 3) -> None:
        self.runs: list[tuple[int, int]] = []
        self.segments = segments

    def __call__(self, rows: int, tokens: int) -> list[float]:
        self.runs.append((rows, tokens))
        return [rows * tokens * 1e-3 * (1 if s == 0 else 2) for s in range(self.segments)]


@given(rows=st.integers(1, 16), tokens=st.integers(8, 100))
def test_proportional_times_are_reproduced(rows: int, tokens: int) -> None:
    # Groups are never larger than the token budget.
    rows = min(rows, LIMITS.group_tokens // tokens)
    if rows:
        times = ExitTimes(LIMITS, range(1, 4), Device())(rows, tokens)
        np.testing.assert_allclose(times, rows * tokens * 1e-3 * np.array([1, 2, 2]))


def test_each_shape_is_measured_once() -> None:
    device = Device()
    times = ExitTimes(LIMITS, range(1, 4), device)
    assert times.lengths == (8, 16, 32, 64, 100)
    times(1, 20)
    assert set(device.runs) == {(1, 16), (1, 32)}
    before = len(device.runs)
    times(1, 30)
    times(1, 17)
    assert len(device.runs) == before
    times(3, 16)
    assert set(device.runs[before:]) == {(8, 16)}


def test_a_target_with_fixed_lengths_is_measured_at_those() -> None:
    device = Device()
    limits = Limits(16, 64, 128, batch_sizes=(1, 16), sequence_lengths=(16, 64))
    assert ExitTimes(limits, range(1, 4), device)(1, 20)[0] == pytest.approx(64e-3)
    assert set(device.runs) == {(1, 64)}


@given(
    st.lists(st.tuples(st.integers(1, 2), st.integers(1, 64)), min_size=1, max_size=4),
    st.floats(-1, 3, allow_nan=False),
)
def test_the_deepest_exit_fits_and_the_next_does_not(
    groups: list[tuple[int, int]], seconds: float
) -> None:
    times = ExitTimes(LIMITS, range(1, 4), Device())
    deepest = times.deepest(groups, seconds)
    total = np.cumsum(sum(times(*group) for group in groups))
    assert deepest == 0 or total[deepest - 1] <= seconds
    assert deepest == 3 or total[deepest] > seconds


def test_no_rows_meet_every_deadline() -> None:
    assert ExitTimes(LIMITS, range(1, 4), Device()).deepest([], -1.0) == 3


@pytest.fixture
def engine(engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine whose segments take 10 ms each for any group, and everything else no time."""
    monkeypatch.setattr(engine_module, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(Engine, "time_exits", lambda *_: [0.01] * 3)
    with Engine.load(engines["bert"], threads=1) as engine:
        yield engine


@pytest.mark.parametrize(
    ("deadline_ms", "exit_number", "deadline_missed"),
    [
        (math.inf, 3, False),
        (np.float32(30.1), 3, False),
        (29.9, 2, False),
        (10.1, 1, False),
        (9.9, 1, True),
        (-5, 1, True),
    ],
)
def test_rows_go_as_deep_as_the_deadline_allows(
    engine: Engine, deadline_ms: float, exit_number: int, deadline_missed: bool
) -> None:
    answers = engine.predict(TEXTS, rule=NEVER, deadline_ms=deadline_ms)
    assert [(a.exit, a.deadline_limited, a.deadline_missed) for a in answers] == [
        (exit_number, exit_number < 3, deadline_missed)
    ] * len(TEXTS)
    expected = engine.predict(TEXTS, rule=Budget(exit=exit_number))
    assert [a.probabilities for a in answers] == [a.probabilities for a in expected]


def test_only_rows_that_their_rule_would_continue_are_limited(engine: Engine) -> None:
    for rule in (FPabee(threshold=0.3), Entropy(threshold=1.1), Entropy(threshold=1.1, min_exit=3)):
        own = engine.predict(TEXTS, rule=rule)
        for deadline_ms, last in ((10.5, 1), (20.5, 2)):
            answers = engine.predict(TEXTS, rule=rule, deadline_ms=deadline_ms)
            assert [a.exit for a in answers] == [min(o.exit, last) for o in own]
            assert [a.deadline_limited for a in answers] == [o.exit > last for o in own]
    assert len({o.exit for o in engine.predict(TEXTS, rule=FPabee(threshold=0.3))}) > 1


def test_the_deadline_is_for_the_whole_call(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each text has its own window and length, so each of its segments takes 10 ms.
    monkeypatch.setattr(engine.model, "window_tokens", 1)
    assert {a.exit for a in engine.predict(TEXTS, rule=NEVER, deadline_ms=149)} == {2}
    assert {a.exit for a in engine.predict(TEXTS, rule=NEVER, deadline_ms=151)} == {3}
    # In a stream, the deadline applies to each window.
    assert {a.exit for a in engine.stream(TEXTS, rule=NEVER, deadline_ms=29)} == {2}


def test_tokenization_counts_towards_the_deadline(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0.0, 0.015)
    monkeypatch.setattr(engine_module, "perf_counter", lambda: next(clock))
    assert engine.predict(["rain"], rule=NEVER, deadline_ms=30)[0].exit == 1
    assert engine.predict(["rain"], rule=NEVER, deadline_ms=35.1)[0].exit == 2


@pytest.mark.parametrize("rule", [NEVER, Entropy(threshold=9.0, min_exit=3), Budget(exit=3)])
def test_max_exit(engine: Engine, rule: ExitRule) -> None:
    for answers in (
        engine.predict(TEXTS, rule=rule, max_exit=2),
        list(engine.stream(TEXTS, rule=rule, max_exit=2)),
    ):
        assert [(a.exit, a.deadline_limited) for a in answers] == [(2, False)] * len(TEXTS)
    number: Any = np.int64(1)
    assert engine.predict(["rain"], full_depth=True, max_exit=number)[0].exit == 1
    # A deadline limits nothing if the call may not go deeper anyway.
    (answer,) = engine.predict(["rain"], rule=rule, max_exit=1, deadline_ms=15)
    assert (answer.exit, answer.deadline_limited) == (1, False)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_exit": 0}, RuleError, "max_exit is 0"),
        ({"max_exit": 4}, RuleError, "the exits of the model are 1 to 3"),
        ({"max_exit": "3"}, RuleError, "max_exit is '3'"),
        ({"deadline_ms": math.nan}, InputError, "deadline_ms is nan"),
        ({"deadline_ms": True}, InputError, "is True -> give milliseconds as a number"),
    ],
)
def test_impossible_limits_are_refused(
    engine: Engine, options: dict[str, float], error: type[FpabeeError], says: str
) -> None:
    call: Callable[..., object] = engine.predict
    with pytest.raises(error) as caught:
        call(["rain"], **options)
    assert says in str(caught.value)
    with pytest.raises(error):
        list(engine.stream(["rain"], **options))  # type: ignore[arg-type]


def test_real_times_are_measured_when_first_needed_or_before(engines: Mapping[str, Path]) -> None:
    with Engine.load(engines["bert"], threads=1) as engine:
        engine.warm_up(tokens=10)
        assert set(engine._times._known) == {(1, 8), (1, 16)}
        (answer,) = engine.predict(["the film"], rule=NEVER, deadline_ms=1e6)
        assert (answer.exit, answer.deadline_limited, answer.deadline_missed) == (3, False, False)
        assert all((times > 0).all() for times in engine._times._known.values())
