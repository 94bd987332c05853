"""What a calibration found, and how it stands in the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .. import __version__
from ..runtime.artifact.manifest import Manifest, Target
from ..runtime.artifact.operating_point import Certificate, Goal, OperatingPoint
from ..runtime.files import Row
from ..runtime.rules.rules import Budget, ExitRule
from .choose import Selector
from .costs import CostModel
from .label_thresholds import TunedLabelThresholds
from .outcome import Outcome
from .risk import Bound
from .scoring import Rows


@dataclass(frozen=True)
class Point:
    """One operating point.

    Attributes:
        name: its name.
        goal: what was asked for.
        kind: the name of its rule, with ` per exit` after it if it has a fitted threshold for
            each exit.
        rule: the rule.
        chosen_on: what it gives on the rows that chose it.
        held_out: what it gives on others.
        measured: ratio of run times on the target, full depth over this, by batch size in rows.
        certificate: a bound on the risk, if one was asked for.
    """

    name: str
    goal: Goal | Bound
    kind: str
    rule: ExitRule
    chosen_on: Outcome
    held_out: Outcome
    measured: dict[str, float]
    certificate: Certificate | None = None

    @property
    def optimism(self) -> float:
        """Points by which the drop looks smaller on the rows that chose the rule."""
        return self.held_out.drop - self.chosen_on.drop


@dataclass(frozen=True)
class RuleComparison:
    """The best setting of one kind of rule, for the wish of the default point.

    Attributes:
        kind: as `Point.kind`.
        rule: the rule.
        held_out: what it gives on rows that did not choose it.
    """

    kind: str
    rule: ExitRule
    held_out: Outcome


@dataclass(frozen=True)
class Calibration:
    """What a calibration found; `write_report` makes a page of it.

    Attributes:
        folder: the engines folder.
        target: the target that was calibrated.
        held_out: which rows points are reported on.
        rows: the rows that chose, with their trace.
        texts: the rows as they were read.
        test: the rows that points are reported on, with their trace; None: cross-fitted.
        points: the operating points.
        default: the one that runs when none is named.
        comparisons: the best of every kind of rule, for the wish of the default point; the
            fastest first.
        costs: measured times: one text at a time, and `CalibrationOptions.batch_size` rows.
        selector: all settings; not public.
        label_thresholds: tuned decision cuts; None: none were asked for.
        layers: the layer of each exit.
    """

    folder: Path
    target: str
    held_out: str
    rows: Rows
    texts: Sequence[Row]
    test: Rows | None
    points: tuple[Point, ...]
    default: str
    comparisons: tuple[RuleComparison, ...]
    costs: tuple[CostModel, ...]
    selector: Selector
    label_thresholds: TunedLabelThresholds | None
    layers: tuple[int, ...]

    @property
    def contenders_wish(self) -> str:
        """What the contenders keep to: the default point's wish; never more than an estimate."""
        goal = next(point.goal for point in self.points if point.name == self.default)
        if isinstance(goal, Bound):
            return f"{Goal(max_drop=100 * goal.risk)} by estimate, not certified"
        return str(goal)

    @property
    def at_full_depth(self) -> tuple[Point, ...]:
        """Points that run every layer, since no faster setting keeps to their wish."""
        last = Budget(exit=len(self.layers))
        return tuple(point for point in self.points if point.rule == last)


def with_points(manifest: Manifest, result: Calibration, data: str) -> Manifest:
    """The manifest with the points; new cuts are for every target, so others lose theirs."""
    targets = dict(manifest.targets)
    task = manifest.task
    label_thresholds = result.rows.label_thresholds
    if label_thresholds != task.label_thresholds:
        task = msgspec.structs.replace(task, label_thresholds=label_thresholds)
        targets = {name: _without_points(target) for name, target in targets.items()}
    target = targets[result.target]
    points = {point.name: _record(point, result, target, data) for point in result.points}
    targets[result.target] = msgspec.structs.replace(
        target,
        operating_points={**target.operating_points, **points},
        default_operating_point=result.default,
    )
    return msgspec.structs.replace(manifest, targets=targets, task=task)


def _without_points(target: Target) -> Target:
    return msgspec.structs.replace(target, operating_points={}, default_operating_point="")


def _record(point: Point, result: Calibration, target: Target, data: str) -> OperatingPoint:
    held_out = point.held_out
    return OperatingPoint(
        rule=point.rule.to_dict(),
        goal=point.goal if isinstance(point.goal, Goal) else None,
        metric=held_out.metric,
        score=held_out.score,
        full_depth_score=held_out.full_depth_score,
        drop_interval=held_out.interval,
        held_out=result.held_out,
        rows=held_out.rows,
        data_sha256=data,
        mean_depth=held_out.mean_depth,
        exits=held_out.exits,
        theoretical_speedup=held_out.theoretical,
        estimated_speedup=held_out.estimated,
        measured_speedup={size: round(ratio, 3) for size, ratio in point.measured.items()},
        versions={**target.versions, "fpabee": __version__},
        certificate=point.certificate,
    )
