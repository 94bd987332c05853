"""Choose the target and operating point of an engines folder, and open the target's backend."""

from __future__ import annotations

import logging

from .. import __version__
from .artifact.exits import Exits, exits_of
from .artifact.folder import EnginesFolder
from .artifact.manifest import Manifest, Target
from .artifact.operating_point import RuleSettings
from .artifact.quick import exits_of_point, quick_of, quick_of_named
from .backends.base import Backend
from .errors import BackendError, FpabeeError, RuleError, warn_once, whole_number
from .rules.rules import ExitRule
from .tasks import task_of

logger = logging.getLogger(__name__)

# ONNX Runtime starts all of them, so an absurd number would exhaust the machine.
MOST_THREADS = 1024


def target_of(engines: EnginesFolder, name: str | None) -> str:
    """The name of the target to run.

    Args:
        engines: the engines folder.
        name: a target; None: the default target, or if this machine cannot run it, the fastest
            target that it can run, if possible one with the same operating points. A warning says
            so, and another one that the default target leaves the GPU of this machine unused.

    Raises:
        BackendError: the folder has no such target.
    """
    if name is None:
        return _default_target(engines)
    if name not in engines.manifest.targets:
        raise BackendError(
            f"{engines.path} has no target {name!r}; it has {', '.join(engines.manifest.targets)}",
            "choose a `target` that it has, or add one to the folder",
        )
    return name


def runnable_targets(engines: EnginesFolder) -> list[str]:
    """The names of a folder's targets that this machine can run.

    Raises:
        BackendError: it can run none of them.
    """
    manifest = engines.manifest
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


def _default_target(engines: EnginesFolder) -> str:
    manifest = engines.manifest
    default = manifest.default_target
    targets = manifest.targets
    error = why_not(manifest, default)
    if error is None and (manifest.default_is_fixed or targets[default].on_gpu):
        return default
    points = targets[default].operating_points.keys()

    def rank(name: str) -> tuple[int, float, bool]:
        target = targets[name]
        shared = len(points & target.operating_points.keys())
        return shared, target.relative_speed or 0.0, bool(target.files)

    for name in sorted(targets, key=rank, reverse=True):
        if (error is None and not targets[name].on_gpu) or why_not(manifest, name) is not None:
            continue
        if error is None:
            warn_once(
                logger,
                f"the default target {default} runs on the CPU, but {name} can run on the GPU of "
                "this machine: choose that target, or make it the default target",
                engines.path,
            )
            return default
        lost = sorted(points - targets[name].operating_points.keys())
        without = f", without the operating points {', '.join(lost)}" if lost else ""
        warn_once(
            logger,
            f"{name} runs instead of the default target {default}{without}: {error.message}",
            engines.path,
        )
        return name
    return default  # which runs, or whose error is the one to report


def rule_here(engines: EnginesFolder, name: str, point: str | None) -> tuple[str | None, ExitRule]:
    """The operating point to run on this machine, and its rule; the arguments as in `rule_of`.

    A warning says if the target has no operating point, although others of the folder have some.
    """
    manifest = engines.manifest
    point, rule = rule_of(manifest, name, point)
    others = [other for other, target in manifest.targets.items() if target.operating_points]
    if others and name not in others:
        warn_once(
            logger,
            f"target {name} has no operating points, unlike {', '.join(others)}: until it is "
            "calibrated, it runs by the default rule of the folder",
            engines.path,
        )
    return point, rule


def no_promise(manifest: Manifest, name: str, point: str | None, error: FpabeeError) -> RuleError:
    """The error for an operating point whose quick pass cannot run, or lost its promise.

    Args:
        manifest: that of the engines folder.
        name: the target's name.
        point: the operating point.
        error: what is wrong with the quick pass.
    """
    points = manifest.targets[name].operating_points
    alone = [other for other in points if quick_of(points[other]) is None]
    return RuleError(
        f"operating point {point!r} of target {name} has no promise here: {error.message}",
        f"choose one without a quick pass ({', '.join(alone) or 'none yet'}), or calibrate again",
    )


def rule_instead(
    engines: EnginesFolder, name: str, point: str | None, error: FpabeeError
) -> tuple[str | None, ExitRule]:
    """The rule that runs instead of an operating point without a promise here, see `rule_alone`.

    A warning says so. The arguments are those of `no_promise`, with the whole folder.
    """
    manifest = engines.manifest
    other, rule = rule_alone(manifest, name, point)
    instead = other or "the default rule of the folder"
    message = f"{instead} runs instead of operating point {point}: {error.message}"
    warn_once(logger, message, engines.path)
    return other, rule


def rule_of(manifest: Manifest, target: str, point: str | None) -> tuple[str | None, ExitRule]:
    """The name of the operating point to run, and its rule.

    Args:
        manifest: that of the engines folder.
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
        return None, _default_rule(manifest)
    if point in points:
        where = f"operating point {point!r} of target {target}"
        exits = exits_of_point(manifest, points[point])
        return point, _stored_rule(manifest, points[point].rule, exits, where)
    elsewhere = [other for other, t in manifest.targets.items() if point in t.operating_points]
    measured = f", but {', '.join(elsewhere)} has" if elsewhere else ""
    raise RuleError(
        f"target {target} has no operating point {point!r}{measured}; it has: "
        f"{', '.join(points) or 'none yet'}",
        "name one that it has, give another `target`, or calibrate this target",
    )


def rule_alone(manifest: Manifest, target: str, point: str | None) -> tuple[str | None, ExitRule]:
    """As `rule_of`, for what cannot run a quick pass: the point that does without it instead.

    If there is none, the returned name is None, and the rule is the folder's default rule.
    """
    name, rule = rule_of(manifest, target, point)
    quick = quick_of_named(manifest, target, name)
    if quick is None:
        return name, rule
    if quick.alone:
        return rule_of(manifest, target, quick.alone)
    return None, _default_rule(manifest)


def _default_rule(manifest: Manifest) -> ExitRule:
    return _stored_rule(manifest, manifest.default_rule, exits_of(manifest), "the default rule")


def _stored_rule(manifest: Manifest, settings: RuleSettings, exits: Exits, where: str) -> ExitRule:
    """A rule of the manifest, which fits the model.

    Args:
        manifest: the manifest.
        settings: the rule.
        exits: those that its rows see.
        where: what the rule is called in messages.

    Raises:
        RuleError: it does not, or this fpabee does not have it.
    """
    try:
        rule = ExitRule.from_dict(settings)
        task_of(manifest.task).runner(rule, exits.numbers)
    except RuleError as error:
        raise RuleError(
            f"{where} in the manifest cannot be used: {error.message}",
            "calibrate the target again, or give another `operating_point` or `rule`",
        ) from error
    return rule


def backend_class(target: Target) -> type[Backend]:
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
        "update fpabee, or choose another `target`",
    )


def open_backend(
    engines: EnginesFolder, name: str, threads: int | None = None, device: int = 0
) -> Backend:
    """The backend of a target.

    Args:
        engines: the engines folder.
        name: the target's name.
        threads: CPU threads, at most 1024; default: the cores that this process may use.
        device: the number of the GPU, from 0; a CPU has only 0.

    Raises:
        ArtifactError: a file of the target is missing or damaged.
        BackendError: the target cannot run on this machine or device, or `threads` is out of
            range.
        MissingExtraError: the target's inference library is not installed.
    """
    if threads is not None:
        threads = whole_number("threads", threads, BackendError, MOST_THREADS)
    device = whole_number("device", device, BackendError, least=0)
    return backend_class(engines.manifest.targets[name])(engines, name, threads, device)
