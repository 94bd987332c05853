"""A goal is kept on new rows, however many settings compete, and judged on rows that chose none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fpabee.calibration.choose import Search, deal
from fpabee.calibration.scoring import LabelledLogits, Scorer
from fpabee.calibration.settings import exits_of
from fpabee.runtime import Confidence, ExitRule, InputError, ProblemType
from fpabee.runtime.artifact.operating_point import Goal

from .conftest import make_rows, search_on, two_exits, with_costs


def exits_under(chosen: ExitRule | None, rows: LabelledLogits) -> np.ndarray:
    return np.full(len(rows), rows.exits[-1]) if chosen is None else exits_of(chosen, rows)


def drop_on(rows: LabelledLogits, chosen: ExitRule | None, metric: str = "accuracy") -> float:
    """The drop in points."""
    scorer = Scorer(rows, metric)
    return 100 * (scorer.full_depth - scorer.score(exits_under(chosen, rows)))


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        (ProblemType.SINGLE_LABEL, "accuracy"),
        (ProblemType.SINGLE_LABEL, "macro_f1"),
        (ProblemType.MULTI_LABEL, "exact_match"),
    ],
)
def test_a_larger_drop_buys_time_and_is_about_the_drop_on_new_rows(
    task: ProblemType, metric: str
) -> None:
    search = search_on(make_rows(count=2000, problem_type=task), metric)
    new = make_rows(count=20_000, problem_type=task, seed=1)
    depths = []
    for limit in (0.0, 0.5, 2.0, 5.0):
        chosen = search.choose(Goal(max_drop=limit))
        assert drop_on(new, chosen, metric) <= limit + 1.0
        depths.append(exits_under(chosen, new).mean())
    assert depths == sorted(depths, reverse=True)
    assert depths[-1] < depths[0]


def test_a_speedup_is_reached_with_the_least_drop() -> None:
    rows = make_rows(count=1000)
    search = search_on(rows)
    chosen = search.choose(Goal(speedup=2.0))
    assert rows.exits[-1] / exits_under(chosen, rows).mean() >= 2.0
    (tried,) = search.tried
    fast = tried.costs <= rows.exits[-1] / 2
    best = fast & (tried.drops == tried.drops[fast].min())
    assert chosen in [rule for rule, is_best in zip(tried.settings, best, strict=True) if is_best]
    with pytest.raises(InputError, match=r"20 times as fast.* 6\.00 times.*drop of"):
        search.choose(Goal(speedup=20.0))
    # A part of the rows without a setting that is fast enough counts at full depth.
    almost = Goal(speedup=5.99)
    assert (search.held_out(lambda some: some.choose(almost)) == 1).mean() > 0.9
    found = search.held_out(lambda some: some.choose(Goal(speedup=20.0)))
    assert (found == rows.exits[-1]).all()


def test_a_drop_that_falls_where_more_rows_stop_is_taken_for_luck() -> None:
    """A bolder setting is not estimated to lose less than a more cautious one of its list."""
    number = np.arange(100)
    lost = number < 10  # rows that exit 1 gets wrong
    won = (number >= 10) & (number < 20)  # rows that only exit 1 gets right
    rows = two_exits(lost)
    rows.logits[1, won] = rows.logits[1, won, ::-1]
    rows.logits[0] *= np.select([lost, won], [9, 1], 0.1)[:, None]
    rules = [Confidence(threshold=0.99), Confidence(threshold=0.9)]
    search = Search(with_costs(rows), [rules])
    cautious_drop, bold_drop = search.tried[0].drops
    assert bold_drop < 0.02 < 0.05 < cautious_drop
    assert search.choose(Goal(max_drop=5.0)) is None
    assert search.choose(Goal(max_drop=15.0)) == rules[1]


def test_held_out_exits_are_by_settings_that_other_rows_chose() -> None:
    """The labels of a part choose nothing that it is judged with."""
    rows = make_rows()
    goal = Goal(max_drop=2.0)
    assert rows.expected is not None
    found = search_on(rows).held_out(lambda some: some.choose(goal))
    assert len(np.unique(found)) > 2
    parts = deal(len(rows))
    truth = np.where(parts == 0, (rows.expected + 1) % 3, rows.expected)
    changed = LabelledLogits(rows.logits, rows.lengths, truth, rows.problem_type)
    again = search_on(changed).held_out(lambda some: some.choose(goal))
    np.testing.assert_array_equal(again[parts == 0], found[parts == 0])
    assert (again[parts != 0] != found[parts != 0]).any()


@pytest.mark.parametrize("samples", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_goal_is_kept_although_many_settings_compete(samples: int) -> None:
    population = make_rows(count=10_000, seed=7)
    generator = np.random.default_rng(0)
    drops = []
    for _ in range(samples):
        rows = population.take(generator.integers(0, len(population), 200))
        drops.append(drop_on(population, search_on(rows).choose(Goal(max_drop=2.0))))
    error = np.std(drops) / samples**0.5
    assert 0.3 < np.mean(drops) < 2.0 + 2 * error


@pytest.mark.parametrize("useful", [False, True])
def test_exit_0_answers_rows_only_where_it_pays(useful: bool) -> None:
    rows = make_rows(count=500, exits=6)
    exit_0 = np.random.default_rng(1).normal(scale=3.0, size=rows.logits[0].shape)
    if useful:  # it is as good as exit 4, where it is sure
        exit_0 = rows.logits[3]
    logits = np.concatenate([exit_0[None], rows.logits]).astype(np.float32)
    with_exit_0 = dataclasses.replace(rows, logits=logits, first_exit=0)
    depths = {}
    for name, each in (("without", rows), ("with", with_exit_0)):
        chosen = search_on(each).choose(Goal(max_drop=1.0))
        assert chosen is not None
        exits = exits_of(chosen, each)
        depths[name] = exits.mean()
        assert useful == (0 in exits.tolist()) or name == "without"
    assert depths["with"] <= depths["without"] * (0.6 if useful else 1.02)
