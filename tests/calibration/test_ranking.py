"""Rankings: simulated exits are those of a live run, and promises hold on new queries."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpabee.calibration import Bound
from fpabee.calibration.evidence import QueryEvidence
from fpabee.calibration.exact import binomial_tail
from fpabee.calibration.guarantee import Certified
from fpabee.calibration.guarantee import certify as certify_units
from fpabee.calibration.query_logits import QueryLogits, errors_near_top, settings, stops_of
from fpabee.runtime import Budget, TopK
from fpabee.runtime.artifact.exits import Exits
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.rules.measures import Floats
from fpabee.runtime.tasks import unnamed_task
from fpabee.runtime.tasks.ranked import changed_sets

NOISE = np.array([0.8, 0.5, 0.2])
# By the first exit, which is 0 with scores.
NOISES = {0: np.array([1.5, *NOISE]), 1: NOISE}
TOP = 3


def made_up(queries: int, seed: int, first_exit: int = 1) -> QueryLogits:
    """Queries of 1 to 40 documents, whose exits predict the last one with noise."""
    noise = NOISES[first_exit]
    drawn = np.random.default_rng(seed)
    sizes = drawn.integers(1, 40, queries)
    reference = drawn.normal(scale=2.0, size=sizes.sum())
    early = reference + noise[:, None] * drawn.normal(size=(len(noise), len(reference)))
    logits = np.concatenate([early, reference[None]]).astype(np.float32)
    starts = np.cumsum([0, *sizes])
    exits = Exits.numbered(first_exit, len(logits))
    return QueryLogits(logits, starts, reference.astype(np.float32), exits)


def certify(rows: QueryLogits, errors: Floats, bound: Bound) -> Certified:
    return certify_units(QueryEvidence(rows, errors, TOP), bound)


def rule_for(top: int, factor: float, first_exit: int) -> TopK:
    margins = [-factor * each for each in (*NOISES[first_exit], 0.0)]
    of_exit_0 = margins.pop(0) if first_exit == 0 else None
    return TopK(top=top, threshold=tuple(margins), exit_0_threshold=of_exit_0)


def live(rows: QueryLogits, rule: TopK) -> tuple[list[int], list[bool]]:
    """The exits of documents in live runs that give these logits, and which queries changed."""
    exits: list[int] = []
    changed = []
    runner = unnamed_task(ProblemType.RANKING, 1).runner(rule, rows.exits.numbers)
    for start, end in pairwise(rows.starts):
        logits = rows.logits[:, start:end]
        own = runner.exits_of(logits[..., None])
        left = own < rows.exits.last
        reference = rows.reference[start:end].astype(np.float64)
        changed.append(changed_sets(logits[-1:], left[None], reference[None], rule.top)[0])
        exits += own.tolist()
    return exits, changed


def without_scores(rows: QueryLogits) -> QueryLogits:
    """What a live run gives that gets no scores: exit 0 predicts the same for all documents."""
    return replace(rows, logits=np.concatenate([0 * rows.logits[:1], rows.logits[1:]]))


@given(st.integers(1, 6), st.integers(0, 10**6), st.floats(0.05, 4.0), st.integers(0, 1))
def test_exits_are_those_of_a_live_run(top: int, seed: int, factor: float, first_exit: int) -> None:
    rows = made_up(7, seed, first_exit)
    rule = rule_for(top, factor, first_exit)
    exits, changed = live(rows, rule)
    stops = stops_of(rule, rows, top)
    assert stops.exits.tolist() == exits
    if first_exit == 1:
        assert stops.changed.tolist() == changed
        return
    exits, changed_without = live(without_scores(rows), rule)
    assert stops_of(rule, rows.without_scores, top).exits.tolist() == exits
    assert stops.changed.tolist() == np.logical_or(changed, changed_without).tolist()


def test_a_query_counts_as_changed_with_its_scores_or_without_them() -> None:
    rows = made_up(400, 9, first_exit=0)
    rule = rule_for(TOP, 0.5, first_exit=0)
    with_scores = np.array(live(rows, rule)[1])
    without = np.array(live(without_scores(rows), rule)[1])
    assert (with_scores & ~without).any()
    assert (without & ~with_scores).any()
    assert stops_of(rule, rows, TOP).changed.tolist() == (with_scores | without).tolist()


def test_full_depth_changes_nothing_but_rounding() -> None:
    rows = made_up(50, 0)
    stops = stops_of(Budget(exit=4), rows, TOP)
    assert (stops.exits == 4).all()
    assert not stops.changed.any()
    rounded = replace(rows, logits=np.round(rows.logits))
    assert stops_of(Budget(exit=4), rounded, TOP).changed.any()


def test_errors_are_those_of_documents_near_the_top() -> None:
    rows = made_up(400, 1)
    # What all documents of a query have in common does not count.
    shared = np.random.default_rng(2).normal(scale=5.0, size=len(rows))
    rows.logits[:-1] += np.repeat(shared, np.diff(rows.starts)).astype(np.float32)
    assert errors_near_top(rows, TOP) == pytest.approx(NOISE, rel=0.1)


def test_bolder_settings_stop_more_documents() -> None:
    rows = made_up(60, 2)
    errors = errors_near_top(rows, TOP)
    depths = [
        stops_of(each, rows, TOP).exits.mean() for each in settings(errors, TOP, rows.exits)[::20]
    ]
    assert depths[0] > 3.5
    assert depths[-1] < 2.5
    costs = np.arange(1.0, 5.0) / 4
    evidence = QueryEvidence(rows, errors, TOP)
    assert evidence.saved(costs, 0.05) > 0.1
    assert evidence.saved(costs, 0.0) < evidence.saved(costs, 0.2)


@pytest.mark.parametrize("first_exit", [0, 1])
def test_promises_hold_on_new_queries(first_exit: int) -> None:
    """Of 60 promises of at most 10 %, no more are broken than 5 % and chance explain."""
    world = made_up(6000, 3, first_exit)
    errors = errors_near_top(made_up(100, 4, first_exit), TOP)
    drawn = np.random.default_rng(5)
    bound = Bound(changed_answers=0.1)
    broken = 0
    depths = []
    for _ in range(60):
        certified = certify(world.take(drawn.integers(0, 3000, 120)), errors, bound)
        assert certified.rule is not None
        stops = stops_of(certified.rule, world, TOP)
        broken += stops.changed.mean() > 0.1
        depths.append(stops.exits.mean())
    assert 1 - binomial_tail(broken - 1, 60, 0.05) > 0.001
    assert np.mean(depths) < 3.5
    assert isinstance(certified.rule, TopK)
    assert (certified.rule.exit_0_threshold is None) == (first_exit == 1)


def test_fewer_documents_leave_where_a_batch_holds_a_part_of_the_query() -> None:
    rows = made_up(80, 8)
    rule = TopK(top=TOP, threshold=tuple(np.append(-NOISE, 0.0)))
    depths = [stops_of(rule, rows.in_batches(size), TOP).exits.mean() for size in (3, 8, 32, 40)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] == 4  # no batch has more documents than are wanted
    assert depths[-1] == stops_of(rule, rows, TOP).exits.mean()


def test_too_few_queries_certify_nothing() -> None:
    certified = certify(made_up(58, 6), NOISE, Bound(changed_answers=0.05))
    assert (certified.rule, certified.certificate) == (None, None)
    assert "58 queries are too few; 59 queries are the least" in certified.failed
    assert certify(made_up(59, 6), NOISE, Bound(changed_answers=0.05)).certificate


def test_rounding_that_changes_too_much_certifies_nothing() -> None:
    rows = made_up(100, 7)
    rounded = replace(rows, logits=np.round(rows.logits))
    certified = certify(rounded, NOISE, Bound(changed_answers=0.05))
    assert certified.rule is None
    assert "full depth changes" in certified.failed
