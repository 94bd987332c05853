"""What a calibration can be asked from Python; the command has checks of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fpabee.calibration import Bound, CalibrationOptions, Goal
from fpabee.runtime import InputError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"goals": {}}, "no goal is given"),
        ({"goals": {"x": Goal()}}, "the goal 'x' has 0 of max_drop and speedup"),
        ({"goals": {"x": Goal(speedup=2.0, guaranteed=True)}}, "only a drop can be guaranteed"),
        ({"goals": {"x": Goal(max_drop=1.0, speedup=2.0)}}, "the goal 'x' has 2 of"),
        ({"goals": {"x": Goal(max_drop=-0.5)}}, "the goal 'x' is -0.5"),
        ({"goals": {"x": Goal(max_drop=101.0)}}, "the goal 'x' is 101"),
        ({"goals": {"x": Goal(max_drop=math.nan)}}, "the goal 'x' is nan"),
        ({"goals": {"x": Goal(speedup=0.5)}}, "the goal 'x' is 0.5"),
        ({"goals": {"x": Goal(speedup=math.inf)}}, "the goal 'x' is inf"),
        ({"goals": {"": Goal(max_drop=1.0)}}, "an operating point is named ''"),
        ({"goals": {"a\nb": Goal(max_drop=1.0)}}, r"an operating point is named 'a\nb'"),
        ({"bound": Bound(0.01, 0.95), "name": ""}, "an operating point is named ''"),
        ({"rules": ("fpabee", "fastbert")}, "exit rule 'fastbert' does not exist"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_asked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        CalibrationOptions(**settings)
    assert message in caught.value.message
    assert caught.value.hint


def test_a_bound_needs_no_goal() -> None:
    assert CalibrationOptions(goals={}, bound=Bound(0.01, 0.95)).bound is not None
