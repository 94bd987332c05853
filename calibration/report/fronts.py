"""Score against speed-up: what each kind of rule gives at every speed, on rows held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ...runtime.artifact.operating_point import Goal
from ...runtime.errors import InputError
from ...runtime.progress import Progress
from ...runtime.rules.measures import Answers, Array, Measure
from ...runtime.rules.rules import ExitRule, FPabee
from ..choose import Selector
from ..outcome import exits_of
from ..result import Calibration
from ..scoring import Rows, Scorer
from ..settings import PER_EXIT, Candidate
from ..stop_scores import StopScores
from ..sweep import Sweep

_SPEEDS = 16
_THRESHOLDS = 12


@dataclass(frozen=True)
class FrontSetting:
    """The setting of the least drop among those that are fast enough.

    Attributes:
        curve: the kind of rule, or the measure.
        wished: the speed-up asked for.
        rule: the setting that all rows choose.
        speedup: in measured times of the segments, on rows that did not choose.
        drop: in points, on the same rows.
        mean_depth: in layers, on the same rows.
        chosen_speedup: of the rule, on the rows that chose it.
        chosen_drop: in points, on the rows that chose it.
    """

    curve: str
    wished: float
    rule: ExitRule
    speedup: float
    drop: float
    mean_depth: float
    chosen_speedup: float
    chosen_drop: float


@dataclass(frozen=True)
class Cell:
    """One setting of patience and threshold, on the rows that chose.

    Attributes:
        patience: of `fpabee`.
        threshold: the same for all exits.
        speedup: in measured times of the segments.
        drop: in points.
        mean_depth: in layers.
    """

    patience: int
    threshold: float
    speedup: float
    drop: float
    mean_depth: float


class _Judge:
    """What rows that stop at given exits give."""

    def __init__(self, result: Calibration, rows: Rows) -> None:
        self.rows = rows
        self.scorer = Scorer(rows, result.selector.stopping_costs.scorer.metric)
        self.costs = result.costs[-1].row_costs(rows.lengths)
        self.layers = np.asarray(result.layers)

    def __call__(self, exits: Answers) -> tuple[float, float, float]:
        """Speed-up, drop in points, mean depth."""
        spent = self.costs[exits - 1, np.arange(len(exits))].sum()
        drop = 100 * (self.scorer.full_depth - self.scorer.score(exits))
        return float(self.costs[-1].sum() / spent), drop, float(self.layers[exits - 1].mean())


def rule_fronts(result: Calibration, progress: Progress) -> list[FrontSetting]:
    """A curve for each kind of rule."""
    kinds = result.selector.kinds
    curves: dict[str, Callable[[Candidate], bool]] = {
        kind: lambda candidate, kind=kind: candidate.kind == kind  # type: ignore[misc]
        for kind in kinds
    }
    return _curves(result, curves, progress)


def measure_fronts(result: Calibration, progress: Progress) -> list[FrontSetting]:
    """A curve for each similarity measure of `fpabee`, one threshold for all exits."""

    def of(measure: Measure) -> Callable[[Candidate], bool]:
        return lambda candidate: (
            isinstance(candidate.rule, FPabee)
            and candidate.rule.measure is measure
            and not candidate.fitted
        )

    return _curves(result, {measure.value: of(measure) for measure in Measure}, progress)


def _curves(
    result: Calibration, curves: dict[str, Callable[[Candidate], bool]], progress: Progress
) -> list[FrontSetting]:
    everything = result.selector.settings(result.selector.kinds)
    most = everything.full_cost / float(everything.costs.min())
    speeds = [float(speed) for speed in np.geomspace(1.0, most * (1 - 1e-9), _SPEEDS)]
    found = []
    for number, (name, keep) in enumerate(curves.items()):
        progress(f"report: {name}", number, len(curves))
        found += list(_curve(result, name, result.selector.narrowed(keep), speeds))
    return found


def _curve(
    result: Calibration, name: str, selector: Selector, speeds: list[float]
) -> Iterator[FrontSetting]:
    kinds = selector.kinds
    if not kinds:
        return
    chose = _Judge(result, result.rows)
    judge = chose if result.test is None else _Judge(result, result.test)
    for speed in speeds:
        goal = Goal(speedup=speed)
        try:
            candidate = selector.choose(goal, kinds)
            if candidate is None:
                return
            if result.test is None:
                held = judge(selector.held_out(goal, kinds))
            else:
                held = judge(exits_of(candidate.rule, result.test))
        except InputError:  # nothing is so fast
            return
        chosen = chose(exits_of(candidate.rule, result.rows))
        yield FrontSetting(name, speed, candidate.rule, *held, *chosen[:2])


def patience_grid(result: Calibration, measure: Measure) -> list[Cell]:
    """What every patience gives at some thresholds, on the rows that chose; simulated."""
    rows = result.rows
    stop = StopScores(rows)
    chose = _Judge(result, rows)
    layers = np.broadcast_to(chose.layers[:, None], chose.costs.shape)
    terms = np.stack([chose.costs, layers.astype(np.float64)], axis=-1)
    values = np.concatenate([terms, chose.scorer.sums], axis=-1)
    cells = []
    grid: Array | None = None
    for patience in range(1, rows.exits):
        family = stop.family(FPabee(threshold=0.0, measure=measure, patience=patience))
        if grid is None:
            grid = _thin(family.grid)
        sums = Sweep(family, grid).sums(values)[0]
        drops = 100 * (chose.scorer.full_depth - chose.scorer.value(sums[:, 2:], len(rows)))
        for threshold, (cost, depth), drop in zip(grid, sums[:, :2], drops, strict=True):
            speedup = float(chose.costs[-1].sum() / cost)
            cells.append(
                Cell(patience, float(threshold), speedup, float(drop), float(depth) / len(rows))
            )
    return cells


def _thin(grid: Array) -> Array:
    """Some thresholds of a grid, without the two ends that stop nobody and everybody."""
    inner = grid[1:-1] if len(grid) > 2 else grid
    steps = np.linspace(0, len(inner) - 1, _THRESHOLDS).round().astype(np.intp)
    return np.asarray(np.unique(inner[steps]))


def compared_measure(result: Calibration) -> Measure:
    """The measure of the best `fpabee`: of the kinds compared, else of the paper's."""
    for kind in (FPabee.name, FPabee.name + PER_EXIT):
        for comparison in result.comparisons:
            if comparison.kind == kind and isinstance(comparison.rule, FPabee):
                return comparison.rule.measure
    return Measure.JSKD
