"""Curves agree with a simulation of their settings."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fpabee.calibration import Calibration
from fpabee.calibration.outcome import exits_of, outcome
from fpabee.calibration.report.fronts import MOST_CURVES, FrontSetting, rule_fronts
from fpabee.calibration.scoring import LabelledLogits, Scorer
from fpabee.runtime.artifact.operating_point import Goal
from fpabee.runtime.progress import silent
from fpabee.runtime.rules.measures import Answers

Make = Callable[..., Calibration]


def given(result: Calibration, rows: LabelledLogits, exits: Answers) -> tuple[float, float, float]:
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
    shown = {setting.curve for setting in settings}
    assert {"fpabee", "pabee", "entropy"} <= shown <= set(result.selector.kinds)
    assert {point.kind for point in result.points} <= shown
    assert len(shown) <= MOST_CURVES
    for setting in settings[::5]:
        goal = Goal(speedup=setting.wished_speedup)
        exits = result.selector.held_out(goal, [setting.curve])
        judged = setting.estimated_speedup, setting.drop, setting.mean_depth
        assert judged == pytest.approx(given(result, result.rows, exits))
        own, _, _ = given(result, result.rows, exits_of(setting.rule, result.rows))
        assert own >= setting.wished_speedup * (1 - 1e-9)


def test_a_curve_is_judged_on_the_test_file_if_there_is_one(make_calibration: Make) -> None:
    result = make_calibration(with_test=True)
    assert result.test is not None
    for setting in curve(rule_fronts(result, silent), "entropy"):
        exits = exits_of(setting.rule, result.test)
        judged = setting.estimated_speedup, setting.drop, setting.mean_depth
        assert judged == pytest.approx(given(result, result.test, exits))


def test_one_exit_has_nothing_to_compare(make_calibration: Make) -> None:
    settings = rule_fronts(make_calibration(exits=1), silent)
    assert {setting.estimated_speedup for setting in settings} == {1.0}
