"""Watching a promise: the test is exact, rows are chosen within the budget, and answers stay."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.runtime import (
    BackendError,
    Budget,
    Certificate,
    Engine,
    InputError,
    Promise,
    RuleError,
    read_manifest,
    watch,
)
from fpabee.runtime.artifact.exits import Exits
from fpabee.runtime.backends.host import HostExecution
from fpabee.runtime.watch import MOST_WAITING, RateTest, Watch, Watched

from ..conftest import WORDS
from ..doubles.calls import before, spoil_logits
from .watching import EARLY, certify, count_changes, watched_by

TEXTS = [" ".join(WORDS[n % 30 : n % 30 + 1 + n % 7]) for n in range(210)]


@pytest.fixture
def chooser(promised: Callable[..., Path]) -> Watch:
    folder = promised()
    manifest = read_manifest(folder)
    return Watch(manifest, manifest.default_target, 1.0, "early")


def seen_by(chooser: Watch) -> Watched:
    watched = chooser.watched("early")
    assert watched is not None
    return watched


def test_no_bet_is_expected_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over all sequences of rows at exactly the permitted rate is the first capital."""
    monkeypatch.setattr(watch, "_ROWS_OF_A_START", 3)
    expected = 0.0
    for rows in itertools.product((False, True), repeat=10):
        test = RateTest(0.2, level=1e-9)
        for is_changed in rows:
            test.add(is_changed)
        chance = 0.2 ** sum(rows) * 0.8 ** (10 - sum(rows))
        expected += chance * (sum(test._bets) + test._not_begun)
    assert expected == pytest.approx(1.0)


def first_alarm(changed: np.ndarray, permitted: float) -> float:
    """After how many rows a test shows that a promise is broken; infinity if it does not."""
    test = RateTest(permitted, watch.FALSE_ALARM)
    for number, is_changed in enumerate(changed.tolist(), start=1):
        test.add(is_changed)
        if test.is_broken:
            return number
    return np.inf


def test_a_promise_that_holds_gives_no_alarm_and_a_broken_one_does() -> None:
    """A small version of `scripts/watch_study.py`."""
    coin = np.random.default_rng(0)
    assert all(first_alarm(coin.random(3000) < 0.01, 0.01) == np.inf for _ in range(10))
    delays = [first_alarm(coin.random(2000) < 0.03, 0.01) for _ in range(60)]
    assert np.median(delays) <= 650
    late = [np.append(coin.random(3000) < 0.01, coin.random(2000) < 0.03) for _ in range(9)]
    assert np.median([first_alarm(changed, 0.01) for changed in late]) <= 3000 + 1300


def test_the_interval_covers_the_rate_at_all_times() -> None:
    coin = np.random.default_rng(0)
    missed = 0
    for _ in range(100):
        test = RateTest(0.05, watch.FALSE_ALARM)
        covers = []
        for number, is_changed in enumerate(coin.random(300) < 0.1):
            test.add(bool(is_changed))
            if number % 5 == 0:
                low, high = test.interval()
                assert 0 <= low <= test.changed / test.rows <= high <= 1
                covers.append(low <= 0.1 <= high)
        missed += not all(covers)
    assert missed <= 5
    assert high - low < 0.15


@pytest.mark.parametrize(("rows_at_once", "spare"), [(1, 3), (500, 30)])
@pytest.mark.parametrize("layers", [[1, 1, 3], [1], [2], [3]])
def test_no_more_is_spent_than_may_be(
    layers: list[int], rows_at_once: int, spare: int, chooser: Watch
) -> None:
    coin = np.random.default_rng(0)
    chooser._coin = random.Random(1)
    logits = np.zeros(4, np.float32)
    chosen = 0
    spent = 0
    answered = 0
    for _ in range(0, 8000, rows_at_once):
        exits = coin.choice(layers, rows_at_once)
        for row, layer in zip(chooser.choose("early", rows_at_once), exits, strict=True):
            if row is not None:
                chosen += 1
                spent += 3 - layer
                if row.stopped(layer, logits):
                    assert not row.stopped(3, logits)
        answered += exits.sum()
        chooser.ran(exits, Exits.of_layers((1, 2, 3)))
        assert spent <= 0.01 * (answered + spent) + spare
    watched = seen_by(chooser)
    assert chosen == watched.rows
    if layers == [3]:
        assert chosen > 4000, "rows that use all layers cost nothing"
    else:
        assert spent >= 0.008 * (answered + spent)
        assert watched.row_share == pytest.approx(chosen / 8000, rel=0.25)


def test_results_count_in_the_order_of_arrival(chooser: Watch) -> None:
    chooser._pays = 1e9  # all rows are chosen
    first, second, third = chooser.choose("early", 3)
    other = np.eye(4, dtype=np.float32)
    assert second.stopped(1, other[0])
    assert not second.stopped(3, other[1])
    assert first.stopped(1, other[0])
    assert seen_by(chooser).rows == 0
    first.lost()
    watched = seen_by(chooser)
    assert (watched.rows, watched.changed_answers) == (1, 1)
    assert not third.stopped(3, other[0])
    assert not third.stopped(3, other[1]), "it is done"
    watched = seen_by(chooser)
    assert (watched.rows, watched.changed_answers) == (2, 1)


def test_no_coin_is_tossed_while_many_rows_wait(chooser: Watch) -> None:
    chooser._pays = 1e9  # all rows are chosen
    rows = chooser.choose("early", MOST_WAITING)
    for row in rows:
        assert not seen_by(chooser).is_paused
        row.stopped(1, np.zeros(4, np.float32))
    assert seen_by(chooser).is_paused
    assert not any(chooser.choose("early", 100))
    rows[5].lost()
    assert all(chooser.choose("early", 1))


def test_answers_stay_and_are_compared_with_full_depth(watching: Engine) -> None:
    watch_of_engine = watching.core.watch
    watching.core.watch = None
    expected = watching.predict(TEXTS)
    full_depth = watching.predict(TEXTS, full_depth=True)
    watching.core.watch = watch_of_engine
    before = watching.tally
    found = watching.predict(TEXTS)
    assert [answer.exit for answer in found] == [answer.exit for answer in expected]
    assert [answer.labels for answer in found] == [answer.labels for answer in expected]
    assert watching.tally.rows == before.rows + len(TEXTS)
    assert len({answer.exit for answer in found}) > 2
    watched = watched_by(watching)
    changed = count_changes(found, full_depth)
    assert changed > 0
    assert (watched.rows, watched.changed_answers) == (len(TEXTS), changed)
    assert watched.estimate == changed / len(TEXTS)
    again = [*watching.stream(TEXTS)]
    assert [answer.exit for answer in again] == [answer.exit for answer in expected]
    assert watched_by(watching).rows == 2 * len(TEXTS)
    assert watch_of_engine is not None
    assert watch_of_engine._waiting == 0


@pytest.mark.parametrize(
    "asked",
    [{"full_depth": True}, {"max_exit": 2}, {"deadline_ms": 1e6}, {"rule": Budget(exit=2)}],
    ids=str,
)
def test_rows_with_wishes_of_their_own_are_not_watched(
    asked: dict[str, Any], promised: Callable[..., Path]
) -> None:
    with Engine.load(promised(), watch=100.0) as engine:
        engine.predict(TEXTS, **asked)
        engine.trace(TEXTS)
        engine.warm_up()
        assert watched_by(engine).rows == 0
        engine.predict(TEXTS)
        assert watched_by(engine).rows == len(TEXTS)


def test_decisions_by_threshold_count(
    promised: Callable[..., Path],
) -> None:
    """A label that is named by a threshold decides, not the most probable one."""
    folder = promised()
    with Engine.load(folder, watch=100.0) as engine:
        label = engine.labels[0]
        early = engine.predict(TEXTS)
        late = engine.predict(TEXTS, full_depth=True)
    promises = (Promise(of="changed_answers", at_most=1.0, rows=300),)
    flags = Certificate(confidence=95.0, promises=promises, label_thresholds={label: 0.3})
    certify(folder, early=flags)
    flagged = [
        (answer.probabilities[0] > 0.3, full.probabilities[0] > 0.3)
        for answer, full in zip(early, late, strict=True)
    ]
    expected = sum(one != other for one, other in flagged)
    assert expected != count_changes(early, late)
    with Engine.load(folder, watch=100.0) as engine:
        engine.predict(TEXTS)
        assert watched_by(engine).changed_answers == expected


def test_a_point_at_full_depth_is_watched_for_nothing(promised: Callable[..., Path]) -> None:
    with Engine.load(promised(deep=Budget(exit=3)), watch=1.0) as engine:
        engine.core.watch._promises["deep"].mean_depth = 3.0  # type: ignore[union-attr]
        engine.predict(TEXTS)
        watched = watched_by(engine)
        assert (watched.rows, watched.changed_answers) == (len(TEXTS), 0)
        assert watched.row_share == 1


def test_each_point_has_a_test_of_its_own(promised: Callable[..., Path]) -> None:
    folder = promised(early=EARLY, deep=Budget(exit=2))
    with Engine.load(folder, watch=100.0) as engine:
        engine.predict(TEXTS)
        changed = watched_by(engine).changed_answers
        engine.use("deep")
        assert watched_by(engine).rows == 0
        engine.predict(TEXTS[:7])
        assert (watched_by(engine).operating_point, watched_by(engine).rows) == ("deep", 7)
        engine.use("early")
        assert (watched_by(engine).rows, watched_by(engine).changed_answers) == (
            len(TEXTS),
            changed,
        )
        assert engine.core.watch is not None
        tests = [promise.test for promise in engine.core.watch._promises.values()]
        assert [test._enough for test in tests] == [2 / watch.FALSE_ALARM] * 2
    with Engine.load(folder, watch=100.0) as again:
        assert watched_by(again).rows == 0, "a new process begins anew"


def test_a_point_without_a_promise_is_used_and_not_watched(promised: Callable[..., Path]) -> None:
    folder = promised(early=EARLY, plain=EARLY)
    certify(folder, plain=None)
    with Engine.load(folder, watch=100.0) as engine:
        engine.use("plain")
        assert len(engine.predict(TEXTS)) == len(TEXTS)
        assert engine.watched is None
    with Engine.load(folder) as engine:
        assert engine.watched is None


def test_several_threads(promised: Callable[..., Path]) -> None:
    with Engine.load(promised(), watch=100.0) as engine:
        expected = count_changes(engine.predict(TEXTS), engine.predict(TEXTS, full_depth=True))
        threads = [threading.Thread(target=engine.predict, args=(TEXTS,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        watched = watched_by(engine)
        # While the rows of one thread wait, those of another are not chosen.
        parts = watched.rows / len(TEXTS)
        assert parts in (2, 3, 4, 5)
        assert watched.changed_answers == parts * expected
        assert engine.core.watch is not None
        assert engine.core.watch._waiting == 0


@pytest.mark.parametrize("part", ["enqueue", "regroup"])
@pytest.mark.parametrize("rule", [Budget(exit=2), Budget(exit=3)], ids=["answered", "unanswered"])
def test_lost_rows_do_not_hold_up_others(
    rule: Budget,
    part: str,
    promised: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And answers that exist are given."""

    def fail(_: object, hidden: Any, *__: object) -> None:
        if part == "regroup" or hidden.segment == 2:
            raise BackendError("made up")

    with Engine.load(promised(early=rule), watch=100.0) as engine:
        with monkeypatch.context() as patch:
            before(patch, HostExecution, part, fail)
            if rule.exit == 2:
                assert {answer.exit for answer in engine.predict(TEXTS)} == {2}
                assert "watched rows" in caplog.text
            elif part == "enqueue":
                with pytest.raises(BackendError, match="made up"):
                    engine.predict(TEXTS)
        assert watched_by(engine).rows == 0
        engine.predict(TEXTS[:9])
        assert watched_by(engine).rows == 9
        assert engine.core.watch is not None
        assert engine.core.watch._waiting == 0


def test_rows_without_numbers_at_full_depth_are_answered_and_do_not_count(
    promised: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine.load(promised(early=Budget(exit=2)), watch=100.0) as engine:
        spoil_logits(monkeypatch, slice(None), at_exit=3)
        assert {answer.exit for answer in engine.predict(TEXTS)} == {2}
        assert watched_by(engine).rows == 0
        assert engine.core.watch is not None
        assert engine.core.watch._waiting == 0


def test_a_broken_promise_is_reported_once(
    promised: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with Engine.load(promised(at_most=0.5, full_depth_changes=0.5), watch=100.0) as engine:
        assert watched_by(engine).permitted == pytest.approx(0.01)
        for _ in range(20):
            engine.predict(TEXTS)
        assert watched_by(engine).is_broken
        assert watched_by(engine).interval[0] > 0.01
        (line,) = caplog.messages
        assert "promise" in line


@pytest.mark.parametrize("wrong", [0, -1, 101, float("nan"), float("inf"), "1", True, [1]])
def test_what_is_no_percentage(wrong: Any, promised: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="watch is") as caught:
        Engine.load(promised(), watch=wrong)
    assert "`watch`" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "loading"),
    [
        ({}, {"rule": EARLY}),
        ({"of": "drop"}, {}),
        ({"at_most": 100.0}, {}),
        ({"at_most": 60.0, "full_depth_changes": 40.0}, {}),
        ({"at_most": 0.0}, {}),
    ],
    ids=str,
)
def test_only_promises_about_changed_answers_can_be_watched(
    settings: dict[str, Any], loading: dict[str, Any], promised: Callable[..., Path]
) -> None:
    folder = promised(early=EARLY, **settings)
    with pytest.raises(RuleError, match="nothing about changed answers") as caught:
        Engine.load(folder, watch=1, **loading)
    assert ("early" in caught.value.hint) == (settings == {})
