"""A goal is kept on new rows, however many settings compete, and judged on rows that chose none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fpabee.calibration.choose import Search, Selector
from fpabee.calibration.families import (
    DEFAULT_MEASURES,
    DEFAULT_RULES,
    PER_EXIT,
    Family,
    deal,
    make_families,
)
from fpabee.calibration.outcome import exits_of
from fpabee.calibration.per_exit import fit_per_exit
from fpabee.calibration.scoring import LabelledLogits, Scorer
from fpabee.calibration.stopping_costs import StoppingCosts
from fpabee.calibration.sweep import StopScores
from fpabee.runtime import Entropy, ExitRule, InputError, Measure, ProblemType
from fpabee.runtime.artifact.operating_point import Goal

from .conftest import make_rows, with_costs

MEASURES = (Measure.JSKD,)


def select(
    rows: LabelledLogits, metric: str = "accuracy", names: tuple[str, ...] = DEFAULT_RULES
) -> Selector:
    return Selector(with_costs(rows, metric), names, MEASURES)


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
    selector = select(make_rows(count=2000, problem_type=task), metric)
    new = make_rows(count=20_000, problem_type=task, seed=1)
    depths = []
    for limit in (0.0, 0.5, 2.0, 5.0):
        chosen = selector.search.choose(Goal(max_drop=limit), selector.search.kinds)
        assert drop_on(new, chosen, metric) <= limit + 1.0
        depths.append(exits_under(chosen, new).mean())
    assert depths == sorted(depths, reverse=True)
    assert depths[-1] < depths[0]


def test_a_speedup_is_reached_with_the_least_drop() -> None:
    rows = make_rows(count=1000)
    costs = with_costs(rows)
    families = make_families(costs, ["fpabee", "entropy"], MEASURES, per_exit=False)
    search = Search(costs, families)
    chosen = search.choose(Goal(speedup=2.0), search.kinds)
    assert rows.exits[-1] / exits_under(chosen, rows).mean() >= 2.0
    once = np.ones((len(rows), 1))
    exits = np.concatenate([family.exits for family in families])
    fast = costs.mean_costs(exits, once) <= rows.exits[-1] / 2
    found = costs.drops(exits_under(chosen, rows)[None].astype(np.int16), once)
    assert found == pytest.approx(costs.drops(exits, once)[fast].min())
    with pytest.raises(InputError, match=r"20 times as fast.* 6\.00 times.*drop of"):
        search.choose(Goal(speedup=20.0), search.kinds)


def test_only_full_depth_is_left_where_nothing_competes() -> None:
    search = Search(with_costs(make_rows()), [])
    assert search.choose(Goal(max_drop=1.0), search.kinds) is None


def test_held_out_exits_are_by_settings_that_other_rows_chose() -> None:
    """The labels of a part choose nothing that it is judged with."""
    rows, goal = make_rows(), Goal(max_drop=2.0)
    assert rows.expected is not None
    found = select(rows).held_out(goal, ["entropy", "fpabee"])
    assert len(np.unique(found)) > 2
    parts = deal(len(rows), seed=0)
    truth = np.where(parts == 0, (rows.expected + 1) % 3, rows.expected)
    changed = LabelledLogits(rows.logits, rows.lengths, truth, rows.problem_type)
    again = select(changed).held_out(goal, ["entropy", "fpabee"])
    np.testing.assert_array_equal(again[parts == 0], found[parts == 0])
    assert (again[parts != 0] != found[parts != 0]).any()


@pytest.mark.parametrize("name", ["entropy", "confidence", "fpabee"])
def test_thresholds_for_each_exit_are_better_than_one(name: str) -> None:
    costs = with_costs(make_rows(count=2000))
    family = next(iter(make_families(costs, [name], MEASURES, per_exit=False)))
    plain = family.rules[0]
    parts = np.zeros(len(costs.rows), np.intp)
    parts[:10] = 1
    rules, _ = fit_per_exit(plain, StopScores(costs.rows).stop_scores(plain), costs, parts)
    fitted = np.stack([exits_of(rule, costs.rows) for rule in rules]).astype(np.int16)
    numbers = np.arange(len(costs.rows))

    def means(exits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = exits - 1, numbers
        return costs.costs[at].mean(axis=1), costs.losses[at].mean(axis=1)

    times, losses = means(family.exits)
    better = [
        time <= times[losses <= loss + 1e-9].min(initial=costs.rows.exits[-1]) + 0.02
        for time, loss in zip(*means(fitted), strict=True)
    ]
    assert np.mean(better) >= 0.8


def test_thresholds_for_each_exit_are_judged_on_rows_they_were_not_fitted_to() -> None:
    """What a setting is said to lose is what its rule loses on new rows, on average."""
    population = make_rows(count=20_000, exits=12, seed=7)
    generator = np.random.default_rng(0)
    misses = []
    for _ in range(6):
        rows = population.take(generator.integers(0, len(population), 300))
        families = make_families(with_costs(rows), ["entropy"], MEASURES)
        (family,) = [family for family in families if family.kind == "entropy" + PER_EXIT]
        scorer = Scorer(rows, "accuracy")
        for number in range(0, len(family.exits), 10):
            said = 100 * (scorer.full_depth - scorer.score(family.exits[number].astype(np.int64)))
            misses.append(drop_on(population, family.rules[number]) - said)
    assert abs(np.mean(misses)) < 0.5


def fastest(costs: StoppingCosts, families: list[Family], allowed: float) -> ExitRule:
    """The fastest setting by its own estimate, which is the luckiest of many."""
    exits = np.concatenate([family.exits for family in families])
    rules = [rule for family in families for rule in family.rules]
    once = np.ones((len(costs.rows), 1))
    within = costs.drops(exits, once) <= allowed
    return rules[int(np.where(within, costs.mean_costs(exits, once), np.inf).argmin())]


@pytest.mark.parametrize("samples", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_a_goal_is_kept_although_hundreds_of_settings_compete(samples: int) -> None:
    population = make_rows(count=10_000, seed=7)
    generator = np.random.default_rng(0)
    chosen, lucky = [], []
    for _ in range(samples):
        rows = population.take(generator.integers(0, len(population), 200))
        costs = with_costs(rows, "macro_f1")
        families = make_families(costs, ["fpabee", "entropy", "energy", "epee"], list(Measure))
        search = Search(costs, families)
        found = search.choose(Goal(max_drop=2.0), search.kinds)
        chosen.append(drop_on(population, found, "macro_f1"))
        lucky.append(drop_on(population, fastest(costs, families, 0.02), "macro_f1"))
    errors = np.std([chosen, lucky], axis=1) / samples**0.5
    assert 0.3 < np.mean(chosen) < 2.0 + 2 * errors[0]
    assert np.mean(lucky) > 2.0 + 2 * errors[1]


def test_a_last_exit_that_is_too_timid_does_not_hide_a_drop() -> None:
    """Where exits disagree, the last one is right far more often than its probabilities say."""
    rows = make_rows(count=4000)
    answers = rows.answers()
    contested = (answers[1] != answers[-1])[None, :, None]
    logits = np.where(contested & (np.arange(6) == 5)[:, None, None], 0.05, 1.0) * rows.logits
    rows = LabelledLogits(logits.astype(np.float32), rows.lengths, rows.expected, rows.problem_type)
    costs, early = with_costs(rows), exits_of(Entropy(threshold=0.7), rows)
    observed = costs.observed[early - 1, np.arange(len(rows))]
    error = observed.std() / len(rows) ** 0.5
    expected = costs.losses[early - 1, np.arange(len(rows))].mean()
    assert abs(expected - observed.mean()) < 2 * error
    found = costs.drops(early[None].astype(np.int16), np.ones((len(rows), 1))).item()
    assert found > observed.mean() - 2 * error


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
        selector = Selector(with_costs(each), DEFAULT_RULES, DEFAULT_MEASURES)
        chosen = selector.search.choose(Goal(max_drop=1.0), selector.search.kinds)
        assert chosen is not None
        exits = exits_of(chosen, each)
        depths[name] = exits.mean()
        assert useful == (0 in exits.tolist()) or name == "without"
    assert depths["with"] <= depths["without"] * (0.6 if useful else 1.02)
