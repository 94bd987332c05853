"""Add precisions and built targets to an existing engines folder. Needs no torch.

The folder stays usable at every moment: new files are written first, the manifest last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

import msgspec

from ..runtime.artifact.folder import read_manifest, write_manifest
from ..runtime.artifact.manifest import Manifest, Target, keep_targets, with_target
from ..runtime.encoding import Text
from ..runtime.errors import (
    ArtifactError,
    BackendError,
    VerificationError,
)
from ..runtime.machine import multiplies_int8, require
from ..runtime.progress import Progress, silent
from ..runtime.targets import target_of, why_not
from .targets import cpu
from .targets.backends import (
    CPU_BACKENDS,
    FP16,
    INT8,
    OPENVINO,
    PLAN_BACKENDS,
    unavailable_reason,
)
from .targets.check import Checked, check_target, with_old_points
from .targets.plans import PlanOptions
from .targets.tensorrt import build_target, target_name


@dataclass(frozen=True)
class AddTargetsOptions:
    """What to add to an engines folder.

    Attributes:
        fp16: whether to add fp16.
        int8: whether to add int8.
        calibration_data: texts like those to classify, which give the int8 ranges. Without any, the
            int8 graphs that the folder has are built.
        backends: backends whose targets must be built; None: those that this machine can build.
        default_target: the target to make the default; if nothing else is asked for, no other
            target is built. None: a fast target for CPUs, if targets for CPUs are added.
        verify_data: texts to check fp16 and targets of OpenVINO with.
        plans: how TensorRT plans are built.
    """

    fp16: bool = False
    int8: bool = False
    calibration_data: Sequence[Text] = ()
    backends: tuple[str, ...] | None = None
    default_target: str | None = None
    verify_data: Sequence[Text] = ()
    plans: PlanOptions = field(default_factory=PlanOptions)


@dataclass
class AddTargetsResult:
    """What was added.

    Attributes:
        manifest: the folder's new manifest.
        checked: every precision and target that was added, or why it was not.
        default: one line that says which target is the default, and why; empty: as before.
        lost_points: names of operating points, by target, that were removed because their graphs
            or plans have changed.
    """

    manifest: Manifest
    checked: list[Checked] = field(default_factory=list)
    default: str = ""
    lost_points: dict[str, tuple[str, ...]] = field(default_factory=dict)


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
        InputError: int8 has too few texts.
        VerificationError: a precision overflows or changes too many labels or exits.
        BackendError: a backend that was asked for cannot build here, or a build failed.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    check_options(options)
    try:
        with tempfile.TemporaryFile(dir=path):  # before any slow step: it must be writable
            pass
        return _Addition(path, manifest, options, progress).run()
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
        InputError: int8 needs more texts.
    """
    for backend in options.backends or ():
        if error := unavailable_reason(backend):
            raise error
    for_plans, for_cpus = _int8_forms(options)
    if for_cpus and not multiplies_int8():
        raise BackendError(
            "int8 for CPUs needs VNNI instructions, and this CPU has none",
            "add int8 on the machine that will run it",
        )
    if options.calibration_data and (for_plans or for_cpus):
        require("quantize" if for_cpus else "graphs")
        from .targets.int8 import split_texts

        split_texts(options.calibration_data)


class _Addition:
    """The work on one folder. After each step, the manifest is written.

    Args:
        path: the engines folder.
        manifest: its manifest.
        options: what to add.
        progress: called with (what, done, total).
    """

    def __init__(
        self, path: Path, manifest: Manifest, options: AddTargetsOptions, progress: Progress
    ) -> None:
        self.path = path
        self.before = self.manifest = manifest
        self.options = options
        self.progress = progress
        self.for_plans, self.for_cpus = _int8_forms(options)
        every = (*PLAN_BACKENDS, *CPU_BACKENDS)
        self.backends = every if options.backends is None else options.backends
        self.added = AddTargetsResult(manifest)

    def run(self) -> AddTargetsResult:
        """Add everything, and choose the default target."""
        options = self.options
        if options.fp16 and (FP16 not in self.manifest.precisions or options.verify_data):
            self._add_fp16()
        texts, graphs = options.calibration_data, self.manifest.precisions.get(INT8)
        if self.for_plans and (texts or not graphs):
            try:
                self._add_int8_for_plans()
            except VerificationError as refused:
                if options.backends is not None:
                    raise
                # What else this machine can run is built all the same.
                self.for_plans = False
                self.added.checked.append(Checked(INT8, refused=refused))
        for backend, precision in self._plans():
            self._add_plans(backend, precision)
        wanted = [name for name in cpu.OPENVINO_TARGETS if self._is_wanted(name)]
        if OPENVINO in self.backends and wanted:
            where = self.path, self.manifest
            self._write(*cpu.add_openvino(*where, options.verify_data, self.progress, wanted))
        if self.for_cpus and (texts or options.backends is not None or not graphs):
            self._add_int8_for_cpus()
        self.added.default = self._choose_default()
        self.added.manifest = self.manifest
        for name, target in self.before.targets.items():
            now = self.manifest.targets.get(name)
            points = target.operating_points.keys() - (now.operating_points if now else {})
            if points:
                self.added.lost_points[name] = tuple(sorted(points))
        return self.added

    def _write(self, manifest: Manifest, checked: Sequence[Checked] = ()) -> None:
        write_manifest(self.path, manifest)
        self.manifest = manifest
        self.added.checked += checked

    def _is_wanted(self, name: str) -> bool:
        """Whether to build a target; if only a default target is asked for, no other one."""
        options = self.options
        if options.default_target is None or options.backends is not None:
            return True
        is_asked = name == options.default_target and name not in self.before.targets
        return options.fp16 or options.int8 or is_asked

    def _plans(self) -> list[tuple[str, str]]:
        """The backends and precisions to build plans for."""
        asked = [FP16] * self.options.fp16 + [INT8] * self.for_plans
        if not asked and not self.for_cpus:
            asked = [*self.manifest.precisions] or ["fp32"]
        pairs = [(backend, precision) for backend in self.backends for precision in asked]
        return [
            pair
            for pair in pairs
            if pair[0] in PLAN_BACKENDS and self._is_wanted(target_name(*pair))
        ]

    def _add_fp16(self) -> None:
        require("graphs")
        from .onnx_file import load_graphs

        protos = load_graphs(self.path, self.manifest.graphs)
        manifest = self._lowered(FP16, protos, self.options.verify_data)
        # ONNX Runtime runs these graphs directly, on a CUDA device.
        target = Target(backend="onnxruntime", precision=FP16, device="cuda", tolerance=None)
        self._write(with_target(manifest, "onnxruntime-fp16-cuda", target))

    def _add_int8_for_plans(self) -> None:
        from .targets.int8 import quantize, split_texts

        ranges, others = split_texts(self.options.calibration_data)
        protos = quantize(self.path, self.manifest, ranges, "symmetric", self.progress)
        self._write(self._lowered(INT8, protos, others))

    def _lowered(self, precision: str, protos: dict[str, Any], texts: Sequence[Text]) -> Manifest:
        """The manifest with graphs in fp16, without targets that were built from older ones."""
        from .targets.fp16 import add_lowered

        given = self.path, self.manifest, precision, protos, texts, self.progress
        manifest, agreement = add_lowered(*given)
        self.added.checked.append(Checked(precision, agreement))

        def runs_them(_: str, target: Target) -> bool:
            graphs = manifest.graphs_of(target)
            return all(f.onnx_sha256 == graphs[name].sha256 for name, f in target.files.items())

        return keep_targets(manifest, runs_them)

    def _add_int8_for_cpus(self) -> None:
        # Older targets run the graphs that are replaced, so they are checked again, too.
        backends = [
            name
            for name in CPU_BACKENDS
            if f"{name}-{INT8}" in self.manifest.targets
            or (name in self.backends and unavailable_reason(name) is None)
        ]
        given = self.path, self.manifest, backends, self.options.calibration_data, self.progress
        try:
            self._write(*cpu.add_int8(*given))
        finally:
            cpu.drop_unused_graphs(self.path, self.manifest)

    def _add_plans(self, backend: str, precision: str) -> None:
        """Build a target of plans, and verify it if it can run here.

        Raises:
            BackendError: the build failed.
            VerificationError: the plan does not reproduce the model.
        """
        if unavailable := unavailable_reason(backend):
            self.added.checked.append(Checked(f"{backend}-{precision}", refused=unavailable))
            return
        name, manifest, options = target_name(backend, precision), self.manifest, self.options
        # A build that fails or is killed may have replaced some of the files of an earlier one.
        self._write(keep_targets(manifest, lambda other, _: other != name))
        target = build_target(self.path, manifest, backend, precision, options.plans, self.progress)
        built = with_target(manifest, name, with_old_points(manifest, name, target))
        found = Checked(name)
        if why_not(built, name) is None:
            built, found = check_target(self.path, built, name, target, self.progress)
            if error := found.refused:
                hint = "it was removed from the manifest; build it from fp32 graphs, or report this"
                raise type(error)(error.message, hint) from error
        self._write(built, [found])

    def _choose_default(self) -> str:
        """Choose the default target, and say what there is to say about it."""
        name = self.options.default_target
        refused = {found.name: found.refused for found in self.added.checked}.get(name or "")
        if refused and name not in self.manifest.targets:
            raise VerificationError(f"{name} is not kept: {refused.message}", refused.hint)
        said = ""
        if name is not None:
            fixed = target_of(self.path, self.manifest, name)
            self.manifest = msgspec.structs.replace(
                self.manifest, default_target=fixed, default_is_fixed=True
            )
        if name is not None or any(one.name.startswith(CPU_BACKENDS) for one in self.added.checked):
            self.manifest, said = cpu.with_fastest_default(self.path, self.manifest, self.progress)
        self._write(self.manifest)
        return said


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
    for_cpus = bool(set(options.backends) & set(CPU_BACKENDS))
    return not for_cpus or bool(set(options.backends) & set(PLAN_BACKENDS)), for_cpus
