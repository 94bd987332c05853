"""Deadlines, with a clock on which each segment takes 10 ms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

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
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.backends.host import HostBackend, HostExecution
from fpabee.runtime.encoding import Text
from fpabee.runtime.rules.measures import Outputs
from fpabee.runtime.rules.runner import RuleRunner

from ..doubles.calls import before
from ..doubles.clock import Clock

TEXTS: list[Text] = ["the film is not bad", "rain", ("turn the lights", "off"), "", "play music"]
NEVER = FPabee(threshold=-1.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Every segment takes 10 ms for any group, and everything else takes no time."""
    clock = Clock()
    before(monkeypatch, HostExecution, "enqueue", lambda *_: clock.wait(0.01))
    return clock


@pytest.fixture
def engine(engines: Mapping[str, Path], clock: Clock) -> Iterator[Engine]:
    with Engine.load(engines["bert"], threads=1) as engine:
        engine.core.clock = clock
        yield engine


@pytest.mark.parametrize(
    ("deadline_ms", "exit_number", "deadline_missed"),
    [
        (math.inf, 3, False),
        (np.float32(30.1), 3, False),
        (29.9, 2, False),
        (10.1, 1, False),
        (9.9, 1, True),
        (0, 1, True),
    ],
)
def test_rows_go_as_deep_as_the_deadline_allows(
    engine: Engine, deadline_ms: float, exit_number: int, deadline_missed: bool
) -> None:
    for texts in (TEXTS, TEXTS[:1]):
        answers = engine.predict(texts, rule=NEVER, deadline_ms=deadline_ms)
        assert [(a.exit, a.deadline_limited, a.deadline_missed) for a in answers] == [
            (exit_number, exit_number < 3, deadline_missed)
        ] * len(texts)
        expected = engine.predict(texts, rule=Budget(exit=exit_number))
        assert [a.probabilities for a in answers] == [e.probabilities for e in expected]


def test_only_rows_that_their_rule_would_continue_are_limited(engine: Engine) -> None:
    for rule in (FPabee(threshold=0.3), Entropy(threshold=1.1), Entropy(threshold=1.1, min_exit=3)):
        own = engine.predict(TEXTS, rule=rule)
        for deadline_ms, last in ((10.5, 1), (20.5, 2)):
            answers = engine.predict(TEXTS, rule=rule, deadline_ms=deadline_ms)
            assert [a.exit for a in answers] == [min(o.exit, last) for o in own]
            assert [a.deadline_limited for a in answers] == [o.exit > last for o in own]
    assert len({o.exit for o in engine.predict(TEXTS, rule=FPabee(threshold=0.3))}) > 1


@pytest.mark.usefixtures("joins")
def test_joined_groups_keep_the_deadline(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups whose rows another one has taken are not asked again."""
    stops = np.array([True, False])

    def decide(runner: Any, exit_number: int, state: Any, logits: Any) -> Any:
        state.earlier = Outputs(logits, ProblemType.SINGLE_LABEL)
        return (np.resize(stops, len(logits)) if exit_number == 1 else None), None

    monkeypatch.setattr(RuleRunner, "decide", decide)
    route = engine.core.in_use
    (leg,) = route.legs
    leg = dataclasses.replace(leg, limits=dataclasses.replace(leg.limits, max_batch=2))
    engine.core.in_use = dataclasses.replace(route, legs=(leg,))
    # Three groups of two rows take 10 ms each for segment 1. The rest of two is joined and runs
    # segment 2 until 40 ms, and then nothing else would be in time.
    answers = engine.predict(["rain"] * 6, deadline_ms=45)
    assert sorted(answer.exit for answer in answers) == [1, 1, 1, 1, 2, 2]
    assert [answer.deadline_limited for answer in answers].count(True) == 3


def test_the_deadline_is_for_the_whole_call(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each text has its own window, so each of its segments takes 10 ms.
    monkeypatch.setattr(engine.core, "window_bytes", 1)
    answers = engine.predict(TEXTS, rule=NEVER, deadline_ms=85)
    assert [a.exit for a in answers] == [3, 3, 2, 1, 1]
    assert [a.deadline_limited for a in answers] == [False, False, True, True, True]
    assert {a.deadline_missed for a in answers} == {True}, "all answers come at the end"


def test_tokenization_counts_towards_the_deadline(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(monkeypatch, engine.core, "windows", lambda *_: clock.wait(0.015))
    assert engine.predict(["rain"], rule=NEVER, deadline_ms=34)[0].exit == 1
    assert engine.predict(["rain"], rule=NEVER, deadline_ms=36)[0].exit == 2


def test_waiting_for_an_execution_counts_towards_the_deadline(
    exit_0_engines: Mapping[str, Path], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then exit 0 answers, and no segment runs."""
    before(monkeypatch, HostBackend, "check_out", lambda *_: clock.wait(0.5))
    with Engine.load(exit_0_engines["bert"], threads=1) as engine:
        engine.core.clock = clock
        started = clock.now  # making the folder has run segments, too
        (answer,) = engine.predict(["rain"], rule=NEVER, deadline_ms=50)
        assert answer.exit == 0
        assert answer.deadline_limited
        assert clock.now - started == pytest.approx(0.5)


@pytest.mark.parametrize("rule", [NEVER, Entropy(threshold=9.0, min_exit=3), Budget(exit=3)])
def test_max_exit(engine: Engine, rule: ExitRule) -> None:
    for answers in (
        engine.predict(TEXTS, rule=rule, max_exit=2),
        list(engine.stream(TEXTS, rule=rule, max_exit=2)),
    ):
        assert [(a.exit, a.deadline_limited) for a in answers] == [(2, False)] * len(TEXTS)
    number: Any = np.int64(1)
    assert engine.predict(["rain"], max_exit=number)[0].exit == 1
    # A deadline limits nothing if the call may not go deeper anyway.
    (answer,) = engine.predict(["rain"], rule=rule, max_exit=1, deadline_ms=15)
    assert (answer.exit, answer.deadline_limited) == (1, False)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_exit": 0}, RuleError, "max_exit is 0"),
        ({"max_exit": 4}, RuleError, "the exits of the model are 1 to 3"),
        ({"max_exit": "3"}, RuleError, "max_exit is '3'"),
        ({"max_exit": 2, "full_depth": True}, RuleError, "full_depth"),
        ({"deadline_ms": -1}, InputError, "is -1 -> give milliseconds as a number from 0"),
        ({"deadline_ms": math.nan}, InputError, "deadline_ms is nan"),
        ({"deadline_ms": 10**400}, InputError, "give milliseconds as a number"),
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


def test_warming_up_runs_every_length_of_a_call(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.load(engines["bert"], threads=1) as engine:
        time_exits = Mock(wraps=engine.core.time_exits)
        monkeypatch.setattr(engine.core, "time_exits", time_exits)
        engine.warm_up(rows=2, tokens=10)
    assert {call.args for call in time_exits.call_args_list} == {(2, 8), (2, 16)}
