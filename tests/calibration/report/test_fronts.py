"""Curves agree with a simulation of their settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fpabee.calibration import Calibration
from fpabee.calibration.outcome import exits_of, outcome
from fpabee.calibration.report.fronts import rule_fronts
from fpabee.calibration.scoring import Scorer
from fpabee.runtime.progress import silent


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
@pytest.mark.parametrize("tested", [False, True])
def test_a_curve_goes_from_slow_to_fast_and_is_judged_on_the_test_rows(
    calibrated: Callable[..., Calibration], test_file: Path, metric: str, tested: bool
) -> None:
    result = calibrated(count=80, metric=metric, test=test_file if tested else None)
    rows = result.test if result.test is not None else result.rows
    assert tested is (result.test is not None)
    settings = rule_fronts(result, silent)
    kinds = list(dict.fromkeys(setting.curve for setting in settings))
    assert {"fpabee", "pabee", "entropy"} <= {*kinds} <= {*result.selector.search.kinds}
    assert {point.kind for point in result.points} <= {*kinds, "budget"}
    assert len(kinds) <= 6
    scorer, times = Scorer(rows, metric), result.costs[-1].row_costs(rows.lengths)
    for setting in settings:
        if setting.curve.endswith("per exit") and not tested:
            continue  # judged on rows that its thresholds were not fitted to
        exits = exits_of(setting.rule, rows)
        found = outcome(scorer, exits, times, result.layers)
        assert setting.estimated_speedup == pytest.approx(found.estimated)
        assert (setting.drop, setting.mean_depth) == pytest.approx((found.drop, found.mean_depth))
    for kind in kinds:
        speeds = [setting.estimated_speedup for setting in settings if setting.curve == kind]
        assert tested or speeds == sorted(speeds)
