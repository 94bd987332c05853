"""What a calibration found, on rows that did not choose it, and how the manifest records it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..runtime.artifact.exits import Exits
from ..runtime.artifact.folder import EnginesFolder
from ..runtime.artifact.manifest import Manifest, with_operating_points
from ..runtime.artifact.operating_point import Certificate, Goal, OperatingPoint, QuickPass
from ..runtime.artifact.quick import QuickCosts, logits_sha256
from ..runtime.files import Row
from ..runtime.rules.measures import Integers
from ..runtime.rules.rules import ExitRule
from ..runtime.targets import rule_of, target_of
from .choose import Search
from .goals import Bound
from .scoring import AGREEMENT, LabelledLogits, Scorer

_RESAMPLES = 2000


@dataclass(frozen=True)
class Report:
    """Rows that neither choose nor certify, to report operating points on.

    Attributes:
        rows: the rows.
        name: what they are called where figures of them are shown.
        reference: `[rows, labels]` float32, the logits of the classifier that decisions are
            compared with; None: the last exit.
    """

    rows: Sequence[Row]
    name: str
    reference: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a rule gave on some rows.

    Attributes:
        metric: name of the metric, which goes from 0 to 1 (Matthews correlation from -1).
        score: the metric with the rule.
        full_depth_score: the metric at the last exit.
        drop: `full_depth_score` minus `score`, in points.
        interval: of the drop in points at 95 %, see `drop_interval`.
        mean_depth: mean number of layers that ran for a row.
        exits: how many rows stopped at each exit, from the first exit on.
        rows: how many rows there were.
        exit_0_changed: how many rows stopped at exit 0 with another decision than full depth.
        relabelled: how many rows got another answer than at full depth, or from the reference.
    """

    metric: str
    score: float
    full_depth_score: float
    drop: float
    interval: tuple[float, float]
    mean_depth: float
    exits: tuple[int, ...]
    rows: int
    exit_0_changed: int = 0
    relabelled: int = 0

    @property
    def changed_answers(self) -> int:
        """If the metric is a share of unchanged units: how many differ from the reference."""
        return round(self.rows * (1 - self.score))


@dataclass(frozen=True)
class Point:
    """One operating point.

    Attributes:
        rule: its rule.
        chosen_on: what the rule gives on the rows that chose it.
        held_out: what it gives on rows that did not choose it.
        name: its name.
        goal: what was asked for.
        measured: measured speed-up over full depth on the target, by batch size: 1 for rows one by
            one, a larger number for windows of 128 rows.
        certificate: the guarantee, if one was asked for and the rows allow it.
        refusal: what was found if they do not; then every layer runs. Else empty.
        quick_target: the target of its quick pass, or empty without one.
        p99_share: see `QuickPass`.
    """

    rule: ExitRule
    chosen_on: Outcome
    held_out: Outcome
    name: str
    goal: Goal | Bound
    measured: dict[str, float]
    certificate: Certificate | None = None
    refusal: str = ""
    quick_target: str = ""
    p99_share: float | None = None

    @property
    def quick_costs(self) -> QuickCosts | None:
        """What rows cost because of the quick pass, or None without one."""
        if not self.quick_target:
            return None
        return QuickCosts.of(self.chosen_on.exits, self.measured, self.p99_share)

    def bounds_only_flags(self, rows: LabelledLogits) -> bool:
        """Whether it bounds which labels are flagged, while other answers of the model may change.

        Args:
            rows: those that chose it.
        """
        bounds_answers = isinstance(self.goal, Goal) or self.goal.drop is not None
        return rows.decides_by_flags and not bounds_answers


@dataclass(frozen=True)
class Calibration:
    """What a calibration found; `write_report` turns it into a page.

    Attributes:
        folder: the engines folder.
        target: the target that was calibrated.
        held_out: which rows the points are reported on.
        rows: the trace of the rows that chose the points.
        test: the trace of the rows that the points are reported on; None if cross-validated.
        points: the operating points.
        default: the point that runs if none is named; empty: the default rule of the folder.
        search: the settings that the points were chosen from; not public.
        layers: how many layers have run at each exit, in all passes.
        hardware: what the points were measured on.
        warnings: what is wrong with the rows without making the result useless.
        kept: names of points that the folder keeps as they were, because they have a certificate
            and the new ones have none.
    """

    folder: Path
    target: str
    held_out: str
    rows: LabelledLogits
    test: LabelledLogits | None
    points: tuple[Point, ...]
    default: str
    search: Search
    layers: tuple[int, ...]
    hardware: str
    warnings: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def is_judged(self, point: Point) -> bool:
        """Whether a point was judged on other rows with a setting that stops rows.

        With cross-validation it is not if four fifths of the rows confirm no faster setting,
        although all rows do.
        """
        stops = any(point.held_out.exits[:-1])
        return stops or self.test is not None or not any(point.chosen_on.exits[:-1])

    @property
    def depth(self) -> int:
        """How many layers full depth has."""
        return self.layers[-2 if self.rows.has_quick_pass else -1]

    @property
    def full_depth_score(self) -> float:
        """The metric at full depth on the rows that chose the points."""
        return self.search.stopping_costs.scorer.full_depth


def counts(stops: Integers, exits: Exits) -> tuple[int, ...]:
    """How many rows stop at each exit, from the first exit on.

    Args:
        stops: `[rows]` the exit of each row.
        exits: of the model.
    """
    return tuple(np.bincount(exits.place(stops), minlength=len(exits)).tolist())


def drop_interval(
    scorer: Scorer, exits: Integers, level: float = 0.95, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """Interval of the drop in points: a bootstrap over rows, each with both of its answers.

    A bootstrap cannot show a kind of change that the rows do not hold. So where some row stopped
    early, neither end is closer to the drop than the exact binomial bound on the share of rows
    with a change that none of n rows shows: 1 - (alpha / 2)^(1/n), about 3.7/n at 95 % (Clopper &
    Pearson 1934; the "rule of three", Hanley & Lippman-Hand 1983). This is exact for means over
    rows, and a rule of thumb for other metrics.

    Args:
        scorer: the metric of the rows.
        exits: `[rows]` the exit of each row.
        level: the confidence level.
        resamples: of the bootstrap.
    """
    rows = len(exits)
    both = np.concatenate([scorer.sums[-1], scorer.at(exits)], axis=-1)
    # Rows with equal terms are drawn together.
    kinds, counts = np.unique(both, axis=0, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(rows, counts / rows, resamples)
    full, early = np.split(drawn @ kinds, 2, axis=-1)
    drops = scorer.value(full) - scorer.value(early)
    low, high = np.quantile(drops, [(1 - level) / 2, (1 + level) / 2])
    if (exits < scorer.rows.exits[-1]).any():
        drop = scorer.full_depth - scorer.score(exits)
        unseen = 1 - ((1 - level) / 2) ** (1 / rows)
        low = min(low, drop - unseen)
        high = max(high, drop + unseen)
        # No rule agrees with full depth more often than full depth itself.
        if scorer.metric == AGREEMENT and scorer.rows.reference is None:
            low = max(low, 0.0)
    return float(100 * low), float(100 * high)


def make_default(folder: Path, name: str, target: str | None = None) -> str:
    """Make an operating point the default of its target, without a new calibration.

    Args:
        folder: the engines folder.
        name: the operating point.
        target: the target, which then becomes the default target of the folder and stays it; None
            means the default target.

    Returns:
        The name of the target.

    Raises:
        ArtifactError: the folder is damaged, or cannot be written.
        BackendError: the target does not exist.
        RuleError: the target has no such operating point.
    """
    engines = EnginesFolder.read(folder)
    manifest = engines.manifest
    chosen = target_of(engines, target or manifest.default_target)
    rule_of(manifest, chosen, name)
    changed = msgspec.structs.replace(manifest.targets[chosen], default_operating_point=name)
    engines = engines.with_target(chosen, changed)
    if target is not None:
        engines = engines.with_manifest(default_target=chosen, default_is_fixed=True)
    engines.write()
    return chosen


def with_points(engines: EnginesFolder, result: Calibration, data_sha256: str) -> EnginesFolder:
    """The folder with the points of a calibration, which is not written.

    Full depth loses nothing against itself, but it may against another classifier. So a point
    without a certificate about that classifier is left out, as are those that `kept` names.

    Args:
        engines: the folder.
        result: the calibration.
        data_sha256: hash of the rows that chose the points, see `runtime.files.rows.data_sha256`.
    """
    target = engines.manifest.targets[result.target]
    points = {
        point.name: recorded(
            point, engines.manifest, result.target, result.held_out, result.hardware, data_sha256
        )
        for point in result.points
        if (point.certificate or result.rows.reference is None)
        and point.name not in result.kept
        # What runs all layers gains nothing by a quick pass.
        and (point.quick_target or not result.rows.has_quick_pass)
    }
    if not points:
        return engines
    every = target.operating_points | points
    default = result.default
    if default not in {"", *every}:
        # A bolder point that nobody has named must not take the place of one that was refused.
        is_quick = result.rows.has_quick_pass
        default = target.default_operating_point if is_quick else next(iter(points))
    changed = with_operating_points(target, every, default)
    return engines.with_target(result.target, changed)


def recorded(
    point: Point,
    manifest: Manifest,
    target: str,
    held_out_rows: str,
    hardware: str,
    data_sha256: str,
) -> OperatingPoint:
    """An operating point as the manifest has it.

    Args:
        point: the point.
        manifest: of the folder.
        target: the name of its target.
        held_out_rows: what the rows are called that it is reported on.
        hardware: what it was measured on.
        data_sha256: hash of the rows that chose it, see `runtime.files.rows.data_sha256`.
    """
    held_out = point.held_out
    runs = point.chosen_on
    return OperatingPoint(
        rule=point.rule.to_dict(),
        goal=point.goal if isinstance(point.goal, Goal) else None,
        metric=held_out.metric,
        score=held_out.score,
        full_depth_score=held_out.full_depth_score,
        drop_interval=held_out.interval,
        held_out=held_out_rows,
        rows=held_out.rows,
        data_sha256=data_sha256,
        mean_depth=runs.mean_depth,
        exits=runs.exits,
        measured_speedup=point.measured,
        versions={**manifest.targets[target].versions, "fpabee": __version__},
        hardware=hardware,
        certificate=point.certificate,
        quick=_quick_pass(point, manifest, target) if point.quick_target else msgspec.UNSET,
    )


def _quick_pass(point: Point, manifest: Manifest, target: str) -> QuickPass:
    """The quick pass of a point as the manifest has it."""
    alone = one_pass(point.name)
    return QuickPass(
        target=point.quick_target,
        sha256=logits_sha256(manifest, point.quick_target),
        p99_share=point.p99_share,
        alone=alone if alone in manifest.targets[target].operating_points else "",
    )


def one_pass(name: str) -> str:
    """The name of the point that makes the promise of another one without its quick pass."""
    return f"{name}-one-pass"
