"""What a calibration found, and how the manifest records it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from .. import __version__
from ..runtime.artifact.folder import read_manifest, write_manifest
from ..runtime.artifact.manifest import Manifest, Target, with_operating_points, with_target
from ..runtime.artifact.operating_point import Certificate, Goal, OperatingPoint
from ..runtime.rules.rules import ExitRule
from ..runtime.targets import rest_precision, rule_of, target_of
from .choose import Selector
from .families import kind_of
from .outcome import Outcome
from .risk import Bound
from .scoring import LabelledLogits

TESTED = "rows that tested the bound"
"""How points with a guarantee are judged without other rows."""


@dataclass(frozen=True)
class Point:
    """One operating point.

    Attributes:
        name: its name.
        goal: what was asked for.
        rule: the rule.
        chosen_on: what it gives on the rows that chose it.
        held_out: what it gives on other rows.
        measured: measured speed-up over full depth on the target, by batch size: 1 for rows one by
            one, a larger number for windows of 128 rows.
        certificate: a bound on the risk, if one was asked for.
        refusal: what would allow a guarantee, if the rows allow none and every layer runs.
    """

    name: str
    goal: Goal | Bound
    rule: ExitRule
    chosen_on: Outcome
    held_out: Outcome
    measured: dict[str, float]
    certificate: Certificate | None = None
    refusal: str = ""

    @property
    def kind(self) -> str:
        """The kind of its rule, see `kind_of`."""
        return kind_of(self.rule)


@dataclass(frozen=True)
class RuleComparison:
    """The best setting of one kind of rule, for the goal of the default point.

    Attributes:
        kind: the kind of the rule, see `kind_of`.
        rule: the rule; full depth if no faster setting meets the goal.
        chosen_on: what it gives on the rows that chose it.
        held_out: what it gives on rows that did not choose it.
    """

    kind: str
    rule: ExitRule
    chosen_on: Outcome
    held_out: Outcome


@dataclass(frozen=True)
class Calibration:
    """What a calibration found; `write_report` turns it into a page.

    Attributes:
        folder: the engines folder.
        target: the target that was calibrated.
        held_out: which rows the points are reported on.
        rows: the trace of the rows that chose the points.
        test: the trace of the rows that the points are reported on; None if cross-fitted.
        points: the operating points.
        default: the point that runs if none is named.
        comparisons: the best setting of every kind of rule for the goal of the default point, the
            fastest first.
        selector: all settings; not public.
        layers: the layer of each exit.
        warnings: what is wrong with the rows without making the result useless.
    """

    folder: Path
    target: str
    held_out: str
    rows: LabelledLogits
    test: LabelledLogits | None
    points: tuple[Point, ...]
    default: str
    comparisons: tuple[RuleComparison, ...]
    selector: Selector
    layers: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    @property
    def comparisons_goal(self) -> str:
        """The goal of the comparisons: that of the default point, never more than an estimate."""
        goal = next(point.goal for point in self.points if point.name == self.default)
        return str(goal.as_goal() if isinstance(goal, Bound) else goal)

    @property
    def full_depth_score(self) -> float:
        """The metric at full depth on the rows that chose the points."""
        return self.selector.stopping_costs.scorer.full_depth


def make_default(folder: Path, name: str, target: str | None = None) -> str:
    """Make an operating point the default of its target, without a new calibration.

    Args:
        folder: the engines folder.
        name: the operating point.
        target: the target; None means the default target of the manifest.

    Returns:
        The name of the target.

    Raises:
        ArtifactError: the folder is damaged, or cannot be written.
        BackendError: the target does not exist.
        RuleError: the target has no such operating point.
    """
    manifest = read_manifest(folder)
    target = target_of(folder, manifest, target or manifest.default_target)
    rule_of(folder, manifest, target, name)
    changed = msgspec.structs.replace(manifest.targets[target], default_operating_point=name)
    write_manifest(folder, with_target(manifest, target, changed))
    return target


def with_points(manifest: Manifest, result: Calibration, data_sha256: str) -> Manifest:
    """The manifest with the points of a calibration.

    Args:
        manifest: the manifest.
        result: the calibration.
        data_sha256: hash of the rows that chose the points, see `trace.data_sha256`.
    """
    target = manifest.targets[result.target]
    points = {point.name: _record(point, result, target, data_sha256) for point in result.points}
    here = rest_precision(target)
    if here == target.rest_precision:
        points = target.operating_points | points
    changed = with_operating_points(target, points, result.default)
    changed = msgspec.structs.replace(changed, rest_precision=here)
    return with_target(manifest, result.target, changed)


def _record(point: Point, result: Calibration, target: Target, data_sha256: str) -> OperatingPoint:
    held_out, runs = point.held_out, point.chosen_on
    guaranteed = isinstance(point.goal, Bound) or point.goal.guaranteed
    return OperatingPoint(
        rule=point.rule.to_dict(),
        goal=point.goal if isinstance(point.goal, Goal) else None,
        metric=held_out.metric,
        score=held_out.score,
        full_depth_score=held_out.full_depth_score,
        drop_interval=held_out.interval,
        held_out=TESTED if guaranteed and result.test is None else result.held_out,
        rows=held_out.rows,
        data_sha256=data_sha256,
        mean_depth=runs.mean_depth,
        exits=runs.exits,
        measured_speedup=point.measured,
        versions={**target.versions, "fpabee": __version__},
        certificate=point.certificate,
    )
