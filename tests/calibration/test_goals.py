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
        (
            {
                "goals": {
                    "a": Bound(changed_answers=0.1),
                    "b": Bound(missed=0.1, thresholds={"c": 0.5}),
                }
            },
            "guarantees have different thresholds",
        ),
        ({"goals": {"x": Goal(max_drop=1.0, speedup=2.0)}}, "the goal 'x' has 2 of"),
        ({"goals": {"x": Goal(max_drop=-0.5)}}, "the goal 'x' is -0.5"),
        ({"goals": {"x": Goal(max_drop=math.nan)}}, "the goal 'x' is nan"),
        ({"goals": {"x": Goal(speedup=0.5)}}, "the goal 'x' is 0.5"),
        ({"goals": {"x": Goal(speedup=math.inf)}}, "the goal 'x' is inf"),
        ({"goals": {"": Goal(max_drop=1.0)}}, "an operating point is named ''"),
        ({"goals": {"a\nb": Goal(max_drop=1.0)}}, r"an operating point is named 'a\nb'"),
        ({"rules": ("fpabee",)}, "'safe' is guaranteed, so it cannot choose from fpabee"),
        ({"rules": ("entropy", "confidence")}, "thresholds must be known before any row"),
        (
            {
                "goals": {"x": Bound(changed_answers=0.1, thresholds={"a": 0.7})},
                "rules": ("entropy",),
            },
            "entropy knows nothing of the thresholds",
        ),
        ({"rules": ("fpabee", "fastbert")}, "exit rule 'fastbert' does not exist"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_asked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        CalibrationOptions(**settings)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"drop": 0.0}, "give `drop` more than 0 and less than 100"),
        ({"changed_answers": 1.0}, "give `changed_answers` more than 0 and less than 100"),
        (
            {"changed_answers": 0.1, "confidence": 1.0},
            "give `confidence` more than 50 and less than 100",
        ),
        (
            {"changed_answers": 0.1, "confidence": 0.5},
            "give `confidence` more than 50 and less than 100",
        ),
        ({}, "give `drop`, `changed_answers`"),
        ({"missed": 0.02}, "give `thresholds`"),
        ({"missed": 0.02, "thresholds": {"a": 1.0}}, "between 0 and 1"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(settings: dict[str, Any], hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        Bound(**settings)
