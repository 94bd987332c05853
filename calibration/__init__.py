"""Calibration: choose thresholds with a stated risk on the user's own rows.

Rows run once, at full depth; every rule and setting is then simulated on their logits. Needs the
runtime only: neither torch nor transformers nor onnx.

`calibrate` writes operating points into an engines folder, as `CalibrationOptions` ask for, and
`write_report` shows what it found. Drops are in points: hundredths of a metric from 0 to 1.

The modules in the order of the steps: `goals` (what is asked), `trace` (run the rows), `scoring`
(metrics), `costs` (what stopping early costs and loses), `settings` and for rankings `query_logits`
(lists from cautious to bold), `choose` (goals on average), `evidence` (what texts or queries lose),
`exact` (tests of shares), `guarantee` (promises with stated confidence), `timing`, `result`,
`report`; `calibrate` and for rankings `ranking` run them.
"""

from ..runtime.artifact.operating_point import Goal
from .calibrate import calibrate
from .goals import DEFAULT_GOALS, Bound, CalibrationOptions
from .report import write_report
from .result import Calibration, Outcome, Point, Report
from .scoring import LabelledLogits
from .settings import threshold_for_depth

__all__ = [
    "DEFAULT_GOALS",
    "Bound",
    "Calibration",
    "CalibrationOptions",
    "Goal",
    "LabelledLogits",
    "Outcome",
    "Point",
    "Report",
    "calibrate",
    "threshold_for_depth",
    "write_report",
]
