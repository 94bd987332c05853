"""The chain: whatever happens to groups, each row keeps what belongs to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fpabee.runtime import Budget, Engine
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.chain.groups import Group
from fpabee.runtime.rules.measures import Outputs
from fpabee.runtime.rules.runner import PatienceState

from ...closeness import assert_close
from ...doubles.calls import spoil_logits

TEXTS = ["rain", "the film is good", "not the plot", "sun and rain", "bad"]


@pytest.fixture
def engine(engines: Mapping[str, Path]) -> Iterator[Engine]:
    with Engine.load(engines["bert"], rule=Budget(exit=3)) as engine:
        yield engine


def group_of(engine: Engine, rows: list[int]) -> Group:
    encoded = engine.core.encode([TEXTS[row] for row in rows])
    return Group.of(
        np.array(rows),
        encoded,
        engine.core.in_use,
        math.inf,
    )


def state_of(group: Group) -> PatienceState:
    assert isinstance(group.state, PatienceState)
    return group.state


def test_some_rows_of_a_group_keep_what_belongs_to_them(engine: Engine) -> None:
    group = group_of(engine, [0, 1, 2])
    group.deadlines = np.array([100.0, 101.0, 102.0])
    state_of(group).streak = np.array([10, 11, 12])
    state_of(group).earlier = Outputs(np.arange(12.0).reshape(3, 4), ProblemType.SINGLE_LABEL)
    part = group.take(np.array([2, 1]))
    assert part.rows.tolist() == [2, 1]
    assert [len(row) for row in part.encoded] == part.lengths.tolist()
    assert part.deadlines.tolist() == [102.0, 101.0]
    assert state_of(part).streak.tolist() == [12, 11]
    earlier = state_of(part).earlier
    assert earlier is not None
    assert earlier.logits[:, 0].tolist() == [8.0, 4.0]


def test_rows_may_leave_while_their_segment_runs(engine: Engine) -> None:
    expected = engine.trace(TEXTS).logits[0]
    with engine.core.chain() as chain:
        group = group_of(engine, [0, 1, 2])
        chain.enqueue(group)
        chain.keep(group, np.array([False, True, True]))
        decision = chain.finish()
    assert decision.rows.tolist() == [1, 2]
    assert_close(decision.logits, expected[[1, 2]])


def test_rows_without_numbers_leave_and_are_not_answered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_logits(monkeypatch, rows=1)
    for rule, stopped, left in ((Budget(exit=1), [0, 2], []), (Budget(exit=2), [], [0, 2])):
        engine.core.in_use = engine.core.route(rule=rule)
        with engine.core.chain() as chain:
            decision = chain.step(group_of(engine, [0, 1, 2]))
        assert decision is not None
        settled = [] if decision.settled is None else decision.settled.rows.tolist()
        assert (decision.failed.tolist(), settled) == ([1], stopped)
        assert decision.group.rows.tolist() == left


@pytest.mark.usefixtures("joins")
def test_groups_that_would_be_too_large_together_are_not_joined(engine: Engine) -> None:
    with engine.core.chain() as chain:
        short = group_of(engine, [0, 4])
        long = group_of(engine, [1])
        assert (short.lengths.tolist(), long.lengths.tolist()) == ([3, 3], [6])
        limits = replace(short.limits, group_tokens=3 * 5)
        short.legs = (replace(short.legs[0], limits=limits),)
        chain.join(short, [long])
    assert (len(short), len(long)) == (2, 1)


@pytest.mark.usefixtures("joins")
def test_joined_rows_keep_what_belongs_to_them(engine: Engine) -> None:
    with engine.core.chain() as chain:
        encoded = engine.core.encode(TEXTS)
        depth = engine.trace(TEXTS).logits
        logits = np.arange(20.0).reshape(5, 4)  # those of each row tell it apart
        groups = []
        for rows in (np.arange(3), np.arange(3, 5)):
            group = group_of(engine, rows.tolist())
            chain.enqueue(group)
            chain.finish()
            state_of(group).streak = 10 + rows
            state_of(group).earlier = Outputs(logits[rows], ProblemType.SINGLE_LABEL)
            group.deadlines = np.array([100.0 + row for row in rows])
            groups.append(group)
        joined, other = groups
        chain.keep(joined, np.array([True, False, True]))
        chain.join(joined, [other])
        assert len(other) == 0
        going = [0, 2, 3, 4]
        assert joined.rows.tolist() == going
        assert joined.lengths.tolist() == [len(encoded[row]) for row in going]
        assert joined.deadlines.tolist() == [100.0 + row for row in going]
        assert state_of(joined).streak.tolist() == [10 + row for row in going]
        earlier = state_of(joined).earlier
        assert earlier is not None
        np.testing.assert_array_equal(earlier.logits, logits[going])
        chain.enqueue(joined)
        assert_close(chain.finish().logits, depth[1, going])
        assert len(chain.execution(joined)._taken) == 1, (
            "the hidden states of both groups were released"
        )
