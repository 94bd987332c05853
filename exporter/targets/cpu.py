"""Targets of OpenVINO, which need no files and no texts, and the choice of the default target.

A target is kept only if it gives the labels and exits of the model. The default target is the
fastest target for CPUs, as measured on this machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path

import msgspec

from ...runtime.agreement import REQUIREMENTS, Agreement, Logits, compare, must_pass
from ...runtime.artifact.manifest import (
    Manifest,
    Target,
    keep_targets,
    with_operating_points,
    with_target,
)
from ...runtime.backends.onnxruntime_session import check_installed
from ...runtime.backends.openvino import has_bf16, openvino_version
from ...runtime.encoding import Text
from ...runtime.engine import Engine
from ...runtime.errors import FpabeeError
from ...runtime.progress import Progress
from ...runtime.targets import open_backend, rule_of, why_not
from ..exact import exact_logits
from ..precision.formats import INT8

OPENVINO = "openvino"
ONNXRUNTIME = "onnxruntime"
BACKENDS = (ONNXRUNTIME, OPENVINO)
INT8_FOLDER = "targets/cpu-int8"
"""The place in an engines folder of the int8 graphs that both backends run."""

# Rows and tokens of the batches that are timed: a single text, and many.
_SHAPES = ((1, 32), (32, 32))
# Each target is timed in several turns, with several runs in each. In use, a target runs alone, so
# its data are in the caches of the CPU. In the first run of a turn, the caches still hold the data
# of other targets, so the best run counts.
_TURNS, _RUNS = 4, 3
# Speeds that differ by less count as equal.
_LEAST_GAIN = 1.05
# How long idle threads of the libraries may keep a core busy.
_SPIN_SECONDS = 0.01


def is_cpu_int8(target: Target) -> bool:
    """Whether a target runs the int8 graphs for CPUs."""
    return target.backend in BACKENDS and target.precision == INT8


@dataclass(frozen=True)
class CpuTarget:
    """What the check of a target for CPUs found.

    Attributes:
        name: the target.
        agreement: with the PyTorch model; None if it was refused.
        refused: why the folder does not have it; None if it does.
    """

    name: str
    agreement: Agreement | None = None
    refused: FpabeeError | None = None


def is_installed() -> bool:
    """Whether OpenVINO is installed; it may still be unusable."""
    return util.find_spec(OPENVINO) is not None


def unavailable_reason(backend: str = OPENVINO) -> FpabeeError | None:
    """Why a backend for CPUs cannot run on this machine; None: it can."""
    try:
        if backend == OPENVINO:
            openvino_version()
        else:
            check_installed()
    except FpabeeError as error:
        return error
    return None


def version_of(backend: str) -> str:
    """The version of a backend's library; empty if it cannot run on this machine."""
    if unavailable_reason(backend):
        return ""
    if backend == OPENVINO:
        return openvino_version()
    import onnxruntime

    return str(onnxruntime.__version__)


def add_openvino(
    folder: Path, manifest: Manifest, texts: Sequence[Text], progress: Progress
) -> tuple[Manifest, list[CpuTarget]]:
    """Add the targets of OpenVINO that suit this machine, and verify each.

    That is fp32, so that the folder runs on every machine, and bf16 if this CPU has it. Targets
    that the same version of OpenVINO verified before are left as they are, unless texts are given.

    Args:
        folder: the engines folder.
        manifest: its manifest. The one with the targets is returned, not written.
        texts: what the targets are compared on, besides the reference texts; may be empty.
        progress: called with (what, done, total).

    Returns:
        The manifest with the targets that passed, and what was found of each new one.
    """
    if not is_installed():
        return manifest, []
    error = unavailable_reason()
    if error is not None:
        return manifest, [CpuTarget(OPENVINO, refused=error)]
    more = exact_logits(folder, manifest, texts) if texts else None
    versions = {OPENVINO: openvino_version()}
    found = []
    for precision in ("fp32", *["bf16"] * has_bf16()):
        name = f"{OPENVINO}-{precision}"
        old = manifest.targets.get(name)
        if old is not None and old.versions == versions and more is None:
            continue
        progress(f"verify {name}", 0, 1)
        target = Target(
            backend=OPENVINO,
            precision=precision,
            graph_precision="fp32",
            versions=versions,
            tolerance=None,
        )
        manifest, checked = verified_target(folder, manifest, name, target, more)
        found.append(checked)
    return manifest, found


def verified_target(
    folder: Path,
    manifest: Manifest,
    name: str,
    target: Target,
    more: tuple[Sequence[Text], Logits] | None = None,
) -> tuple[Manifest, CpuTarget]:
    """Run the reference texts, and perhaps others, on a target for CPUs.

    Args:
        folder: the engines folder.
        manifest: its manifest. The new one is returned, not written.
        name: the target's name. An older target of this name is replaced.
        target: its record, without what is measured.
        more: other texts, and their logits in fp32.

    Returns:
        The manifest with the target if it passed, or without it, and what was found.
    """
    old = manifest.targets.get(name)
    if old is not None and _origin(old) == _origin(target):
        target = with_operating_points(target, old.operating_points, old.default_operating_point)
    try:
        with engine_of(folder, with_target(manifest, name, target), name) as engine:
            agreement = engine.check()
            tolerance = agreement.max_logit_difference
            if more is not None:
                agreement = _check_texts(engine, *more)
                tolerance = max(tolerance, agreement.max_logit_difference)
    except FpabeeError as error:
        rest = keep_targets(manifest, lambda other, _: other != name)
        return rest, CpuTarget(name, refused=error)
    passed = msgspec.structs.replace(target, tolerance=tolerance)
    return with_target(manifest, name, passed), CpuTarget(name, agreement)


def _check_texts(engine: Engine, texts: Sequence[Text], expected: Logits) -> Agreement:
    """Compare a target with fp32 on texts.

    Raises:
        VerificationError: too many labels or exits differ.
    """
    manifest = engine.manifest
    found, precision = engine.trace(texts).logits, manifest.targets[engine.target].precision
    required = REQUIREMENTS[precision]
    agreement = compare(found, expected, engine.rule, manifest.task, required, manifest.exits.start)
    hint = (
        "give more texts like those to classify as `calibration_data`, or use another target"
        if precision == INT8
        else "use another target"
    )
    must_pass(agreement, "it changes answers", hint)
    return agreement


def _origin(target: Target) -> tuple[object, ...]:
    """What the operating points of a target depend on."""
    files = [file.sha256 for file in target.files.values()]
    return target.versions, files, target.rest_precision


def with_fastest_default(
    folder: Path, manifest: Manifest, progress: Progress
) -> tuple[Manifest, str]:
    """Measure all targets for CPUs, and make the fastest one the default target.

    The default target stays if it was chosen by hand, if it has operating points that the fastest
    target does not have, or if it is for a GPU.

    Args:
        folder: the engines folder.
        manifest: its manifest. The new one is returned, not written.
        progress: called with (what, done, total).

    Returns:
        The manifest with the measured speeds and the default target, and one line which says what
        the default target is and why; empty if there is only one target for CPUs.
    """
    names = [name for name in manifest.targets if _runs_on_cpu(manifest, name)]
    if len(names) < 2:
        return manifest, ""
    progress("measure the targets", 0, 1)
    seconds = _seconds(folder, manifest, names)
    speeds = {
        name: math.prod(a / b for a, b in zip(seconds[names[0]], own, strict=True))
        ** (1 / len(own))
        for name, own in seconds.items()
    }
    targets = dict(manifest.targets)
    for name, speed in speeds.items():
        targets[name] = msgspec.structs.replace(targets[name], relative_speed=round(speed, 3))
    points = {name: target.operating_points.keys() for name, target in targets.items()}
    before = manifest.default_target
    near = [name for name, speed in speeds.items() if speed * _LEAST_GAIN >= max(speeds.values())]
    # Of targets that are about as fast, the most exact; tolerances below 1e-4 count as equal.
    fastest = min(near, key=lambda name: max(manifest.targets[name].tolerance or 0.0, 1e-4))
    other = before if before in speeds else names[0]
    faster = speeds[fastest] / speeds[other]
    why = f"{faster:.2f} times as fast as {other} here, at full depth"
    if manifest.default_is_fixed:
        chosen, why = before, "as chosen by hand"
    elif points[before] - points[fastest]:
        chosen, why = before, f"because it has operating points; {fastest} is {why}"
    elif before not in speeds:
        chosen, why = before, "which does not run on this CPU"
    elif fastest == before or max(speeds.values()) < _LEAST_GAIN * speeds[before]:
        chosen, why = before, "because no other target for CPUs is faster here"
    else:
        chosen = fastest
    changed = msgspec.structs.replace(manifest, targets=targets, default_target=chosen)
    return changed, f"default target: {chosen}, {why}"


def engine_of(folder: Path, manifest: Manifest, name: str) -> Engine:
    """An engine of a manifest that may not be written yet, without any warning."""
    _, rule = rule_of(folder, manifest, name, None)
    backend = open_backend(folder, manifest, name, None)
    try:
        return Engine(folder, manifest, backend, rule)
    except BaseException:
        backend.close()
        raise


def _runs_on_cpu(manifest: Manifest, name: str) -> bool:
    target = manifest.targets[name]
    is_for_cpus = target.backend in BACKENDS and not target.device
    return is_for_cpus and why_not(manifest, name) is None


def _seconds(folder: Path, manifest: Manifest, names: Sequence[str]) -> dict[str, list[float]]:
    """For each target, seconds of all segments at each shape; the best of several runs."""
    engines: dict[str, Engine] = {}
    best = {name: [math.inf] * len(_SHAPES) for name in names}
    try:
        for name in names:
            engines[name] = engine_of(folder, manifest, name)
        # In turns, so that a machine whose speed drifts treats all targets alike.
        for _ in range(_TURNS):
            for name, engine in engines.items():
                for number, (rows, tokens) in enumerate(_SHAPES):
                    tokens = min(tokens, engine.limits.max_sequence)
                    time.sleep(_SPIN_SECONDS)
                    for _ in range(_RUNS):
                        seconds = sum(engine.time_exits(rows, tokens)[-len(manifest.segments) :])
                        best[name][number] = min(best[name][number], seconds)
    finally:
        for engine in engines.values():
            engine.close()
    return best
