"""Which target and operating point of a folder run, and the backend that runs them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from .arguments import whole_number
from .artifact.manifest import Manifest
from .backends.base import Backend
from .errors import ArtifactError, BackendError, RuleError
from .rules.rules import ExitRule

# ONNX Runtime starts them all: more than any machine has would only exhaust it.
_MOST_THREADS = 1024


def target_of(folder: Path, manifest: Manifest, name: str | None) -> str:
    """The target to run: the one that is named, or the folder's default.

    Raises:
        BackendError: the folder has no such target.
    """
    chosen = manifest.default_target if name is None else name
    if chosen not in manifest.targets:
        raise BackendError(
            f"{folder} has no target {chosen!r}; it has {', '.join(manifest.targets)}",
            "choose one with --target, or build it with fpabee-export",
        )
    return chosen


def operating_point_of(
    folder: Path, manifest: Manifest, target: str, name: str | None
) -> str | None:
    """The operating point to run: the one that is named, or the target's default if it has one.

    Raises:
        RuleError: the target has no such point.
    """
    points = manifest.targets[target].operating_points
    command = f"fpabee-calibrate {folder} --data DATA --target {shlex.quote(target)}"
    if name is None:
        return manifest.targets[target].default_operating_point or None
    if name in points:
        return name
    elsewhere = [other for other, t in manifest.targets.items() if name in t.operating_points]
    if elsewhere:
        raise RuleError(
            f"operating point {name!r} was measured on {', '.join(elsewhere)}, not on {target}",
            f"calibrate it here: {command}",
        )
    raise RuleError(
        f"target {target} has no operating point {name!r}; it has: "
        f"{', '.join(points) or 'none yet'}",
        f"make points: {command}",
    )


def rule_of(manifest: Manifest, target: str, point: str | None) -> ExitRule:
    """The rule of an operating point; without one, the folder's."""
    if point is None:
        return ExitRule.from_dict(manifest.default_rule)
    return ExitRule.from_dict(manifest.targets[target].operating_points[point].rule)


def open_backend(folder: Path, manifest: Manifest, name: str, threads: int | None) -> Backend[Any]:
    """The backend of a target.

    Raises:
        ArtifactError: files are missing or damaged, or the backend is not known.
        BackendError: the target cannot run here, or the number of threads is impossible.
    """
    if threads is not None:
        threads = whole_number("threads", threads, BackendError, _MOST_THREADS)
    target = manifest.targets[name]
    if target.backend == "onnxruntime" and target.device == "cuda":
        from .backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend(folder, manifest, target)
    if target.backend == "onnxruntime":
        from .backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(folder, manifest, target, threads)
    if target.backend in ("tensorrt", "tensorrt-rtx"):
        from .backends.tensorrt import TensorRtBackend

        return TensorRtBackend(folder, manifest, target, name)
    raise ArtifactError(
        f"the manifest names backend {target.backend!r}, which this fpabee does not have",
        "pip install -U fpabee, or choose another --target",
    )
