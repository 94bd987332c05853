"""Calibration: choose thresholds with a stated risk, on the user's own rows.

A trace at full depth is taken once; every rule and setting is then a simulation of it.
Stands on the runtime only: no torch, transformers or onnx.
"""

from ..runtime.operating_point import Wish
from .calibrate import DEFAULT_WISHES, Calibration, CalibrationOptions, Point, calibrate
from .outcome import Outcome
from .report import write_report
from .risk import Bound, RiskOf
from .sweep import threshold_for_depth

__all__ = [
    "DEFAULT_WISHES",
    "Bound",
    "Calibration",
    "CalibrationOptions",
    "Outcome",
    "Point",
    "RiskOf",
    "Wish",
    "calibrate",
    "threshold_for_depth",
    "write_report",
]
