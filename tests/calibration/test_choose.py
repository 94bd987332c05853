"""Goals are met on the rows that choose, and judged on other rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fpabee.calibration.choose import ALL, PER_EXIT, Selector
from fpabee.calibration.outcome import drop_interval, exits_of
from fpabee.calibration.per_exit import fit_path
from fpabee.calibration.scoring import LabelledLogits, Scorer
from fpabee.calibration.stopping_costs import EXPECTED, OBSERVED, StoppingCosts
from fpabee.calibration.sweep import StopScores
from fpabee.runtime import RULES, ExitRule, InputError, Measure, ProblemType, simulate
from fpabee.runtime.artifact.operating_point import Goal

from .conftest import layer_costs, make_selector

Make = Callable[..., LabelledLogits]


def exits_under(chosen: ExitRule | None, rows: LabelledLogits) -> np.ndarray:
    return np.full(len(rows), rows.exits) if chosen is None else exits_of(chosen, rows)


def drop_on(rows: LabelledLogits, chosen: ExitRule | None, metric: str = "accuracy") -> float:
    """The drop in points."""
    scorer = Scorer(rows, metric)
    return 100 * (scorer.full_depth - scorer.score(exits_under(chosen, rows)))


@pytest.mark.parametrize("limit", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_the_drop_of_a_goal_is_about_the_drop_on_new_rows(
    make_rows: Make, limit: float, metric: str
) -> None:
    selector = make_selector(make_rows(count=3000), metric)
    chosen = selector.choose(Goal(max_drop=limit), list(RULES))
    new = make_rows(count=20_000, seed=1)
    assert drop_on(new, chosen, metric) <= limit + 0.7
    assert exits_under(chosen, new).mean() < new.exits


def test_a_larger_drop_buys_more_time(make_rows: Make) -> None:
    rows = make_rows(count=2000)
    selector = make_selector(rows)
    limits = (0.0, 0.5, 2.0, 5.0)
    chosen = [selector.choose(Goal(max_drop=limit), selector.kinds) for limit in limits]
    depths = [exits_under(candidate, rows).mean() for candidate in chosen]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > depths[-1]


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_a_guaranteed_goal_is_met_with_more_caution(make_rows: Make, metric: str) -> None:
    rows = make_rows(count=2000)
    selector = make_selector(rows, metric, ("entropy",))
    estimated = selector.choose(Goal(max_drop=2.0), selector.kinds)
    guaranteed = selector.choose(Goal(max_drop=2.0, guaranteed=True), selector.kinds)
    exits = exits_under(guaranteed, rows)
    assert exits_under(estimated, rows).mean() < exits.mean() < rows.exits
    assert drop_interval(Scorer(rows, metric), exits, level=0.9)[1] <= 2.3


@pytest.mark.parametrize("seed", range(4))
def test_a_guaranteed_goal_is_never_faster(make_rows: Make, seed: int) -> None:
    rows = make_rows(count=400, seed=seed)
    selector = make_selector(rows)
    goals = [Goal(max_drop=2.0, guaranteed=guaranteed) for guaranteed in (False, True)]
    estimated, sure = (exits_under(selector.choose(g, selector.kinds), rows) for g in goals)
    assert estimated.mean() <= sure.mean()


def test_a_speedup_is_reached_with_the_least_drop(make_rows: Make) -> None:
    rows = make_rows(count=2000)
    selector = make_selector(rows)
    # Thresholds that are fitted exit by exit are judged on other rows than these.
    kinds = [kind for kind in selector.kinds if not kind.endswith(PER_EXIT)]
    exits = exits_under(selector.choose(Goal(speedup=2.0), kinds), rows)
    assert rows.exits / exits.mean() >= 2.0
    settings = selector.settings(kinds)
    fast = settings.costs <= settings.full_cost / 2
    drop = selector.stopping_costs.losses[exits - 1, np.arange(len(rows))].mean()
    assert drop == pytest.approx(settings.drops[fast].min(), abs=0.005)


def test_an_impossible_speedup_says_what_is_possible(make_rows: Make) -> None:
    selector = make_selector(make_rows())
    with pytest.raises(InputError, match=r"20 times as fast.* 6\.00 times.*drop of"):
        selector.choose(Goal(speedup=20.0), selector.kinds)


def test_held_out_exits_are_by_settings_that_other_rows_chose(make_rows: Make) -> None:
    rows = make_rows(count=1000)
    selector = make_selector(rows, names=("entropy",))
    goal = Goal(max_drop=1.0)
    exits = selector.held_out(goal, ["entropy"])
    parts = [selector.rows_of(frozenset({part})) for part in ALL]
    assert sorted(np.concatenate(parts)) == list(range(len(rows)))
    for part, numbers in zip(ALL, parts, strict=True):
        chosen = selector.choose(goal, ["entropy"], ALL - {part})
        assert chosen is not None
        expected = simulate(rows.logits[:, numbers], chosen, rows.problem_type).exits
        np.testing.assert_array_equal(exits[numbers], expected)


def test_labels_of_rows_that_are_left_out_choose_nothing(make_rows: Make) -> None:
    rows = make_rows(count=1000)
    assert rows.expected is not None
    # With a metric that no temperature is fitted for, since that is one number for all rows.
    selector = make_selector(rows, "macro_f1")
    numbers = selector.rows_of(frozenset({0}))
    wrong = rows.expected.copy()
    wrong[numbers] = (wrong[numbers] + 1) % 3
    changed = LabelledLogits(rows.logits, rows.lengths, wrong, rows.problem_type)
    one, two = (
        each.choose(Goal(max_drop=1.0), ["entropy"], ALL - {0})
        for each in (selector, make_selector(changed, "macro_f1"))
    )
    assert one is not None
    assert one == two


@pytest.mark.parametrize("name", ["entropy", "confidence", "energy", "fpabee"])
def test_thresholds_for_each_exit_are_better_than_one(make_rows: Make, name: str) -> None:
    rows = make_rows(count=3000)
    costs = layer_costs(rows)
    stopping_costs = StoppingCosts(rows, "accuracy", costs)
    (family,) = StopScores(rows).families([name], [Measure.JSKD], patiences=[1])
    one = Selector(stopping_costs, [family]).settings([name])
    rules = list(fit_path(family.rule, family.scores, costs, stopping_costs.losses))
    better = 0
    for rule in rules:
        at = exits_of(rule, rows) - 1, np.arange(len(rows))
        cost, loss = costs[at].mean(), stopping_costs.losses[at].mean()
        as_good = one.sums[:, EXPECTED] / len(rows) <= loss + 1e-9
        better += bool(cost <= one.costs[as_good].min(initial=rows.exits) + 0.02)
    assert len(rules) > 5
    assert better >= 0.8 * len(rules)


def test_multi_label_rows_are_chosen_for_as_well(make_rows: Make) -> None:
    rows = make_rows(count=2000, problem_type=ProblemType.MULTI_LABEL)
    selector = make_selector(rows, "exact_match")
    chosen = selector.choose(Goal(max_drop=1.0), selector.kinds)
    assert exits_under(chosen, rows).mean() < rows.exits


def test_thresholds_for_each_exit_are_judged_on_rows_they_were_not_fitted_to(
    make_rows: Make,
) -> None:
    """What a price is said to lose is what its rule loses on new rows, on average."""
    population = make_rows(count=20_000, exits=12, seed=7)
    generator = np.random.default_rng(0)
    misses = []
    for _ in range(6):
        rows = population.take(generator.integers(0, len(population), 300))
        stopping_costs = StoppingCosts(rows, "accuracy", layer_costs(rows))
        fitted = list(StopScores(rows).families(["entropy"], [], patiences=[1]))
        settings = Selector(stopping_costs, fitted, fitted).settings(["entropy per exit"])
        for number in range(0, len(settings.drops), 5):
            lost = 100 * settings.sums[number, OBSERVED] / len(rows)
            misses.append(drop_on(population, settings.rule(number)) - lost)
    assert abs(np.mean(misses)) < 0.5


@pytest.mark.slow
def test_a_goal_is_met_although_thousands_of_settings_compete(make_rows: Make) -> None:
    """The best by its own estimate would lose about 1.8 where 1 is asked, and 3.3 where 2 is."""
    population = make_rows(count=20_000, seed=7)
    generator = np.random.default_rng(0)
    drops: dict[float, list[float]] = {1.0: [], 2.0: []}
    for _ in range(8):
        selector = make_selector(population.take(generator.integers(0, len(population), 300)))
        for limit, found in drops.items():
            chosen = selector.choose(Goal(max_drop=limit), selector.kinds)
            found.append(drop_on(population, chosen))
    assert np.mean(drops[1.0]) < 1.2
    assert 0.5 < np.mean(drops[2.0]) < 2.2
