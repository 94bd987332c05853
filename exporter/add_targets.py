"""Add precisions and built targets to an existing engines folder. Needs no torch.

The folder stays usable at every moment: new files are written first, the manifest last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path

import msgspec

from ..runtime.agreement import Agreement
from ..runtime.artifact.folder import read_manifest, write_manifest
from ..runtime.artifact.manifest import (
    Manifest,
    Target,
    keep_targets,
    with_operating_points,
    with_target,
)
from ..runtime.cpu import multiplies_int8
from ..runtime.encoding import Text
from ..runtime.errors import (
    ArtifactError,
    BackendError,
    FpabeeError,
    InputError,
    VerificationError,
)
from ..runtime.files import Inputs, ReadOptions, read_rows
from ..runtime.optional_packages import require
from ..runtime.progress import Progress, silent
from ..runtime.targets import target_of
from .precision.formats import FP16, INT8
from .targets import cpu
from .targets.cpu import CpuTarget
from .targets.options import RTX, TENSORRT, PlanOptions
from .targets.tensorrt import build_target, can_run, target_name, unavailable_reason

PLAN_BACKENDS = (RTX, TENSORRT)
BACKENDS = (*PLAN_BACKENDS, *cpu.BACKENDS)


@dataclass(frozen=True)
class AddTargetsOptions:
    """What to add to an engines folder.

    Attributes:
        fp16: whether to add fp16.
        int8: whether to add int8.
        calibration_data: texts that give the int8 ranges, in any format of `read_rows`; None: the
            folder has int8 graphs already.
        backends: backends whose targets must be built; None: those that this machine can build.
        default_target: the target to make the default; None: the fastest target for CPUs, if
            targets for CPUs are added.
        verify_data: texts to check fp16 and targets of OpenVINO with, in any format of
            `read_rows`.
        reading: how these two files are read.
        plans: how TensorRT plans are built.
    """

    fp16: bool = False
    int8: bool = False
    calibration_data: Path | None = None
    backends: tuple[str, ...] | None = None
    default_target: str | None = None
    verify_data: Path | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    plans: PlanOptions = field(default_factory=PlanOptions)


@dataclass(frozen=True)
class AddTargetsResult:
    """What was added.

    Attributes:
        manifest: the folder's new manifest.
        checks: for each precision that was written, how closely it agrees with fp32.
        built: names of the targets that were built.
        cpu: what the checks of new targets for CPUs found.
        default: one line that says which target is the default, and why; empty: as before.
        not_built: targets that this machine cannot build, and why.
        lost_points: names of operating points, by target, that were removed because their graphs
            or plans have changed.
    """

    manifest: Manifest
    checks: dict[str, Agreement]
    built: tuple[str, ...]
    cpu: tuple[CpuTarget, ...]
    default: str
    not_built: dict[str, FpabeeError]
    lost_points: dict[str, tuple[str, ...]]


def add_targets(
    folder: str | Path, options: AddTargetsOptions, progress: Progress = silent
) -> AddTargetsResult:
    """Add precisions and targets to an engines folder.

    Plans are built for each precision asked for; if none is, for each that the folder has.

    Args:
        folder: the engines folder.
        options: what to add.
        progress: called with (what, done, total).

    Raises:
        ArtifactError: the folder is missing or damaged, or cannot be written.
        InputError: texts cannot be read, or int8 has no texts.
        VerificationError: a precision overflows or changes too many labels or exits.
        BackendError: a backend that was asked for cannot build here, or a build failed.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    check_options(options)
    try:
        with tempfile.TemporaryFile(dir=path):  # before any slow step: it must be writable
            pass
        return _add_targets(path, manifest, options, progress)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {error.filename or path}: {error.strerror}",
            "check the folder's permissions and free space",
        ) from error


def check_options(options: AddTargetsOptions) -> None:
    """Refuse what cannot be added on this machine, before any slow step begins.

    Raises:
        BackendError: a backend that was asked for cannot build here, or this CPU cannot run int8.
        MissingExtraError: what int8 needs is not installed.
        InputError: a file of texts does not exist or is a pipe, its format is unknown, or int8
            needs more texts.
    """
    for backend in options.backends or ():
        is_cpu = backend in cpu.BACKENDS
        error = cpu.unavailable_reason(backend) if is_cpu else unavailable_reason(backend)
        if error:
            raise error
    for data in (options.calibration_data, options.verify_data):
        if data is not None:
            Inputs([data], options.reading)
            if not data.is_file():
                raise InputError(
                    f"{data} can be read only once, but these texts are read several times",
                    "store them in a file, and give that",
                )
    for_plans, for_cpus = _int8_forms(options)
    if for_cpus and not multiplies_int8():
        raise BackendError(
            "int8 for CPUs needs VNNI instructions, and this CPU has none",
            "add int8 on the machine that will run it",
        )
    if options.calibration_data is not None and (for_plans or for_cpus):
        require("quantize" if for_cpus else "half")
        from .precision.int8 import split_texts

        split_texts(_texts(options.calibration_data, options))


def _add_targets(
    path: Path, before: Manifest, options: AddTargetsOptions, progress: Progress
) -> AddTargetsResult:
    for_plans, for_cpus = _int8_forms(options)
    asked = [FP16] * options.fp16 + [INT8] * for_plans
    backends = BACKENDS if options.backends is None else options.backends
    targets = [
        (backend, precision)
        for backend in backends
        if backend in PLAN_BACKENDS
        for precision in asked or (() if for_cpus else tuple(before.precisions) or ("fp32",))
    ]
    for backend in {backend for backend, _ in targets}:
        if unavailable_reason(backend) is None:
            # Plans that cannot be built are refused before anything is written.
            options.plans.fitted(before, backend)
    manifest, checks = _add_precisions(path, before, options, for_plans, progress)
    built: list[str] = []
    not_built: dict[str, FpabeeError] = {}
    for backend, precision in targets:
        unavailable = unavailable_reason(backend)
        if unavailable:
            not_built[f"{backend}-{precision}"] = unavailable
            continue
        manifest, name = _add_target(path, manifest, backend, precision, options, progress)
        built.append(name)
    checked: list[CpuTarget] = []
    if cpu.OPENVINO in backends:
        manifest, checked = cpu.add_openvino(
            path, manifest, _texts(options.verify_data, options), progress
        )
        write_manifest(path, manifest)
    if for_cpus and options.calibration_data is not None:
        from .targets.cpu_int8 import add_cpu_int8, drop_unused_graphs

        # Older targets run the graphs that are replaced, so they are checked again, too.
        versions = {
            name: version
            for name in cpu.BACKENDS
            if ((version := cpu.version_of(name)) and name in backends)
            or any(t.backend == name and cpu.is_cpu_int8(t) for t in manifest.targets.values())
        }
        texts = _texts(options.calibration_data, options)
        manifest, int8 = add_cpu_int8(path, manifest, versions, texts, progress)
        write_manifest(path, manifest)
        drop_unused_graphs(path, manifest)
        checked += int8
    manifest, default = _with_default(path, manifest, checked, options, progress)
    write_manifest(path, manifest)
    lost = _lost_points(before, manifest)
    return AddTargetsResult(
        manifest, checks, tuple(built), tuple(checked), default, not_built, lost
    )


def _with_default(
    path: Path,
    manifest: Manifest,
    checked: Sequence[CpuTarget],
    options: AddTargetsOptions,
    progress: Progress,
) -> tuple[Manifest, str]:
    """The manifest with its default target, and what there is to say about it."""
    name = options.default_target
    reason = {target.name: target.refused for target in checked}.get(name or "")
    if reason and name not in manifest.targets:
        raise VerificationError(f"{name} is not kept: {reason.message}", reason.hint)
    if name is not None:
        fixed = target_of(path, manifest, name)
        manifest = msgspec.structs.replace(manifest, default_target=fixed, default_is_fixed=True)
    if name is None and not checked:
        return manifest, ""
    return cpu.with_fastest_default(path, manifest, progress)


def _add_precisions(
    path: Path,
    manifest: Manifest,
    options: AddTargetsOptions,
    int8_for_plans: bool,
    progress: Progress,
) -> tuple[Manifest, dict[str, Agreement]]:
    """Write the graphs in the precisions that are asked for."""
    texts = _texts(options.verify_data, options)
    checks: dict[str, Agreement] = {}
    if options.fp16 and (FP16 not in manifest.precisions or texts):
        require("half")
        from .precision.float16 import add_fp16

        manifest, checks[FP16] = add_fp16(path, manifest, texts, progress)
        manifest = _without_stale(manifest, FP16)
        # ONNX Runtime runs these graphs directly, on a CUDA device.
        target = Target(backend="onnxruntime", precision=FP16, device="cuda", tolerance=None)
        manifest = with_target(manifest, "onnxruntime-fp16-cuda", target)
        write_manifest(path, manifest)
    if options.calibration_data is not None and int8_for_plans:
        require("half")
        from .precision.int8 import add_int8

        texts = _texts(options.calibration_data, options)
        manifest, checks[INT8] = add_int8(path, manifest, texts, progress)
        manifest = _without_stale(manifest, INT8)
        write_manifest(path, manifest)
    built = {target.backend for target in manifest.targets.values() if cpu.is_cpu_int8(target)}
    missing = set(options.backends or ()) & set(cpu.BACKENDS) - built
    has_int8 = INT8 in manifest.precisions if int8_for_plans else built
    if options.calibration_data is None and options.int8 and (missing or not has_int8):
        raise InputError(
            f"{path} lacks int8 targets that were asked for, and no texts are given for the ranges",
            "give texts like those to classify as `calibration_data`",
        )
    return manifest, checks


def _int8_forms(options: AddTargetsOptions) -> tuple[bool, bool]:
    """Whether int8 is built for plans, and whether for CPUs; the two need other graphs."""
    if not options.int8:
        return False, False
    if options.backends is None:
        # Graphs in fp16 are for GPUs, also for those of other machines.
        for_plans = options.fp16 or any(
            unavailable_reason(backend) is None for backend in PLAN_BACKENDS
        )
        can_quantize = util.find_spec("nncf") is not None and multiplies_int8()
        return for_plans, not for_plans or can_quantize
    for_cpus = bool(set(options.backends) & set(cpu.BACKENDS))
    return not for_cpus or bool(set(options.backends) & set(PLAN_BACKENDS)), for_cpus


def _texts(data: Path | None, options: AddTargetsOptions) -> list[Text]:
    return [] if data is None else [row.content for row in read_rows(data, options.reading)]


def _add_target(
    path: Path,
    manifest: Manifest,
    backend: str,
    precision: str,
    options: AddTargetsOptions,
    progress: Progress,
) -> tuple[Manifest, str]:
    """Build a target, verify it if it can run here, and write it into the manifest.

    Args:
        path: the engines folder.
        manifest: its manifest.
        backend: `tensorrt-rtx` or `tensorrt`.
        precision: of the graphs to build.
        options: how to build.
        progress: called with (what, done, total).

    Returns:
        The new manifest, and the target's name.

    Raises:
        BackendError: the build failed.
        VerificationError: the plan does not reproduce the model.
    """
    name = target_name(backend, precision)
    # A build that fails or is killed may have replaced some of the files of an earlier one.
    write_manifest(path, keep_targets(manifest, lambda other, _: other != name))
    built, _ = build_target(path, manifest, backend, precision, options.plans, progress)
    old, new = manifest.targets.get(name), built.targets[name]
    if old is not None and old.files == new.files:
        new = with_operating_points(new, old.operating_points, old.default_operating_point)
    built = with_target(built, name, new)
    if can_run(new):
        progress(f"verify {name}", 0, 1)
        built, checked = cpu.verified_target(path, built, name, new)
        if error := checked.refused:
            hint = "it was removed from the manifest; build it from fp32 graphs, or report this"
            raise type(error)(error.message, hint) from error
    write_manifest(path, built)
    return built, name


def _without_stale(manifest: Manifest, precision: str) -> Manifest:
    """The manifest without those targets of a precision whose graphs have changed since."""
    graphs = manifest.graphs_in(precision)
    return keep_targets(
        manifest,
        lambda _, target: (
            target.precision != precision
            or target.backend not in PLAN_BACKENDS
            or all(file.onnx_sha256 == graphs[g].sha256 for g, file in target.files.items())
        ),
    )


def _lost_points(before: Manifest, after: Manifest) -> dict[str, tuple[str, ...]]:
    """Operating points, by target, that have disappeared."""
    lost = {}
    for name, target in before.targets.items():
        now = after.targets[name].operating_points if name in after.targets else {}
        gone = tuple(point for point in target.operating_points if point not in now)
        if gone:
            lost[name] = gone
    return lost
