"""Choose the target and operating point of an engines folder, and open the target's backend."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .. import __version__
from .arguments import whole_number
from .artifact.folder import read_manifest
from .artifact.manifest import Manifest, Target
from .backends.backend import Backend
from .errors import BackendError, Call, Remedy, RuleError
from .rules.base import ExitRule

logger = logging.getLogger(__name__)

# ONNX Runtime starts all of them, so an absurd number would exhaust the machine.
_MOST_THREADS = 1024
# Folders and default targets for which a warning said that another target runs.
_told: set[tuple[Path, str]] = set()


def target_of(folder: Path, manifest: Manifest, name: str | None) -> str:
    """The name of the target to run.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        name: a target; None: the default target, or if this machine cannot run it, the fastest
            target that it can run, if possible one with the same operating points. A warning says
            so, once for each folder.

    Raises:
        BackendError: the folder has no such target.
    """
    if name is None:
        return _default_target(folder, manifest)
    if name not in manifest.targets:
        raise BackendError(
            f"{folder} has no target {name!r}; it has {', '.join(manifest.targets)}",
            Remedy(
                "choose a {target} that it has, or build one: {call}",
                call=Call("add_targets", folder),
            ),
        )
    return name


def runnable_targets(folder: Path) -> list[str]:
    """The names of a folder's targets that this machine can run.

    Raises:
        ArtifactError: the folder is not an engines folder, or is damaged.
        BackendError: it can run none of them.
    """
    manifest = read_manifest(folder)
    errors = {name: why_not(manifest, name) for name in manifest.targets}
    names = [name for name, error in errors.items() if error is None]
    if not names:
        raise next(error for error in errors.values() if error is not None)
    return names


def why_not(manifest: Manifest, name: str) -> BackendError | None:
    """Why this machine cannot run a target; None: it can."""
    target = manifest.targets[name]
    try:
        backend_class(target).check(target, name)
    except BackendError as error:
        return error
    return None


def _default_target(folder: Path, manifest: Manifest) -> str:
    default = manifest.default_target
    error = why_not(manifest, default)
    if error is None:
        return default
    points = manifest.targets[default].operating_points.keys()
    ranks = {
        name: (len(points & target.operating_points.keys()), target.relative_speed or 0.0)
        for name, target in manifest.targets.items()
    }
    for name in sorted(ranks, key=ranks.__getitem__, reverse=True):
        if why_not(manifest, name) is None:
            if (folder, default) not in _told:
                _told.add((folder, default))
                lost = sorted(points - manifest.targets[name].operating_points.keys())
                without = f", without the operating points {', '.join(lost)}" if lost else ""
                logger.warning(
                    "%s runs instead of the default target %s%s: %s",
                    *(name, default, without, error.message),
                )
            return name
    return default  # whose error is the one to report


def rule_of(
    folder: Path, manifest: Manifest, target: str, point: str | None
) -> tuple[str | None, ExitRule]:
    """The name of the operating point to run, and its rule.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        target: the target's name.
        point: an operating point; None: the target's default point. If the target has none, the
            returned name is None, and the rule is the folder's default rule.

    Raises:
        RuleError: the target has no such point, or its rule does not exist.
    """
    points = manifest.targets[target].operating_points
    if point is None:
        point = manifest.targets[target].default_operating_point or None
    if point is None:
        return None, ExitRule.from_dict(manifest.default_rule)
    if point in points:
        return point, ExitRule.from_dict(points[point].rule)
    calibrate = Call("calibrate", folder, data="DATA", target=target)
    elsewhere = [other for other, t in manifest.targets.items() if point in t.operating_points]
    if elsewhere:
        raise RuleError(
            f"operating point {point!r} was measured on {', '.join(elsewhere)}, not on {target}",
            Remedy("calibrate this target: {call}", call=calibrate),
        )
    raise RuleError(
        f"target {target} has no operating point {point!r}; it has: "
        f"{', '.join(points) or 'none yet'}",
        Remedy("calibrate it: {call}", call=calibrate),
    )


def backend_class(target: Target) -> type[Backend[Any]]:
    """The class of a target's backend; its inference library is not imported yet.

    Raises:
        BackendError: this fpabee does not have the backend.
    """
    if target.backend == "onnxruntime" and target.device == "cuda":
        from .backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend
    if target.backend == "onnxruntime":
        from .backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend
    if target.backend == "openvino":
        from .backends.openvino import OpenVinoBackend

        return OpenVinoBackend
    if target.backend in ("tensorrt", "tensorrt-rtx"):
        from .backends.tensorrt import TensorRtBackend

        return TensorRtBackend
    raise BackendError(
        f"the manifest names backend {target.backend!r}, which fpabee {__version__} does not have",
        Remedy("pip install -U fpabee, or choose another {target}"),
    )


def open_backend(folder: Path, manifest: Manifest, name: str, threads: int | None) -> Backend[Any]:
    """The backend of a target.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        name: the target's name.
        threads: CPU threads, at most 1024; default: the cores that this process may use.

    Raises:
        ArtifactError: a file of the target is missing or damaged.
        BackendError: the target cannot run on this machine, or `threads` is out of range.
        MissingExtraError: the target's inference library is not installed.
    """
    if threads is not None:
        threads = whole_number("threads", threads, BackendError, _MOST_THREADS)
    return backend_class(manifest.targets[name])(folder, manifest, name, threads)
