"""A calibration without and with fewer exits, and with points that change many answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from fpabee.calibration import Calibration
from fpabee.runtime import Budget


@pytest.fixture
def at_exit_1(calibrated: Callable[..., Calibration]) -> Callable[..., Calibration]:
    """A calibration whose points stop every row at exit 1, which changes many answers."""

    def make(family: str = "bert", **options: int) -> Calibration:
        result = calibrated(family, **options)
        points = [dataclasses.replace(point, rule=Budget(exit=1)) for point in result.points]
        return dataclasses.replace(result, points=tuple(points))

    return make
