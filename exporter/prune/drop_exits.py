"""Drop exits: a new engines folder with some of the exits, calibrated again. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...calibration import Bound, CalibrationOptions, RiskOf, calibrate
from ...calibration.scoring import AGREEMENT
from ...calibration.trace import expected_labels, stored_rows
from ...runtime.agreement import Agreement
from ...runtime.artifact.folder import read_manifest
from ...runtime.artifact.manifest import Manifest, Target
from ...runtime.artifact.operating_point import OperatingPoint
from ...runtime.engine import Engine
from ...runtime.errors import ArtifactError, FpabeeError, InputError, Remedy
from ...runtime.files import ReadOptions, Row, read_rows
from ...runtime.optional_packages import require
from ...runtime.progress import Progress, silent
from ...runtime.rules.base import ExitRule
from ..add_targets import PLAN_BACKENDS, AddTargetsOptions, add_target
from ..staging import check_output, resolved, staging
from .keep import check_exits, keep_exits


@dataclass(frozen=True)
class DropExitsOptions:
    """Which exits are kept, and how.

    Attributes:
        exits: the exits to keep, counted from 1, ascending.
        target: the target whose operating points are calibrated again; None: the default one.
        calibration_data: a file of labelled rows, in any format of `read_rows`; None: the rows
            that calibrated each point, which the engines folder holds.
        reading: how that file is read.
        force: replace an engines folder that exists.
        threads: CPU threads.
        targets: how plans are built again, except for their shapes, GPUs and compatibility, which
            stay as they were.
    """

    exits: tuple[int, ...]
    target: str | None = None
    calibration_data: Path | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    force: bool = False
    threads: int | None = None
    targets: AddTargetsOptions = field(default_factory=AddTargetsOptions)


@dataclass(frozen=True)
class RecalibratedPoint:
    """An operating point before and after.

    Attributes:
        before: with all exits.
        after: with the kept exits, on the same rows.
    """

    before: OperatingPoint
    after: OperatingPoint


@dataclass(frozen=True)
class LostPoint:
    """An operating point that the new folder does not have.

    Attributes:
        target: its target in the old folder.
        point: its name there.
        reason: why it was not calibrated again.
    """

    target: str
    point: str
    reason: str


@dataclass(frozen=True)
class DropExitsResult:
    """A new engines folder with fewer exits.

    Attributes:
        folder: the new engines folder.
        manifest: its manifest.
        exits: the numbers that the kept exits had in the old folder.
        agreement: how closely the new chain agrees with the PyTorch model.
        points: the operating points that were calibrated again, by name.
        lost: those that were not.
        built: targets that were built again.
        left_out: targets of the old folder that the new one does not have.
        target: the target whose points were calibrated again.
        default_before: the point of this target that ran if none was named; may be empty.
    """

    folder: Path
    manifest: Manifest
    exits: tuple[int, ...]
    agreement: Agreement
    points: dict[str, RecalibratedPoint]
    lost: tuple[LostPoint, ...]
    built: tuple[str, ...]
    left_out: tuple[str, ...]
    target: str
    default_before: str

    @property
    def default(self) -> str | None:
        """The point that runs if none is named; may be empty. None: the target was not built."""
        target = self.manifest.targets.get(self.target)
        return None if target is None else target.default_operating_point


def drop_exits(
    source: str | Path,
    output: str | Path,
    options: DropExitsOptions,
    progress: Progress = silent,
) -> DropExitsResult:
    """Write an engines folder with fewer exits, and calibrate its operating points again.

    Targets that were built are built again if this machine can; those for CPUs in int8 keep their
    ranges. Points of one target are calibrated again, for the same goals, on the rows that
    calibrated them.

    Args:
        source: the engines folder to start from; it is not changed.
        output: the folder to write.
        options: the exits to keep, and more.
        progress: called with (what, done, total).

    Raises:
        ModelError: exits that the model does not have.
        InputError: the given rows cannot be read, or lack labels.
        ArtifactError: a folder is damaged, exists, or cannot be written.
        VerificationError: the new chain does not reproduce the PyTorch model.
        BackendError: the target cannot run here.
    """
    require("merge")
    old, new = Path(source), resolved(output)
    manifest = read_manifest(old)
    if new.is_relative_to(old.resolve()):
        raise ArtifactError(
            f"{old} cannot be overwritten with its own contents",
            Remedy("give another folder as {output}"),
        )
    check_output(new, options.force)
    check_exits(options.exits, len(manifest.segments))
    with Engine.load(old, options.target, threads=options.threads) as engine:
        name = engine.target
    target = manifest.targets[name]
    # Unusable rows are refused before the folder is written.
    rows = None
    if options.calibration_data is not None:
        rows = list(read_rows(options.calibration_data, options.reading))
        if any(point.metric != AGREEMENT for point in target.operating_points.values()):
            expected_labels(rows, manifest.task)
    progress("merge", 0, len(options.exits))
    with staging(new) as folder:
        kept, agreement = keep_exits(old, manifest, options.exits, folder)
    built = _rebuild(new, manifest, kept, options.targets, progress)
    points: dict[str, RecalibratedPoint] = {}
    lost: list[LostPoint] = []
    is_built = name in read_manifest(new).targets
    for other, its in manifest.targets.items():
        for point, before in its.operating_points.items():
            if other != name:
                lost.append(LostPoint(other, point, "it was measured on another target"))
            elif not is_built:
                lost.append(LostPoint(name, point, "the target could not be built here"))
            elif before.is_guaranteed and rows is None:
                # The rows that calibrated the points may have chosen the exits.
                reason = "its guarantee needs rows that chose no exits"
                lost.append(LostPoint(name, point, reason))
    for group in _groups(target, rows is not None) if is_built else ():
        try:
            points |= _recalibrate(old, manifest, new, name, group, rows, options, progress)
        except FpabeeError as error:
            lost += [LostPoint(name, point, error.message) for point in group]
    final = read_manifest(new)
    return DropExitsResult(
        folder=Path(output),
        manifest=final,
        exits=options.exits,
        agreement=agreement,
        points=points,
        lost=tuple(lost),
        built=tuple(built),
        left_out=tuple(other for other in manifest.targets if other not in final.targets),
        target=name,
        default_before=target.default_operating_point,
    )


def _rebuild(
    folder: Path, old: Manifest, manifest: Manifest, options: AddTargetsOptions, progress: Progress
) -> list[str]:
    """Build again what this machine can build of the old targets; returns their names."""
    built = []
    plans = [target for target in old.targets.values() if target.backend in PLAN_BACKENDS]
    # Those of TensorRT for several GPUs become one, for the GPU of this machine.
    for (backend, precision), target in {(t.backend, t.precision): t for t in plans}.items():
        changed = dataclasses.replace(options, plans=options.plans.like(target))
        try:
            manifest, name = add_target(folder, manifest, backend, precision, changed, progress)
        except FpabeeError:
            manifest = read_manifest(folder)
            if f"{backend}-{precision}" not in manifest.not_built:  # where it says why
                raise
        else:
            built += [name] if name is not None else []
    return built


def _groups(target: Target, new_rows: bool) -> list[dict[str, OperatingPoint]]:
    """The points of a target, in groups that one calibration can make.

    A bound needs its own calibration. So does a goal for speed: if it cannot be met, the other
    points are not lost with it. The group with the default point comes last, so that it remains
    the default.
    """
    groups: dict[tuple[object, ...], dict[str, OperatingPoint]] = {}
    for name, point in target.operating_points.items():
        if point.is_guaranteed and not new_rows:
            continue
        alone = name if point.goal is None or point.goal.speedup is not None else ""
        key = (point.metric, point.data_sha256, _batch_size(point), alone)
        groups.setdefault(key, {})[name] = point
    return sorted(groups.values(), key=lambda group: target.default_operating_point in group)


def _batch_size(point: OperatingPoint) -> int:
    """The batch size that the point was chosen for."""
    return max((int(size) for size in point.measured_speedup), default=1)


def _recalibrate(
    old: Path,
    manifest: Manifest,
    new: Path,
    name: str,
    group: dict[str, OperatingPoint],
    rows: Sequence[Row] | None,
    options: DropExitsOptions,
    progress: Progress,
) -> dict[str, RecalibratedPoint]:
    """Calibrate points of a target again, for the same goals or the same bound."""
    first = next(iter(group.values()))
    if rows is None:
        rows = stored_rows(old / "calibration", manifest, name, first.data_sha256)
    if rows is None:
        raise InputError(f"its rows are not in {old / 'calibration'}")
    # A guaranteed point chooses its own rule, and full depth cannot be chosen as a rule.
    free = [point for point in group.values() if not point.is_guaranteed]
    rules = [ExitRule.from_dict(point.rule) for point in free]
    names = dict.fromkeys(rule.name for rule in rules)
    measures = [getattr(rule, "measure", None) for rule in rules]
    bound, certificate = None, first.certificate
    if first.goal is None and certificate is not None:
        risk_of = RiskOf(certificate.risk_of)
        bound = Bound(certificate.risk / 100, certificate.confidence / 100, risk_of)
    default = manifest.targets[name].default_operating_point
    chosen = CalibrationOptions(
        goals={point: its.goal for point, its in group.items() if its.goal is not None},
        bound=bound,
        name=next(iter(group)),
        default=default if default in group else next(iter(group)),
        metric=first.metric,
        rules=tuple(rule for rule in names if rule != "budget"),
        measures=tuple(dict.fromkeys(m for m in measures if m is not None)),
        target=name,
        unlabelled=first.metric == AGREEMENT and any(row.labels is None for row in rows),
        batch_size=_batch_size(first),
        threads=options.threads,
    )
    calibrate(new, rows, chosen, progress)
    made = read_manifest(new).targets[name].operating_points
    return {point: RecalibratedPoint(before, made[point]) for point, before in group.items()}
