"""Calibration: choose thresholds with a stated risk, on the user's own rows.

A trace at full depth is taken once; every rule and setting is then a simulation of it.
Stands on the runtime only: no torch, transformers or onnx.

`calibrate` writes operating points into an engines folder, for what `CalibrationOptions` wish
for; `write_report` shows what it found. Drops are in points: hundredths of a score that goes from
0 to 1.
"""

from ..runtime.artifact.operating_point import Goal
from .calibrate import calibrate
from .costs import CostModel
from .goals import DEFAULT_GOALS, CalibrationOptions
from .label_thresholds import TunedLabelThresholds
from .outcome import Outcome
from .report import write_report
from .result import Calibration, Point, RuleComparison
from .risk import Bound, RiskOf
from .scoring import Rows
from .sweep import threshold_for_depth

__all__ = [
    "DEFAULT_GOALS",
    "Bound",
    "Calibration",
    "CalibrationOptions",
    "CostModel",
    "Goal",
    "Outcome",
    "Point",
    "RiskOf",
    "Rows",
    "RuleComparison",
    "TunedLabelThresholds",
    "calibrate",
    "threshold_for_depth",
    "write_report",
]
