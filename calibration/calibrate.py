"""Calibrate: trace labelled rows once, choose operating points, write them into the manifest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact import manifest
from ..runtime.artifact.exits import Exits
from ..runtime.artifact.folder import EnginesFolder
from ..runtime.artifact.operating_point import Goal
from ..runtime.artifact.trained_on import have_trained
from ..runtime.encoding import EncodedRow
from ..runtime.engine import Engine
from ..runtime.errors import InputError
from ..runtime.files import Row, read_rows
from ..runtime.files.rows import data_sha256
from ..runtime.machine import hardware
from ..runtime.rules.measures import Array
from ..runtime.rules.rules import Budget, ExitRule
from ..runtime.tasks import row_of, task_of
from .choose import PARTS, Search
from .costs import StoppingCosts
from .evidence import TextEvidence, needs_in_words
from .goals import Bound, CalibrationOptions
from .guarantee import Certified, certify
from .progress import Progress, silent
from .result import Calibration, Outcome, Point, Report, one_pass, with_points
from .scoring import AGREEMENT, METRICS, LabelledLogits, Scorer
from .settings import exits_of as exits_of_rule
from .settings import settings_lists
from .timing import measure_costs, measure_speedup
from .trace import CALIBRATION, engines_of, expected_labels, trace_rows

logger = logging.getLogger(__name__)

LEAST_ROWS = 50
"""The least number of different texts that is accepted."""
CROSS_VALIDATED = f"{PARTS}-fold cross-validation"
"""How points are judged without other rows."""
# A point of a speed-up that measures slower than all layers is chosen again so often, each time to
# be at least that much faster.
_MOST_TRIES = 4
_LESS = 0.9
_Choice = Callable[[Search], Certified]


def calibrate(
    folder: str | Path,
    data: str | Path | Sequence[Row],
    options: CalibrationOptions | None = None,
    progress: Progress = silent,
    *,
    reference: NDArray[np.float32] | None = None,
    report: Report | None = None,
) -> Calibration:
    """Choose operating points of a target and write them into the manifest.

    The rows run once, at full depth; every rule and setting is then simulated on their logits.
    Their logits are kept in `calibration/` in the folder, so that the next goal on the same rows
    needs no second trace. Nothing else should run on the machine, because the times of segments and
    of chosen settings are measured.

    Args:
        folder: the engines folder.
        data: labelled rows like those that will be classified, or a file of them in any format of
            `runtime.read_rows`. At least 50 different ones, unless there is a reference.
        options: what to calibrate for; the default is the three points of `DEFAULT_GOALS`.
        progress: reports the current step.
        reference: `[rows, labels]` float32, the logits of another classifier for these rows, such
            as the one that the folder was converted from. Promises about decisions are then about
            its decisions instead of those at full depth, so the rounding of the target counts.
        report: rows to report the points on, instead of cross-validation; not with
            `options.test`.

    Returns:
        The points, and what they were chosen from. With a reference, a point that promises nothing
        is not written into the manifest: not even full depth may decide like the reference. Without
        `options.force`, no point without a certificate replaces one that has one, see
        `Calibration.kept`.

    Raises:
        InputError: the folder is a reranker, or of another kind that cannot be calibrated; the rows
            cannot be used, too few of them did not train the exits, or no setting is fast enough,
            as estimated and as measured. The manifest stays unchanged.
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
    path = Path(folder)
    options = options or CalibrationOptions()
    every = list(read_rows(data, options.reading) if isinstance(data, str | Path) else data)
    report = _to_report_on(options, report)
    engines = EnginesFolder.read(path)
    task = engines.manifest.task
    if task_of(task).compares:
        raise InputError(
            f"{path} is a reranker, whose promise is about queries with their documents",
            "convert the model again with other queries or another bound",
        )
    metrics = row_of(METRICS, task.problem_type, "calibrated")
    # Who has a reference knows what trained the exits.
    rows = _new_to_exits(engines, every) if reference is None else every
    quick_target = options.quick_target or ""
    with engines_of(path, options.target, quick_target, options.threads) as (engine, quick):
        metric = _metric(options, metrics)
        least = LEAST_ROWS if reference is None else 1
        warnings = _check(engine.manifest.task, options, metric, rows, report, least)
        if trained := len(every) - len(rows):
            warnings.append(
                f"{trained:,} of {len(every):,} rows are left out: the exits learned from them"
            )
        thresholds = engine.core.task.decision_thresholds(options.thresholds)
        # With a reference, whoever has it says this before the classifier is converted.
        if len(options.goals) == 1 and reference is None:
            _say_needs(options.bounds)

        def traced(some: Sequence[Row], other: NDArray[np.float32] | None) -> LabelledLogits:
            traces = path / CALIBRATION
            logits = trace_rows(engine, some, traces, metric != AGREEMENT, progress, quick)
            return replace(logits, decision_thresholds=thresholds, reference=other)

        seen = traced(rows, reference)
        held = None
        if report is not None:
            held = Scorer(traced(report.rows, report.reference), metric)
        stopping_costs = StoppingCosts(seen, metric, _costs(engine, options, seen, progress))
        search = Search(stopping_costs, settings_lists(seen, options.rules))
        maker = _PointMaker(engine, options, progress, search, held)
        points = tuple(maker.points(engine.core.encode([row.content for row in rows])))
        default, more = _default(engine, options, search, points)
        result = Calibration(
            folder=path,
            target=engine.target,
            held_out=CROSS_VALIDATED if report is None else report.name,
            rows=seen,
            test=None if held is None else held.rows,
            points=points,
            default=default,
            search=search,
            layers=maker.exits.layers_ran,
            hardware=hardware(engine.manifest.targets[engine.target].on_gpu, options.threads),
            warnings=(*warnings, *more),
            kept=() if options.force else _kept(engine, points),
        )
    calibrated = with_points(EnginesFolder.read(path), result, data_sha256(rows))
    calibrated.write()
    return _with_default_of(calibrated, result, engines)


def _to_report_on(options: CalibrationOptions, report: Report | None) -> Report | None:
    """The rows to report on, if there are any.

    Raises:
        InputError: there are two sets of them.
    """
    if options.test is None:
        return report
    if report is not None:
        raise InputError("there are two sets of rows to report on", "give `report` or `test`")
    rows = list(read_rows(options.test, options.reading))
    return Report(rows, Path(options.test).name)


def _costs(
    engine: Engine, options: CalibrationOptions, rows: LabelledLogits, progress: Progress
) -> Array:
    """What it costs to stop a row at each exit, `[exits, rows]`: seconds, or else layers.

    Nobody needs seconds where all goals are bounds, which costs do not choose, and where decisions
    are compared with another classifier: such a conversion draws no curve.
    """
    if rows.reference is None or len(options.bounds) < len(options.goals):
        (costs,) = measure_costs([engine], rows.lengths, options.batch_size, progress)
        return costs.row_costs(rows.lengths)
    layers = np.array(engine.core.exits.layers_ran, np.float64)
    return np.broadcast_to(layers[:, None], rows.logits.shape[:2])


def _metric(options: CalibrationOptions, metrics: Sequence[str]) -> str:
    """The metric that may drop, of those of the task."""
    decisions_only = all(isinstance(g, Bound) and g.drop is None for g in options.goals.values())
    usual = AGREEMENT if decisions_only else metrics[0]
    return options.metric or usual


def _say_needs(bounds: Sequence[Bound]) -> None:
    """Say how many texts bounds need."""
    for bound in bounds:
        for line in needs_in_words(bound):
            logger.warning(line)


def _kept(engine: Engine, points: Sequence[Point]) -> tuple[str, ...]:
    """The points of the folder that have a certificate, while the new ones have none."""
    earlier = engine.manifest.targets[engine.target].operating_points
    certified = {name for name, point in earlier.items() if point.certificate}
    return tuple(sorted(certified & {point.name for point in points if not point.certificate}))


def _default(
    engine: Engine, options: CalibrationOptions, search: Search, points: Sequence[Point]
) -> tuple[str, list[str]]:
    """The point that is to run if none is named.

    Args:
        engine: the engine.
        options: what is asked for.
        search: with the rows that chose the points.
        points: the points.

    Returns:
        Its name, and warnings about the point that was chosen.
    """
    warnings = []
    scorer = search.stopping_costs.scorer
    rows = scorer.rows
    chosen = next((point for point in points if point.name == options.default), points[0])
    earlier = engine.manifest.targets[engine.target].default_operating_point
    default = chosen.name
    if chosen.bounds_only_flags(rows) and rows.reference is None and default != earlier:
        # Whoever runs the folder without a word about the point wants answers.
        default = earlier
        warnings.append(
            f"{chosen.name} is not the default operating point: it bounds which labels are "
            "flagged, and other answers may change"
        )
    lost = scorer.lost_label(exits_of_rule(chosen.rule, rows), engine.labels)
    if lost:
        protected = "a promise about missed texts protects rare labels"
        warnings.append(f"at {chosen.name}, {lost}; {protected}")
    return default, warnings


def _with_default_of(
    calibrated: EnginesFolder, result: Calibration, before: EnginesFolder
) -> Calibration:
    """A result with the default point that the folder has: a refused point is not written.

    Args:
        calibrated: the folder with the points of the result.
        result: the result.
        before: the folder before the calibration, with the default that has perhaps changed.
    """
    earlier, default = (
        engines.manifest.targets[result.target].default_operating_point
        for engines in (before, calibrated)
    )
    warnings = result.warnings
    if earlier not in ("", default, one_pass(default)):
        where = f"the default operating point of {result.target}"
        warnings = (*warnings, f"{where} was {earlier}, and is now {default}")
    return replace(result, default=default, warnings=warnings)


def _new_to_exits(engines: EnginesFolder, rows: Sequence[Row]) -> list[Row]:
    """The rows whose texts did not train the exits, which are too sure of those that did.

    Raises:
        InputError: too few of them are left.
    """
    trained = have_trained(engines, [row.content for row in rows])
    fresh = [row for row, has_trained in zip(rows, trained, strict=True) if not has_trained]
    left = len({row.content for row in fresh})
    if trained.any() and left < LEAST_ROWS:
        raise InputError(
            f"the exits learned from {trained.sum():,} of {len(rows):,} rows, and {left} other "
            "texts are left",
            f"give at least {LEAST_ROWS} texts from which the exits did not learn",
        )
    return fresh


def _check(
    task: manifest.Task,
    options: CalibrationOptions,
    metric: str,
    rows: Sequence[Row],
    report: Report | None,
    least: int,
) -> list[str]:
    """Refuse, before the model runs, what cannot be calibrated.

    Args:
        task: of the model.
        options: what is asked for.
        metric: that may drop.
        rows: that choose.
        report: the rows to report on.
        least: how many different texts have to choose.

    Returns:
        Warnings about the rows.

    Raises:
        InputError: the options do not fit the model, or the rows cannot be used.
    """
    known = METRICS[task.problem_type]
    if metric not in known:
        raise InputError(
            f"there is no metric {metric!r} for {task.problem_type.value}",
            f"choose from {', '.join(known)}",
        )
    texts = {row.content for row in rows}
    if not texts:
        raise InputError("there are no rows to calibrate on", "give rows like those to classify")
    if len(texts) < least:
        raise InputError(
            f"{len(texts)} different texts are too few to choose on one part and judge on another",
            f"give at least {LEAST_ROWS}; about 600 are needed to confirm a drop of half a point",
        )
    warnings: list[str] = []
    if options.bounds and len(texts) < len(rows):
        warnings.append(
            f"{len(rows) - len(texts):,} of {len(rows):,} rows repeat others, and a guarantee "
            "counts each: remove them, unless the rows are a sample of what will be classified"
        )
    if report is None:
        return warnings
    if metric != AGREEMENT:
        expected_labels(report.rows, task_of(task))
    both = [row for row in report.rows if row.content in texts]
    if not both:
        return warnings
    return [
        *warnings,
        f"{len(both)} of {len(report.rows)} test texts are also among the rows that choose (the "
        f"first is {both[0].where}), so their figures look better than those of new rows",
    ]


@dataclass(eq=False)
class _PointMaker:
    """Chooses settings, and judges them on rows that did not choose them.

    Attributes:
        engine: the engine.
        options: what is asked for.
        progress: reports the current step.
        search: the settings that compete.
        held: rows to judge on; None means cross-validation on the rows that choose.
    """

    engine: Engine
    options: CalibrationOptions
    progress: Progress
    search: Search
    held: Scorer | None

    @cached_property
    def exits(self) -> Exits:
        """Those that rows see."""
        return self.engine.core.exits

    @property
    def full_depth(self) -> ExitRule:
        """Every row runs through all layers."""
        return Budget(exit=self.search.stopping_costs.rows.exits[-1])

    def points(self, encoded: Sequence[EncodedRow]) -> Iterator[Point]:
        """An operating point for everything that is asked; rows are for measuring speed-ups."""
        for number, (name, goal) in enumerate(self.options.goals.items()):
            self.progress(f"choose {name}", number, len(self.options.goals))
            if isinstance(goal, Goal) and goal.speedup is not None:
                yield self._fast_point(name, goal, encoded)
            else:
                yield self._point(name, goal, encoded)

    def _fast_point(self, name: str, goal: Goal, encoded: Sequence[EncodedRow]) -> Point:
        """The point of a speed-up, or a bolder one if it measures slower than all layers.

        Raises:
            InputError: no point is as fast as all layers.
        """
        assert goal.speedup is not None
        asked = goal.speedup
        point = self._point(name, goal, encoded)
        slowest = min(point.measured.values())
        with suppress(InputError):  # nothing is as fast
            for _ in range(_MOST_TRIES - 1):
                if slowest >= 1:
                    break
                asked /= min(slowest, _LESS)
                point = self._point(name, Goal(speedup=asked), encoded)
                slowest = min(point.measured.values())
        if slowest >= 1:
            return replace(point, goal=goal)
        raise InputError(
            f"the points that are estimated to be {goal.speedup:g} times as fast, or more, measure "
            f"{slowest:.2f} times as fast as all layers",
            "run nothing else meanwhile, and ask for a larger speed-up; or run all layers",
        )

    def _point(self, name: str, goal: Goal | Bound, encoded: Sequence[EncodedRow]) -> Point:
        """The point of a goal, as its estimated costs choose it."""
        choose = self._choice(goal)
        certified = choose(self.search)
        rule = certified.rule or self.full_depth
        scorer = self.search.stopping_costs.scorer
        stops = exits_of_rule(rule, scorer.rows)
        layers = self.exits.ran(stops)
        batches = sorted({1, self.options.batch_size})
        speeds = {}
        for number, batch in enumerate(batches):
            self.progress(f"time {name}", number, len(batches))
            speeds[batch] = measure_speedup(self.engine, encoded, rule, layers, batch)
        # What runs all layers gains nothing by a quick pass.
        quick_target = "" if rule == self.full_depth else self.exits.quick
        return Point(
            rule=rule,
            chosen_on=self._evidence(scorer).outcome(stops),
            held_out=self._held_out(rule, choose),
            name=name,
            goal=goal,
            measured={str(batch): speed.speedup for batch, speed in speeds.items()},
            certificate=certified.certificate,
            refusal=certified.failed,
            quick_target=quick_target,
            p99_share=speeds[1].p99_share if quick_target else None,
        )

    def _choice(self, goal: Goal | Bound) -> _Choice:
        if isinstance(goal, Goal):
            return lambda search: Certified(search.choose(goal))
        return lambda search: certify(self._evidence(search.stopping_costs.scorer), goal)

    def _evidence(self, scorer: Scorer) -> TextEvidence:
        """What settings give on rows, of which the list of the first rule is tested."""
        return TextEvidence(
            scorer, self.engine.manifest.task.labels, self.options.rules[0], self.exits
        )

    def _held_out(self, rule: ExitRule, choose: _Choice) -> Outcome:
        """How a choice does on rows that did not choose.

        These are the test rows, on which the rule itself is judged. Without them, each part of the
        rows is judged with the setting that the other parts choose.
        """
        if self.held is not None:
            return self._evidence(self.held).outcome(exits_of_rule(rule, self.held.rows))
        stops = self.search.held_out(lambda some: choose(some).rule)
        return self._evidence(self.search.stopping_costs.scorer).outcome(stops)
