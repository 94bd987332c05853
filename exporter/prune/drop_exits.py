"""Drop exits: a new engines folder with some of the exits, calibrated again. Torch-free."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...calibration.calibrate import calibrate
from ...calibration.goals import CalibrationOptions
from ...calibration.risk import Bound, RiskOf
from ...calibration.scoring import AGREEMENT
from ...calibration.trace import expected_labels, stored_rows
from ...runtime.agreement import Agreement
from ...runtime.artifact.folder import read_manifest
from ...runtime.artifact.manifest import Manifest, NotBuilt
from ...runtime.artifact.operating_point import OperatingPoint
from ...runtime.engine import Engine
from ...runtime.errors import ArtifactError, FpabeeError, InputError
from ...runtime.files import ReadOptions, Row, read_rows
from ...runtime.optional_packages import require
from ...runtime.progress import Progress, silent
from ...runtime.rules.measures import Measure
from ...runtime.rules.rules import ExitRule
from ..add_targets import AddTargetsOptions, add_target
from ..staging import check_output, publish, resolved, staging
from ..targets.options import RTX
from .keep import check_exits, keep_exits


@dataclass(frozen=True)
class DropExitsOptions:
    """Which exits are kept, and how.

    Attributes:
        exits: those to keep, counted from 1, ascending.
        target: whose points are calibrated again; None: the manifest's default.
        data: labelled rows (any format of `read_rows`); None: those that calibrated the points.
        reading: how that file is read.
        force: replace an engines folder that is there.
        threads: CPU threads.
        targets: how plans are built again.
    """

    exits: tuple[int, ...]
    target: str | None = None
    data: Path | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    force: bool = False
    threads: int | None = None
    targets: AddTargetsOptions = field(default_factory=AddTargetsOptions)


@dataclass(frozen=True)
class RecalibratedPoint:
    """An operating point before and after.

    Attributes:
        before: with all exits.
        after: with those kept, on the same rows.
    """

    before: OperatingPoint
    after: OperatingPoint


@dataclass(frozen=True)
class LostPoint:
    """An operating point that does not hold for the new exits.

    Attributes:
        target: of the old folder.
        point: its name there.
        reason: why it could not be made again.
        command: what makes it again.
    """

    target: str
    point: str
    reason: str
    command: str


@dataclass(frozen=True)
class DropExitsResult:
    """What was made.

    Attributes:
        folder: the new engines folder.
        manifest: its manifest.
        exits: the old numbers of the exits that were kept.
        agreement: how closely the new chain agrees with the PyTorch model.
        points: the operating points that were calibrated again, by name.
        lost: those that were not.
        built: targets that were built again.
        not_built: targets that could not be, and how to.
        target: the target whose points were calibrated again.
        default_before: its point that ran when none was named; empty: none did.
    """

    folder: Path
    manifest: Manifest
    exits: tuple[int, ...]
    agreement: Agreement
    points: dict[str, RecalibratedPoint]
    lost: tuple[LostPoint, ...]
    built: tuple[str, ...]
    not_built: dict[str, NotBuilt]
    target: str
    default_before: str

    @property
    def default(self) -> str | None:
        """The target's point that runs now when none is named; None: the target is not built."""
        target = self.manifest.targets.get(self.target)
        return None if target is None else target.default_operating_point


def drop_exits(
    source: str | Path,
    output: str | Path,
    options: DropExitsOptions,
    progress: Progress = silent,
) -> DropExitsResult:
    """Write an engines folder with fewer exits, and calibrate its operating points again.

    Args:
        source: the engines folder to start from; it stays as it is.
        output: the folder to write.
        options: see `DropExitsOptions`.
        progress: called with (what, done, total).

    Raises:
        ModelError: exits that the model does not have.
        InputError: the rows that are given cannot be read, or lack labels.
        ArtifactError: a folder is damaged, exists, or cannot be written.
        VerificationError: the new chain does not reproduce the PyTorch model.
        BackendError: the target cannot run here.
    """
    require("merge")
    old, new = Path(source), resolved(output)
    manifest = read_manifest(old)
    if new.is_relative_to(old.resolve()):
        raise ArtifactError(f"{old} cannot be written over itself", "give another folder with -o")
    check_output(new, options.force)
    check_exits(options.exits, len(manifest.segments))
    # First of all: rows that cannot be used must not be found out when the folder is written.
    given = _given(options)
    with Engine.load(old, options.target, threads=options.threads) as engine:
        if given is not None:
            _check_labels(engine, given)
        progress("merge", 0, len(options.exits))
        with staging(new) as folder:
            kept, agreement = keep_exits(old, manifest, options.exits, folder)
            publish(folder, new)
        kept, built = _rebuild(new, manifest, kept, options.targets, progress)
        points, lost = _calibrate(engine, old, new, options, given, progress)
    return DropExitsResult(
        folder=Path(output),
        manifest=read_manifest(new),
        exits=options.exits,
        agreement=agreement,
        points=points,
        lost=tuple(lost),
        built=tuple(built),
        not_built=kept.not_built,
        target=engine.target,
        default_before=manifest.targets[engine.target].default_operating_point,
    )


def _given(options: DropExitsOptions) -> list[Row] | None:
    if options.data is None:
        return None
    return list(read_rows(options.data, options.reading))


def _check_labels(engine: Engine, rows: Sequence[Row]) -> None:
    points = engine.manifest.targets[engine.target].operating_points.values()
    if any(point.metric != AGREEMENT for point in points):
        expected_labels(rows, engine.manifest.task)


def _rows(engine: Engine, folder: Path, point: OperatingPoint) -> list[Row] | None:
    """The rows that calibrated a point, if they are still there."""
    place = folder / "calibration"
    return stored_rows(place, engine.manifest, engine.target, point.data_sha256)


def _is_unlabelled(point: OperatingPoint, rows: Sequence[Row]) -> bool:
    return point.metric == AGREEMENT and any(row.labels is None for row in rows)


def _batch(point: OperatingPoint) -> int:
    """The batch size that the point was chosen for."""
    return max((int(size) for size in point.measured_speedup), default=1)


def _rebuild(
    folder: Path, old: Manifest, manifest: Manifest, options: AddTargetsOptions, progress: Progress
) -> tuple[Manifest, list[str]]:
    """Build again what the old folder had built, as far as this machine can."""
    built = []
    for target in old.targets.values():
        if not target.files:
            continue
        plans = options.plans
        if target.backend == RTX:
            capabilities = target.compute_capabilities
            plans = dataclasses.replace(plans, compute_capabilities=capabilities)
        changed = dataclasses.replace(options, plans=plans)
        manifest, name = add_target(
            folder, manifest, target.backend, target.precision, changed, progress
        )
        if name is not None:
            built.append(name)
    return manifest, built


def _calibrate(
    engine: Engine,
    old: Path,
    new: Path,
    options: DropExitsOptions,
    given: list[Row] | None,
    progress: Progress,
) -> tuple[dict[str, RecalibratedPoint], list[LostPoint]]:
    """Make the target's operating points again; name those of other targets."""
    points: dict[str, RecalibratedPoint] = {}
    lost: list[LostPoint] = []
    for name, target in engine.manifest.targets.items():
        command = f"fpabee-calibrate {new} --data DATA --target {shlex.quote(name)}"
        if name != engine.target:
            reason = "it was measured on another target"
            lost += [LostPoint(name, point, reason, command) for point in target.operating_points]
            continue
        if name not in read_manifest(new).targets:
            reason = "the target is not built here"
            lost += [LostPoint(name, point, reason, command) for point in target.operating_points]
            continue
        for group in _groups(target.operating_points, target.default_operating_point):
            try:
                points |= _calibrate_group(engine, old, new, group, options, given, progress)
            except FpabeeError as error:
                lost += [LostPoint(name, point, error.message, command) for point in group]
    return points, lost


def _groups(points: dict[str, OperatingPoint], default: str) -> Iterator[dict[str, OperatingPoint]]:
    """Points that one calibration can make; the one with the default comes last, to stay it.

    A bound is made alone, and so is a wish for speed: what cannot be granted takes no other along.
    """
    groups: dict[tuple[str, ...], dict[str, OperatingPoint]] = {}
    for name, point in points.items():
        alone = name if point.goal is None or point.goal.speedup is not None else ""
        key = (point.metric, point.data_sha256, str(_batch(point)), alone)
        groups.setdefault(key, {})[name] = point
    yield from sorted(groups.values(), key=lambda group: default in group)


def _calibrate_group(
    engine: Engine,
    old: Path,
    new: Path,
    group: dict[str, OperatingPoint],
    options: DropExitsOptions,
    given: list[Row] | None,
    progress: Progress,
) -> dict[str, RecalibratedPoint]:
    first = next(iter(group.values()))
    rows = _rows(engine, old, first) if given is None else given
    if rows is None:
        raise InputError(
            f"its rows are not in {old / 'calibration'}", "give them with --calibration-data"
        )
    target = engine.manifest.targets[engine.target]
    rules = [ExitRule.from_dict(point.rule) for point in group.values()]
    measures = [getattr(rule, "measure", None) for rule in rules]
    default = target.default_operating_point
    wished = CalibrationOptions(
        goals={name: point.goal for name, point in group.items() if point.goal is not None},
        bound=_bound(first),
        name=next(iter(group)),
        default=default if default in group else next(iter(group)),
        metric=first.metric,
        rules=tuple(dict.fromkeys(rule.name for rule in rules)),
        measures=tuple(dict.fromkeys(m for m in measures if m is not None)) or tuple(Measure),
        target=engine.target,
        unlabelled=_is_unlabelled(first, rows),
        batch_size=_batch(first),
        threads=options.threads,
    )
    calibrate(new, rows, wished, progress)
    made = read_manifest(new).targets[engine.target].operating_points
    return {name: RecalibratedPoint(point, made[name]) for name, point in group.items()}


def _bound(point: OperatingPoint) -> Bound | None:
    if point.goal is not None or point.certificate is None:
        return None
    risk, confidence = point.certificate.risk / 100, point.certificate.confidence / 100
    return Bound(risk, confidence, RiskOf(point.certificate.risk_of))
