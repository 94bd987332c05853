"""Calibration: choose thresholds with a stated risk on the user's own rows.

Rows run once, at full depth; every rule and setting is then simulated on their logits. Needs the
runtime only: neither torch nor transformers nor onnx.

`calibrate` writes operating points into an engines folder, as `CalibrationOptions` ask for, and
`write_report` shows what it found. Drops are in points: hundredths of a metric from 0 to 1.

The modules in the order of the steps: `goals` (what is asked), `checks` (what is refused), `trace`
(run the rows), `scoring` (metrics), `costs` (measured times), `stopping_costs`
(what stopping early costs and loses), `sweep` (all thresholds of a rule), `per_exit`
(thresholds that are fitted), `families` (the settings that compete), `choose` (estimated goals),
`risk` (guarantees), `points` (operating points, judged on other rows), `outcome`, `result`;
`calibrate` runs them.
"""

from ..runtime.artifact.operating_point import Goal
from .calibrate import calibrate
from .goals import DEFAULT_GOALS, CalibrationOptions
from .outcome import Outcome
from .report import write_report
from .result import Calibration, Point, RuleComparison
from .risk import Bound, RiskOf
from .scoring import LabelledLogits
from .sweep import threshold_for_depth

__all__ = [
    "DEFAULT_GOALS",
    "Bound",
    "Calibration",
    "CalibrationOptions",
    "Goal",
    "LabelledLogits",
    "Outcome",
    "Point",
    "RiskOf",
    "RuleComparison",
    "calibrate",
    "threshold_for_depth",
    "write_report",
]
