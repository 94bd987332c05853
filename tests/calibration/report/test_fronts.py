"""Curves and the heat map say what simulating their settings gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fpabee.calibration import Calibration
from fpabee.calibration.outcome import exits_of, outcome
from fpabee.calibration.report.fronts import (
    FrontSetting,
    compared_measure,
    measure_fronts,
    patience_grid,
    rule_fronts,
)
from fpabee.calibration.scoring import Rows, Scorer
from fpabee.runtime import FPabee, Measure
from fpabee.runtime.artifact.operating_point import Goal
from fpabee.runtime.rules.measures import Answers

Make = Callable[..., Calibration]


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


def given(result: Calibration, rows: Rows, exits: Answers) -> tuple[float, float, float]:
    """Speed-up, drop, mean depth."""
    scorer = Scorer(rows, result.selector.stopping_costs.scorer.metric)
    costs = result.costs[-1].row_costs(rows.lengths)
    found = outcome(scorer, exits, rows.lengths, costs, result.layers)
    return found.estimated, found.drop, found.mean_depth


def curve(settings: list[FrontSetting], name: str) -> list[FrontSetting]:
    return [setting for setting in settings if setting.curve == name]


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_a_curve_is_judged_on_rows_that_did_not_choose(make_calibration: Make, metric: str) -> None:
    result = make_calibration(metric=metric)
    settings = rule_fronts(result, silent)
    assert {setting.curve for setting in settings} == set(result.selector.kinds)
    for setting in settings[::5]:
        goal = Goal(speedup=setting.wished)
        exits = result.selector.held_out(goal, [setting.curve])
        judged = setting.speedup, setting.drop, setting.mean_depth
        assert judged == pytest.approx(given(result, result.rows, exits))
        own = given(result, result.rows, exits_of(setting.rule, result.rows))
        assert (setting.chosen_speedup, setting.chosen_drop) == pytest.approx(own[:2])
        assert setting.chosen_speedup >= setting.wished * (1 - 1e-9)


def test_a_curve_is_judged_on_the_test_file_if_there_is_one(make_calibration: Make) -> None:
    result = make_calibration(with_test=True)
    assert result.test is not None
    for setting in curve(rule_fronts(result, silent), "entropy"):
        exits = exits_of(setting.rule, result.test)
        judged = setting.speedup, setting.drop, setting.mean_depth
        assert judged == pytest.approx(given(result, result.test, exits))


def test_measures_are_compared_apart(make_calibration: Make) -> None:
    result = make_calibration()
    settings = measure_fronts(result, silent)
    assert {setting.curve for setting in settings} == {"jskd", "kl"}
    for setting in settings:
        assert isinstance(setting.rule, FPabee)
        assert setting.rule.measure.value == setting.curve


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_a_cell_is_what_its_rule_gives(make_calibration: Make, family: str) -> None:
    result = make_calibration(family)
    cells = patience_grid(result, Measure.JSKD)
    assert {cell.patience for cell in cells} == {1, 2}
    for cell in cells:
        rule = FPabee(threshold=cell.threshold, measure=Measure.JSKD, patience=cell.patience)
        judged = cell.speedup, cell.drop, cell.mean_depth
        expected = given(result, result.rows, exits_of(rule, result.rows))
        assert judged == pytest.approx(expected)
    depths = [cell.mean_depth for cell in cells if cell.patience == 1]
    assert depths == sorted(depths, reverse=True)
    assert np.ptp(depths) > 0.5


def test_one_exit_has_nothing_to_compare(make_calibration: Make) -> None:
    result = make_calibration(exits=1)
    assert measure_fronts(result, silent) == []
    assert patience_grid(result, compared_measure(result)) == []
    assert {setting.speedup for setting in rule_fronts(result, silent)} == {1.0}
