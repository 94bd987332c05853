"""What can be asked of a calibration, from Python; the command has checks of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fpabee.calibration import Bound, CalibrationOptions, Goal
from fpabee.runtime import InputError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"goals": {}}, "nothing is wished for"),
        ({"goals": {"x": Goal()}}, "the wish 'x' has 0 of max_drop and speedup"),
        ({"goals": {"x": Goal(max_drop=1.0, speedup=2.0)}}, "the wish 'x' has 2 of"),
        ({"goals": {"x": Goal(max_drop=-0.5)}}, "the wish 'x' is -0.5"),
        ({"goals": {"x": Goal(max_drop=101.0)}}, "the wish 'x' is 101"),
        ({"goals": {"x": Goal(max_drop=math.nan)}}, "the wish 'x' is nan"),
        ({"goals": {"x": Goal(speedup=0.5)}}, "the wish 'x' is 0.5"),
        ({"goals": {"x": Goal(speedup=math.inf)}}, "the wish 'x' is inf"),
        ({"goals": {"": Goal(max_drop=1.0)}}, "an operating point is named ''"),
        ({"goals": {"a\nb": Goal(max_drop=1.0)}}, r"an operating point is named 'a\nb'"),
        ({"bound": Bound(0.01, 0.95), "name": ""}, "an operating point is named ''"),
        ({"rules": ("fpabee", "fastbert")}, "there is no exit rule 'fastbert'"),
        ({"measures": ()}, "no similarity measure is given"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_asked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        CalibrationOptions(**settings)
    assert message in caught.value.message
    assert caught.value.hint


def test_a_bound_needs_no_wish() -> None:
    assert CalibrationOptions(goals={}, bound=Bound(0.01, 0.95)).bound is not None
