"""What to calibrate for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.distributions import Measure
from ..runtime.operating_point import Wish
from ..runtime.text_io import Columns, TextFormat
from .risk import Bound

DEFAULT_WISHES = {
    "safe": Wish(max_drop=0.5, surely=True),
    "balanced": Wish(max_drop=0.5),
    "fast": Wish(max_drop=2.0),
}
"""The operating points that come when nothing is wished for; `balanced` becomes the default."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate for.

    Attributes:
        wishes: operating points by name; default: `DEFAULT_WISHES`.
        bound: a guarantee instead of wishes; then `name` names the one point.
        name: of the point of a bound.
        default: the point that runs when none is named; if there is none of that name, the first.
        metric: single-label: `accuracy`, `macro_f1`, `matthews`; multi-label: `exact_match`,
            `micro_f1`, `macro_f1`; both: `agreement` with full depth. None: the first of these,
            or agreement if labels are left aside.
        rules: names of exit rules to choose from, see `runtime.RULES`; empty: all.
        measures: similarity measures of `fpabee` and `either`.
        target: a built target; None: the manifest's default.
        test: a file of more rows, which points are reported on instead of being cross-fitted.
        unlabelled: leave labels aside and hold the rule against full depth.
        tune_cuts: also choose decision cuts (multi-label).
        batch_size: rows at a time that times are measured at and chosen by.
        output: folder for traces; None: `calibration/` in the engines folder.
        threads: CPU threads; None: as in `runtime.Engine.load`.
        seed: deals rows into the parts for cross-fitting.

    Example:
        ```python
        from fpabee.calibration import Bound, CalibrationOptions, RiskOf, Wish

        wishes = {"close": Wish(max_drop=0.5), "twice": Wish(speedup=2.0)}
        two_points = CalibrationOptions(wishes=wishes, default="close")

        bound = Bound(risk=0.02, confidence=0.95, risk_of=RiskOf.DISAGREEMENT)
        no_labels = CalibrationOptions(bound=bound, name="sure", unlabelled=True)
        ```
    """

    wishes: dict[str, Wish] = field(default_factory=lambda: dict(DEFAULT_WISHES))
    bound: Bound | None = None
    name: str = "risk"
    default: str = "balanced"
    metric: str | None = None
    rules: tuple[str, ...] = ()
    measures: tuple[Measure, ...] = tuple(Measure)
    target: str | None = None
    test: Path | None = None
    columns: Columns = field(default_factory=Columns)
    text_format: TextFormat | None = None
    unlabelled: bool = False
    tune_cuts: bool = False
    batch_size: int = 32
    output: Path | None = None
    threads: int | None = None
    seed: int = 0
