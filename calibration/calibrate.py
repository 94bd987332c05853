"""Calibrate: trace labelled rows once, choose operating points, write them into the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..runtime.artifact.folder import read_manifest, write_manifest
from ..runtime.engine import Engine
from ..runtime.files import Row, read_rows
from ..runtime.progress import Progress, silent
from ..runtime.rules.rules import ExitRule
from .checks import check_request
from .choose import Selector
from .costs import measure_costs
from .families import DEFAULT_MEASURES, PARTS
from .goals import CalibrationOptions
from .points import PointMaker
from .result import TESTED, Calibration, with_points
from .risk import RiskOf
from .scoring import AGREEMENT, METRICS
from .stopping_costs import StoppingCosts
from .trace import data_sha256, trace_rows

CROSS_VALIDATED = f"{PARTS}-fold cross-validation"
"""How points are judged without other rows."""


def calibrate(
    folder: str | Path,
    data: str | Path | Sequence[Row],
    options: CalibrationOptions | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Choose operating points of a target and write them into the manifest.

    The rows run once, at full depth; every rule and setting is then simulated on their logits.
    Their logits are kept in `calibration/` in the folder, so that the next goal on the same rows
    needs no second trace. Nothing else should run on the machine, because the times of segments and
    of chosen settings are measured.

    Args:
        folder: the engines folder.
        data: at least 50 labelled rows like those that will be classified, or a file of them in
            any format of `runtime.read_rows`.
        options: what to calibrate for; the default is the three points of `DEFAULT_GOALS`.
        progress: reports the current step.

    Returns:
        The points, and what they were chosen from.

    Raises:
        InputError: the rows cannot be used, or a goal cannot be met; the manifest stays unchanged.
        ArtifactError: the folder is damaged, or cannot be written.
        BackendError: the target cannot run here.

    Example:
        ```python
        from fpabee.calibration import calibrate
        from fpabee.runtime import Engine

        result = calibrate("engines/", "dev.jsonl")
        for point in result.points:
            low, high = point.held_out.interval
            print(f"{point.name}: {point.held_out.drop:.2f} points lost ({low:.2f} to {high:.2f})")

        with Engine.load("engines/", operating_point="fast") as engine:
            print(engine.predict(["turn on the lights"]))
        ```
    """
    path, options = Path(folder), options or CalibrationOptions()
    rows = list(read_rows(data, options.reading) if isinstance(data, str | Path) else data)
    test = list(read_rows(options.test, options.reading)) if options.test else None
    # Rows run to full depth, so the target needs no operating point, not even a valid one.
    rule = ExitRule.from_dict(read_manifest(path).default_rule)
    with Engine.load(path, options.target, threads=options.threads, rule=rule) as engine:
        metric = _metric(engine, options)
        warnings = check_request(engine, options, metric, rows, test or [])
        place = path / "calibration"
        seen = trace_rows(engine, rows, place, not options.unlabelled, progress)
        held = None
        if test is not None:
            held = trace_rows(engine, test, place, not options.unlabelled, progress)
        costs = []
        for batch in sorted({1, options.batch_size}):
            progress(f"time segments, batch {batch}", 0, 1)
            costs.append(measure_costs(engine, seen.lengths, batch))
        stopping_costs = StoppingCosts(seen, metric, costs[-1].row_costs(seen.lengths))
        selector = Selector(stopping_costs, options.competing, DEFAULT_MEASURES)
        chooser = PointMaker(engine, options, progress, selector, costs, held)
        points = chooser.points([row.content for row in rows])
        default = options.default if options.default in options.asked else points[0].name
        result = Calibration(
            folder=path,
            target=engine.target,
            held_out=_held_out_name(options),
            rows=seen,
            test=held,
            points=points,
            default=default,
            comparisons=chooser.comparisons(options.asked[default], points),
            selector=selector,
            layers=engine.manifest.exit_layers,
            warnings=tuple(warnings),
        )
    write_manifest(path, with_points(read_manifest(path), result, data_sha256(rows)))
    return result


def _metric(engine: Engine, options: CalibrationOptions) -> str:
    """The metric that settings are judged by."""
    disagreement = options.bound is not None and options.bound.risk_of is RiskOf.DISAGREEMENT
    if options.metric is None and (options.unlabelled or disagreement):
        return AGREEMENT
    return options.metric or METRICS[engine.manifest.task.problem_type][0]


def _held_out_name(options: CalibrationOptions) -> str:
    if options.test is not None:
        return Path(options.test).name
    return TESTED if options.bound else CROSS_VALIDATED
