"""Add precisions and built targets to an engines folder that is there. Torch-free.

The folder stays usable at any moment: new files come first, the manifest last.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..runtime.artifact.folder import read_manifest, sha256_of, write_manifest
from ..runtime.artifact.manifest import BuiltFile, Manifest, NotBuilt, Target
from ..runtime.backends.tensorrt import build_command
from ..runtime.encoding import Text
from ..runtime.errors import ArtifactError, FpabeeError, InputError, MissingExtraError
from ..runtime.files import Inputs, ReadOptions, read_rows
from ..runtime.optional_packages import require
from ..runtime.progress import Progress, silent
from ..runtime.rules.rules import ExitRule
from .precision.formats import INT8, Half
from .targets.check import can_run, check_target
from .targets.options import RTX, TENSORRT, TURING, PlanOptions
from .targets.tensorrt import build_target, unavailable_reason

if TYPE_CHECKING:
    from .precision.float16 import PrecisionReport

BACKENDS = (RTX, TENSORRT)


@dataclass(frozen=True)
class AddTargetsOptions:
    """What to add to an engines folder.

    Attributes:
        precisions: half precisions to write graphs in.
        int8: whether int8 is asked for.
        int8_data: texts (any format of `read_rows`) for int8 ranges; None: the graphs are there.
        backends: targets that must be built; None: those that can be built here, for each
            precision asked for.
        keep_fp32: `auto`, or nodes that stay in fp32, see `half.add_half`.
        verify_data: texts to check half precision with (any format of `read_rows`).
        reading: how those two files are read.
        plans: how TensorRT plans are built.
        jobs: builds at a time.
        resume: keep plans that are already built.
    """

    precisions: tuple[Half, ...] = ()
    int8: bool = False
    int8_data: Path | None = None
    backends: tuple[str, ...] | None = None
    keep_fp32: tuple[str, ...] = ()
    verify_data: Path | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    plans: PlanOptions = field(default_factory=PlanOptions)
    jobs: int = 1
    resume: bool = False


@dataclass(frozen=True)
class AddTargetsResult:
    """What was added.

    Attributes:
        manifest: the folder's manifest now.
        checks: what half precision does to the model, for each precision that was written.
        built: names of the targets that were built.
        not_built: targets that were left, and how to build them; also in the manifest.
        lost_points: operating points by target that were measured on other graphs or plans than
            those of now, and are gone.
    """

    manifest: Manifest
    checks: tuple[PrecisionReport, ...]
    built: tuple[str, ...]
    not_built: dict[str, NotBuilt]
    lost_points: dict[str, tuple[str, ...]]


def add_targets(
    folder: str | Path,
    options: AddTargetsOptions,
    progress: Progress = silent,
) -> AddTargetsResult:
    """Add precisions and targets to an engines folder.

    Args:
        folder: the engines folder.
        options: see `AddTargetsOptions`.
        progress: called with (what, done, total).

    Raises:
        ArtifactError: no engines folder, damaged, or one that cannot be written.
        VerificationError: the model does not survive a precision, or a plan is not in it.
        BackendError: a backend that was asked for cannot build here, or failed.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    check_options(options)
    try:
        return _extend(path, manifest, options, progress)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {error.filename or path}: {error.strerror}",
            "check the folder's permissions and free space",
        ) from error


def check_options(options: AddTargetsOptions) -> None:
    """Refuse what cannot be added here, before anything that takes long.

    Raises:
        BackendError: a backend that was asked for cannot build here.
        InputError: a file of texts is not there, or of no known format.
    """
    for backend in options.backends or ():
        error = unavailable_reason(backend)
        if error:
            raise error
    for data in (options.int8_data, options.verify_data):
        if data is not None:
            Inputs([data], options.reading)


def _extend(
    path: Path, manifest: Manifest, options: AddTargetsOptions, progress: Progress
) -> AddTargetsResult:
    asked = tuple(half.value for half in options.precisions)
    asked += (INT8,) if options.int8 else ()
    precisions = asked or tuple(manifest.precisions) or ("fp32",)
    backends = BACKENDS if options.backends is None else options.backends
    for backend in backends:
        if unavailable_reason(backend) is None:
            for precision in precisions:
                # Refuses plans that cannot be, before anything is written.
                options.plans.fitted(manifest, backend, precision)
    texts = _texts(options.verify_data, options) if options.verify_data else []
    rule = ExitRule.from_dict(manifest.default_rule)
    checks, before = [], manifest
    for half in options.precisions:
        is_there = half.value in manifest.precisions
        if is_there and not options.keep_fp32 and not options.verify_data:
            continue
        require("half")
        from .precision.float16 import add_half

        turing = half is Half.FP16 and TURING in options.plans.compute_capabilities
        manifest, report = add_half(
            path, manifest, half, rule, options.keep_fp32, texts, progress, turing=turing
        )
        manifest = _with_onnxruntime(_without_stale(manifest, half.value), half)
        write_manifest(path, manifest)
        checks.append(report)
    if options.int8_data is not None:
        require("half")
        from .precision.int8 import add_int8

        texts = _texts(options.int8_data, options)
        manifest, report = add_int8(path, manifest, rule, texts, progress)
        manifest = _without_stale(manifest, INT8)
        write_manifest(path, manifest)
        checks.append(report)
    elif options.int8 and INT8 not in manifest.precisions:
        raise InputError(
            f"{path} has no int8 graphs, whose ranges come from texts",
            "give texts like those to classify: --int8 --calibration-data FILE",
        )
    built: list[str] = []
    not_built: dict[str, NotBuilt] = {}
    for backend in backends:
        for precision in precisions:
            manifest, name = add_target(path, manifest, backend, precision, options, progress)
            if name is None:
                label = _label(backend, precision)
                not_built[label] = manifest.not_built[label]
            else:
                built.append(name)
    lost = _lost_points(before, manifest)
    return AddTargetsResult(manifest, tuple(checks), tuple(built), not_built, lost)


def _texts(data: Path, options: AddTargetsOptions) -> list[Text]:
    return [row.content for row in read_rows(data, options.reading)]


def add_target(
    path: Path,
    manifest: Manifest,
    backend: str,
    precision: str,
    options: AddTargetsOptions,
    progress: Progress,
) -> tuple[Manifest, str | None]:
    """Build a target, verify it where it can run, and write it into the manifest.

    Returns:
        The manifest, and the target's name; None if this machine cannot build it, which the
        manifest then notes.

    Raises:
        BackendError: the build failed.
        VerificationError: the plan does not reproduce the model.
    """
    label, error = _label(backend, precision), unavailable_reason(backend)
    if error:
        noted = _noting(manifest, {label: _not_built(backend, precision, error)})
        write_manifest(path, noted)
        return noted, None
    plans, jobs, resume = options.plans, options.jobs, options.resume
    try:
        built, name = build_target(
            path, manifest, backend, precision, plans, jobs, resume, progress
        )
    except FpabeeError as failure:
        how = " --resume" if failure.hint.endswith(" --resume") else ""
        left = {label: _not_built(backend, precision, failure, how)}
        write_manifest(path, _noting(_without_changed(path, manifest), left))
        raise
    built = _keeping_points(manifest, _noting(built, {}, built=label), name)
    write_manifest(path, built)
    if can_run(built.targets[name]):
        progress(f"verify {name}", 0, 1)
        built = _verified(path, manifest, built, name)
    return built, name


def drop_graphs(folder: Path) -> None:
    """Delete the portable source of the targets, on devices that are short of space.

    Raises:
        ArtifactError: a target runs the ONNX graphs themselves.
    """
    manifest = read_manifest(folder)
    users = [name for name, target in manifest.targets.items() if not target.files]
    built = [name for name, target in manifest.targets.items() if target.files]
    if not built:
        raise ArtifactError(
            f"{folder} has no built target: {', '.join(users)} run the ONNX graphs themselves",
            "build one first: fpabee-export --from ENGINES --backend tensorrt",
        )
    targets = {name: manifest.targets[name] for name in built}
    default = manifest.default_target if manifest.default_target in built else built[0]
    write_manifest(
        folder, msgspec.structs.replace(manifest, targets=targets, default_target=default)
    )
    shutil.rmtree(folder / "onnx")


def _with_onnxruntime(manifest: Manifest, half: Half) -> Manifest:
    """ONNX Runtime runs half precision as it is, on a CUDA device."""
    if half is not Half.FP16:
        return manifest
    target = Target(backend="onnxruntime", precision=half.value, device="cuda", tolerance=None)
    targets = {**manifest.targets, f"onnxruntime-{half.value}-cuda": target}
    return msgspec.structs.replace(manifest, targets=targets)


def _without_stale(manifest: Manifest, precision: str) -> Manifest:
    """Without the targets that were built from other graphs than those of now."""
    graphs = manifest.graphs_in(precision)
    return _only(
        manifest,
        lambda target: (
            target.precision != precision
            or all(file.onnx_sha256 == graphs[g].sha256 for g, file in target.files.items())
        ),
    )


def _without_changed(path: Path, manifest: Manifest) -> Manifest:
    """Without the targets whose files a build that failed has written over."""

    def is_whole(file: BuiltFile) -> bool:
        return (path / file.file).is_file() and sha256_of(path / file.file) == file.sha256

    return _only(manifest, lambda target: all(map(is_whole, target.files.values())))


def _only(manifest: Manifest, keep: Callable[[Target], bool]) -> Manifest:
    """The manifest with some of its targets; as it is if none would be left."""
    targets = {name: target for name, target in manifest.targets.items() if keep(target)}
    if not targets:
        return manifest
    default = manifest.default_target if manifest.default_target in targets else next(iter(targets))
    return msgspec.structs.replace(manifest, targets=targets, default_target=default)


def _verified(path: Path, before: Manifest, manifest: Manifest, name: str) -> Manifest:
    """The manifest with the target's measured tolerance; a target that fails is taken out."""
    try:
        checked = check_target(path, manifest, name)
    except FpabeeError:
        write_manifest(path, before)
        raise
    write_manifest(path, checked)
    return checked


def _keeping_points(before: Manifest, built: Manifest, name: str) -> Manifest:
    """The manifest with a target's operating points, if its plans are those that were there."""
    old, new = before.targets.get(name), built.targets[name]
    if old is None or old.files != new.files:
        return built
    kept = msgspec.structs.replace(
        new,
        operating_points=old.operating_points,
        default_operating_point=old.default_operating_point,
    )
    return msgspec.structs.replace(built, targets={**built.targets, name: kept})


def _lost_points(before: Manifest, after: Manifest) -> dict[str, tuple[str, ...]]:
    """Operating points by target that were there before and are not now."""
    lost = {}
    for name, target in before.targets.items():
        now = after.targets[name].operating_points if name in after.targets else {}
        gone = tuple(point for point in target.operating_points if point not in now)
        if gone:
            lost[name] = gone
    return lost


def _label(backend: str, precision: str) -> str:
    """What the manifest calls a target that is not built."""
    return f"{backend}-{precision}"


def _not_built(backend: str, precision: str, error: FpabeeError, how: str = "") -> NotBuilt:
    command = build_command(backend, precision) + how
    if isinstance(error, MissingExtraError) and backend == RTX:
        command = f"{error.hint} && {command}"
    return NotBuilt(backend=backend, precision=precision, reason=error.message, command=command)


def _noting(manifest: Manifest, left: Mapping[str, NotBuilt], built: str = "") -> Manifest:
    """The manifest with targets noted as not built, and one that is built now no longer."""
    notes = {**manifest.not_built, **left}
    notes.pop(built, None)
    return msgspec.structs.replace(manifest, not_built=notes)
