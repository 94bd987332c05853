"""Rankings: who leaves depends on the documents of a query only, however they run."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpabee.runtime import (
    Activation,
    Budget,
    Confidence,
    Engine,
    ExitRule,
    InputError,
    Ranked,
    RuleError,
    TopK,
)
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.chain.chain import Chain
from fpabee.runtime.chain.groups import Group
from fpabee.runtime.encoding import EncodedRow
from fpabee.runtime.rules.rules import before_top
from fpabee.runtime.rules.settling import Settled
from fpabee.runtime.serving import Scheduler
from fpabee.runtime.tasks import unnamed_task
from fpabee.runtime.tasks.queries import RankedQuery
from fpabee.runtime.tasks.ranked import changed_sets, ranked

from ..conftest import WORDS
from ..doubles.calls import before

QUERY = "play the good music"
TOP = 3
RULE = TopK(top=TOP, threshold=(-0.3, -0.2, 0.0))
WITH_SCORES = TopK(top=TOP, threshold=(-0.3, -0.2, 0.0), exit_0_threshold=-4.0)


def documents(count: int, seed: int = 0) -> list[str]:
    """Documents of different lengths."""
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=1 + n % 40)) for n in range(count)]


@pytest.fixture(params=[False, True], ids=["", "exit 0 without scores"])
def engine(
    request: pytest.FixtureRequest,
    ranking_engines: Mapping[str, Path],
    first_stage_engines: Mapping[str, Path],
) -> Iterator[Engine]:
    folder = (first_stage_engines if request.param else ranking_engines)["bert"]
    with Engine.load(folder, rule=WITH_SCORES if request.param else RULE) as engine:
        yield engine


@pytest.fixture
def scored_engine(first_stage_engines: Mapping[str, Path]) -> Iterator[Engine]:
    with Engine.load(first_stage_engines["bert"], rule=WITH_SCORES) as engine:
        yield engine


def scores_for(count: int, seed: int = 0) -> list[float]:
    """Scores of a search, of which some are equal."""
    return [round(random.Random(seed + n).gauss(10, 4), 0) for n in range(count)]


def expected(
    engine: Engine, some: Sequence[str], scores: Sequence[float] | None = None
) -> tuple[list[int], list[int]]:
    """The best documents in order, and the exit of each document, from the logits alone."""
    logits = engine.trace([(QUERY, each) for each in some]).logits.copy()
    if scores is not None and engine.core.first_stage is not None:
        logits[0, :, 0] = engine.core.first_stage.predict(scores)
    exits = engine.core.in_use.runner.exits_of(logits)
    last = engine.manifest.exits[-1]
    best = np.where(exits == last, logits[-1, :, 0], -np.inf)
    order = np.argsort(-best, kind="stable")[: min(TOP, (exits == last).sum())]
    return order.tolist(), exits.tolist()


def exits_of(found: Sequence[Ranked]) -> list[int]:
    return [each.exit for each in sorted(found, key=lambda each: each.index)]


@pytest.mark.usefixtures("as_on_devices")
@pytest.mark.parametrize("count", [1, TOP, TOP + 1, 30, 130])
def test_the_best_are_those_of_the_logits_in_any_groups(
    engine: Engine, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = documents(count)
    best, exits = expected(engine, some)
    for tokens in (64, 1024):
        limits = dataclasses.replace(engine.core.limits, group_tokens=tokens)
        monkeypatch.setattr(engine.core, "limits", limits)
        assert [each.index for each in engine.rank(QUERY, some)] == best
        assert exits_of(engine.rank(QUERY, some, all=True)) == exits
    if count == 130:
        assert len({*exits}) == 3  # some leave at each exit


@pytest.mark.parametrize("count", [1, TOP, TOP + 1, 30, 130])
@pytest.mark.parametrize("known", [True, False], ids=["scores", "no scores"])
def test_documents_leave_before_the_next_segment(engine: Engine, known: bool, count: int) -> None:
    """Layers that run are those of the exits: none for documents with low scores."""
    some = documents(count)
    scores = scores_for(count) if known else None
    best, exits = expected(engine, some, scores)
    with counted_rows() as ran, Scheduler(engine) as scheduler:
        ranking = engine.rank(QUERY, some, scores=scores, all=True)
        assert sum(ran) == sum(exits)
        served = asyncio.run(scheduler.rank(QUERY, some, scores=scores, all=True))
        assert sum(ran) == 2 * sum(exits)
    assert exits_of(ranking) == exits_of(served) == exits
    assert [each.index for each in ranking[: len(best)]] == best
    assert [each.index for each in engine.rank(QUERY, some, scores=scores)] == best
    if count == 130:
        has_exit_0 = engine.core.first_stage is not None
        assert {*exits} == ({0, 1, 3} if known and has_exit_0 else {1, 2, 3})
    assert engine.tally.exits[0] == 3 * exits.count(engine.manifest.exits[0])


@pytest.mark.usefixtures("as_on_devices")
def test_queries_with_and_without_scores_run_together(scored_engine: Engine) -> None:
    sets = [documents(count, seed) for seed, count in enumerate((40, 1, 90, 12, 0))]
    known = [None if seed % 2 else scores_for(len(some), seed) for seed, some in enumerate(sets)]

    async def every() -> list[list[Ranked]]:
        with Scheduler(scored_engine) as scheduler:
            rankings = (
                scheduler.rank(QUERY, some, scores=scores, all=True)
                for some, scores in zip(sets, known, strict=True)
            )
            return await asyncio.gather(*rankings)

    for some, scores, found in zip(sets, known, asyncio.run(every()), strict=True):
        exits = expected(scored_engine, some, scores)[1] if some else []
        assert exits_of(found) == exits
        assert (0 in exits) == (scores is not None and len(some) > TOP)


def test_scores_are_passed_over_where_they_say_nothing(
    ranking_engines: Mapping[str, Path], scored_engine: Engine
) -> None:
    some = documents(30)
    without = scored_engine.rank(QUERY, some, all=True)
    assert scored_engine.rank(QUERY, some, scores=[2.5] * 30, all=True) == without
    assert scored_engine.rank(QUERY, [], scores=[]) == []
    full = scored_engine.rank(QUERY, some, scores=scores_for(30), full_depth=True)
    assert {each.exit for each in full} == {3}
    with Engine.load(ranking_engines["bert"], rule=RULE) as engine:
        plain = engine.rank(QUERY, some, all=True)
        assert engine.rank(QUERY, some, scores=scores_for(30), all=True) == plain == without


def test_survivors_have_the_scores_of_the_whole_model(engine: Engine) -> None:
    some = documents(60)
    whole = {each.index: each for each in engine.rank(QUERY, some, full_depth=True)}
    assert len(whole) == 60
    found = engine.rank(QUERY, some, all=True)
    last = engine.manifest.exits[-1]
    survivors = [each for each in found if each.exit == last]
    assert TOP <= len(survivors) < 60
    assert found[: len(survivors)] == survivors  # the others come last
    for each in survivors:
        assert each.score == pytest.approx(whole[each.index].score, abs=1e-5)
    assert [each.score for each in survivors] == sorted((e.score for e in survivors), reverse=True)
    assert engine.rank(QUERY, some, top_k=2) == engine.rank(QUERY, some)[:2]
    two: Any = np.int64(2)
    assert engine.rank(QUERY, some, top_k=two) == engine.rank(QUERY, some)[:2]


def test_of_few_documents_more_may_be_asked_for(engine: Engine) -> None:
    """All documents stay if they are at most as many as the operating point promises."""
    few = documents(TOP)
    assert engine.rank(QUERY, few, top_k=30) == engine.rank(QUERY, few, full_depth=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.rank(QUERY, documents(5), top_k=4), "best 4 are wanted.* best 3 leave"),
        (lambda e: e.rank(QUERY, documents(5), top_k=0), "`top_k` is 0"),
        (lambda e: e.rank(QUERY, documents(5), top_k=True), "`top_k` is True"),
        (lambda e: e.rank(QUERY, "one string"), "the documents are one str"),
        (lambda e: e.rank(QUERY, None), "the documents are one NoneType"),
        (lambda e: e.rank(QUERY, ["a", 3]), "document 1 has the type int"),
        (lambda e: e.rank(5, ["a"]), "the query has the type int"),
        (
            lambda e: asyncio.run(Scheduler(e).rank(QUERY, [3])),  # type: ignore[list-item]
            "document 0 has the type int",
        ),
        (lambda e: e.rank(QUERY, documents(5), scores=[1.0]), "1 values in 'scores'"),
        (lambda e: e.rank(QUERY, documents(1), scores=[float("nan")]), "the score nan"),
        (lambda e: asyncio.run(Scheduler(e).rank(QUERY, ["a"], scores=[])), "0 values in 'scor"),
        (lambda e: e.rank(QUERY, documents(5), deadline_ms=float("nan")), "deadline_ms"),
        (lambda e: e.predict([(QUERY, "a")]), "ranks documents"),
        (lambda e: next(e.stream([(QUERY, "a")])), "ranks documents"),
    ],
)
def test_bad_calls_are_refused(
    engine: Engine, call: Callable[[Engine], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(engine)


def test_tasks_are_not_mixed(
    engines: Mapping[str, Path], ranking_engines: Mapping[str, Path]
) -> None:
    with Engine.load(engines["bert"]) as engine, Scheduler(engine) as scheduler:
        with pytest.raises(InputError, match="classifies"):
            engine.rank(QUERY, documents(3))
        with pytest.raises(InputError, match="classifies"):
            asyncio.run(scheduler.rank(QUERY, documents(3)))
    with Engine.load(ranking_engines["bert"], rule=RULE) as engine, Scheduler(engine) as scheduler:
        with pytest.raises(InputError, match="ranks documents"):
            scheduler.submit((QUERY, "rain"))
        with pytest.raises(InputError, match="ranks documents"):
            asyncio.run(scheduler.classify([(QUERY, "rain")]))
        with pytest.raises(RuleError, match="a trace has no queries"):
            engine.trace([(QUERY, "rain")], rule=RULE)
    with pytest.raises(RuleError, match="confidence is for classification") as refused:
        Engine.load(ranking_engines["bert"], rule=Confidence(threshold=0.9))
    assert refused.value.hint == "choose from budget, top-k"
    with pytest.raises(RuleError, match="top-k is for rankings") as refused:
        Engine.load(engines["bert"], rule=RULE)
    assert refused.value.hint.startswith("choose from fpabee, pabee, entropy, confidence")
    assert "top-k" not in refused.value.hint


@pytest.mark.parametrize("rule", [Budget(exit=1), TopK(top=TOP, threshold=-0.1, max_exit=2)])
def test_a_ranking_that_never_reaches_full_depth_is_refused(
    rule: ExitRule, ranking_engines: Mapping[str, Path]
) -> None:
    with pytest.raises(RuleError, match=r"stops all documents at exit [12], .* exit 3"):
        Engine.load(ranking_engines["bert"], rule=rule)


def late_after_a_segment(chain: Chain, groups: Sequence[Group]) -> float:
    """When the next segment would end: too late as soon as one has run."""
    return chain.clock() + 60.0 * (chain.seconds > 0)


def test_a_deadline_ranks_by_the_last_exit_that_was_passed(
    ranking_engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chain, "soon", late_after_a_segment)
    some = documents(10)
    with Engine.load(ranking_engines["bert"], rule=TopK(top=TOP, threshold=-99.0)) as engine:
        logits = engine.trace([(QUERY, each) for each in some]).logits[0, :, 0]
        found = engine.rank(QUERY, some, deadline_ms=30_000.0, all=True)
        with Scheduler(engine) as scheduler:
            served = asyncio.run(scheduler.rank(QUERY, some, deadline_ms=30_000.0, all=True))
    assert found == served
    assert [each.index for each in found] == np.argsort(-logits, kind="stable").tolist()
    assert all(each.deadline_limited and each.exit == 1 for each in found)


def test_a_deadline_before_layer_1_ranks_by_scores(
    scored_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chain, "soon", lambda chain, groups: chain.clock() + 60.0)
    scores = scores_for(10)
    found = scored_engine.rank(QUERY, documents(10), scores=scores, deadline_ms=30_000.0, all=True)
    assert [each.index for each in found] == np.argsort(-np.array(scores), kind="stable").tolist()
    assert {each.exit for each in found} == {0}
    assert {each.deadline_limited for each in found} == {True, False}  # some had left


@contextmanager
def counted_rows() -> Iterator[list[int]]:
    """How many rows each segment runs that is started meanwhile."""
    ran: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        before(patch, Chain, "enqueue", lambda _, group: ran.append(len(group)))
        yield ran


@given(
    st.integers(1, 4),
    st.lists(st.lists(st.integers(-5, 5), min_size=9, max_size=9), min_size=4, max_size=4),
    st.integers(0, 5),
    st.integers(0, 1),
)
def test_the_order_in_which_groups_pass_does_not_matter(
    top: int, values: list[list[int]], margin: int, first: int
) -> None:
    logits = np.array(values[first:], np.float32)
    rule = TopK(
        top=top,
        threshold=-float(margin),
        exit_0_threshold=None if first else -float(margin),
    )
    exits = range(first, 4)
    task = unnamed_task(ProblemType.RANKING, 1)
    want = task.runner(rule, exits).exits_of(logits[..., None])
    query = RankedQuery(task.rule_runner(rule, exits), np.arange(9))
    parts = [np.arange(0, 5), np.arange(5, 9)]
    # The first part is a segment ahead, as on a device.
    steps = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (2, 1), (3, 0), (3, 1)]
    for number, part in steps[2 * first :]:
        query.passed(number, parts[part], logits[number - first, parts[part], None])
    assert query.exits.tolist() == want.tolist()
    # Nobody of the best by the predictions of an exit leaves at it.
    for number in exits[:-1]:
        left = want >= number
        before = before_top(np.where(left, logits[number - first], -np.inf), top)
        assert (before[want == number] < -margin).all()


def test_changed_sets_allow_equals() -> None:
    reference = np.array([[3.0, 2.0, 2.0, 1.0]])
    left = np.zeros((1, 4), np.bool_)
    assert not changed_sets(np.array([[3.0, 1.0, 2.0, 0.0]]), left, reference, 2)[0]
    assert changed_sets(np.array([[3.0, 0.0, 0.0, 2.0]]), left, reference, 2)[0]
    assert changed_sets(reference, left | (reference == 3.0), reference, 2)[0]
    assert not changed_sets(reference, left, -reference, 4)[0]


def test_scores_have_the_activation() -> None:
    logits = np.array([[-2.0], [2.0]], np.float32)
    flags = np.zeros(2, np.bool_)
    ids = np.zeros(2, np.int64)
    rows = np.full(2, EncodedRow(ids, ids, truncated=False))
    settled = Settled(rows, np.array([3, 3]), logits, flags)
    best = ranked(settled, flags, flags, Activation.IDENTITY)
    assert [each.score for each in best] == [2.0, -2.0]
    first, second = ranked(settled, flags, flags, Activation.SIGMOID)
    assert first.score == pytest.approx(0.8808, abs=1e-4)
    assert first.score + second.score == pytest.approx(1.0)


def test_documents_that_left_have_scores_below_all_others() -> None:
    """Also where the prediction was higher: some clients sort by the scores again."""
    ids = np.zeros(2, np.int64)
    rows = np.full(4, EncodedRow(ids, ids, truncated=False))
    logits = np.array([[3.0], [0.5], [1.0], [2.0]], np.float32)
    left = np.array([True, False, False, True])
    settled = Settled(rows, np.array([1, 3, 3, 2]), logits, np.zeros(4, np.bool_))
    missed = np.array([True, False, False, False])
    best = ranked(settled, missed, left, Activation.SIGMOID, with_left=True)
    assert [each.deadline_missed for each in best] == [False, False, True, False]
    assert [each.index for each in best] == [2, 1, 0, 3]
    assert best[1].score > best[2].score == best[3].score
    assert best[1].logit > best[2].logit == pytest.approx(0.5)


def test_full_depth_needs_no_promise(ranking_engines: Mapping[str, Path]) -> None:
    with Engine.load(ranking_engines["bert"]) as engine:
        assert engine.rule == Budget(exit=3)
        assert len(engine.rank(QUERY, documents(12))) == 12
        assert len(engine.rank(QUERY, documents(12), top_k=5)) == 5
