"""The default target of an engines folder: the fastest one on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import geometric_mean

import msgspec

from ...runtime.artifact.folder import EnginesFolder
from ...runtime.progress import Progress
from ...runtime.targets import why_not
from .backends import CPU_BACKENDS
from .check import engine_of

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
    names = [
        name
        for name, target in manifest.targets.items()
        if target.backend in CPU_BACKENDS and not target.device and not why_not(manifest, name)
    ]
    if len(names) < 2:
        return manifest, ""
    progress("measure the targets", 0, 1)
    seconds = _seconds(folder, manifest, names)
    first = seconds[names[0]]
    speeds = {
        name: geometric_mean(a / b for a, b in zip(first, own, strict=True))
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


def _seconds(folder: Path, manifest: Manifest, names: Sequence[str]) -> dict[str, list[float]]:
    """For each target, seconds of all segments at each shape; the best of several runs."""
    best = {name: [math.inf] * len(_SHAPES) for name in names}
    with ExitStack() as stack:
        engines = [stack.enter_context(engine_of(folder, manifest, name)) for name in names]
        # In turns, so that a machine whose speed drifts treats all targets alike.
        for _ in range(_TURNS):
            for engine, own in zip(engines, best.values(), strict=True):
                for number, (rows, tokens) in enumerate(_SHAPES):
                    tokens = min(tokens, engine.limits.max_sequence)
                    time.sleep(_SPIN_SECONDS)
                    for _ in range(_RUNS):
                        seconds = sum(engine.time_exits(rows, tokens)[-len(manifest.segments) :])
                        own[number] = min(own[number], seconds)
    return best
