"""Which exits are kept, and that what is said of them is what a run would do."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from fpabee.calibration.costs import CostModel
from fpabee.calibration.placement import Step, choose_exits
from fpabee.calibration.scoring import Rows
from fpabee.runtime import FPabee, Pabee, simulate
from fpabee.runtime.operating_point import Wish

EXITS = 6
LENGTHS = (5, 40)
# A layer takes 1 ms at 5 tokens and 4 at 40; a tenth of it is the head.
COSTS = CostModel(8, LENGTHS, ((0.001, 0.004),) * EXITS, (0.1,) * EXITS)


@pytest.fixture
def rows(make_rows: Callable[..., Rows]) -> Rows:
    """Six exits, of which the third says nothing."""
    made = make_rows(400, EXITS, 3)
    logits = made.logits.copy()
    logits[2] = np.random.default_rng(1).normal(size=logits[2].shape)
    return Rows(logits, made.lengths, made.expected, made.problem_type)


def test_dropped_heads_cost_nothing() -> None:
    kept = COSTS.keep_exits((2, 6))
    np.testing.assert_allclose(kept.seconds, [[0.0019, 0.0076], [0.0037, 0.0148]])
    np.testing.assert_allclose(kept.head_shares, [0.1 / 1.9, 0.1 / 3.7])
    assert COSTS.keep_exits(range(1, EXITS + 1)).seconds == pytest.approx(np.array(COSTS.seconds))


def test_without_measured_heads_layers_cost_what_they_did() -> None:
    costs = CostModel(8, LENGTHS, ((0.001, 0.004),) * EXITS).keep_exits((3, 6))
    np.testing.assert_allclose(costs.seconds, [[0.003, 0.012]] * 2)
    assert costs.head_shares == ()


def test_an_exit_that_breaks_the_agreement_goes(rows: Rows) -> None:
    placement = choose_exits(rows, "accuracy", Wish(max_drop=1.0), Pabee(patience=1), COSTS)
    assert 3 not in placement.exits
    assert placement.exits[-1] == EXITS
    every, chosen = placement.steps[0], _step(placement.steps, placement.exits)
    assert chosen.seconds < 0.9 * every.seconds


def test_exits_go_one_by_one_to_the_last(rows: Rows) -> None:
    steps = choose_exits(rows, "accuracy", Wish(max_drop=1.0), Pabee(patience=1), COSTS).steps
    assert [len(step.exits) for step in steps] == [6, 5, 4, 3, 2, 1]
    for before, after in itertools.pairwise(steps):
        assert set(after.exits) < set(before.exits)
    assert steps[-1].exits == (EXITS,)
    assert steps[-1].drop == 0.0


def test_what_a_step_says_is_what_a_run_would_do(rows: Rows) -> None:
    rule = FPabee(threshold=0.1, patience=1)
    for step in choose_exits(rows, "accuracy", Wish(max_drop=1.0), rule, COSTS).steps:
        assert step.rule is not None
        assert step.drop <= 1.0
        kept = rows.keep_exits(step.exits)
        exits = simulate(kept.logits, step.rule, kept.problem_type).exits
        costs = COSTS.keep_exits(step.exits).row_costs(rows.lengths)
        assert step.seconds == pytest.approx(costs[exits - 1, np.arange(len(rows))].mean())
        if isinstance(step.rule, FPabee):
            assert step.rule.measure is rule.measure, "the kind of rule stays"
        else:
            assert len(step.exits) == 1


def test_fewer_exits_win_a_tie(make_rows: Callable[..., Rows]) -> None:
    """Exits that no row leaves at cost nothing where heads were not measured: they go."""
    rows = make_rows(300, EXITS, 3)
    logits = rows.logits.copy()
    logits[:-1] = np.random.default_rng(2).normal(size=logits[:-1].shape)
    noise = Rows(logits, rows.lengths, rows.expected, rows.problem_type)
    costs = CostModel(8, LENGTHS, ((0.001, 0.004),) * EXITS)
    placement = choose_exits(noise, "accuracy", Wish(max_drop=0.0), Pabee(patience=1), costs)
    assert placement.exits == (EXITS,)


def test_a_wished_speed_takes_the_smallest_drop(rows: Rows) -> None:
    placement = choose_exits(rows, "accuracy", Wish(speedup=1.5), Pabee(patience=1), COSTS)
    granted = [step for step in placement.steps if step.rule is not None]
    chosen = _step(placement.steps, placement.exits)
    assert chosen.drop == min(step.drop for step in granted)
    full = COSTS.keep_exits(chosen.exits).row_costs(rows.lengths)[-1].mean()
    assert chosen.seconds <= full / 1.5


def test_a_speed_that_few_exits_cannot_have_is_said(rows: Rows) -> None:
    steps = choose_exits(rows, "accuracy", Wish(speedup=1.5), Pabee(patience=1), COSTS).steps
    assert (steps[-1].rule, steps[-1].seconds) == (None, np.inf)
    assert steps[0].rule is not None


def _step(steps: tuple[Step, ...], exits: tuple[int, ...]) -> Step:
    (step,) = [step for step in steps if step.exits == exits]
    return step
