"""The default target of an engines folder: the fastest one on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import geometric_mean

import msgspec

from ...runtime.agreement import EXPORT_LIMIT
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.progress import Progress
from ...runtime.targets import why_not
from .check import engine_of

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


def with_fastest_default(engines: EnginesFolder, progress: Progress) -> tuple[EnginesFolder, str]:
    """Measure all targets for CPUs, and make the fastest one the default target.

    The default target stays if it was chosen by hand, if it has operating points that the fastest
    target does not have, or if it is for a GPU.

    Args:
        engines: the folder. It is not written.
        progress: called with (what, done, total).

    Returns:
        The folder with the measured speeds and the default target, and one line which says what
        the default target is and why; empty if there is only one target for CPUs.
    """
    manifest = engines.manifest
    names = [
        name
        for name, target in manifest.targets.items()
        if not target.on_gpu and why_not(manifest, name) is None
    ]
    if len(names) < 2:
        return engines, ""
    progress("measure the targets", 0, 1)
    seconds = _seconds(engines, names)
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
    # Of targets that are about as fast, the most exact; all within the limit count as equal.
    fastest = min(near, key=lambda name: max(manifest.targets[name].tolerance or 0.0, EXPORT_LIMIT))
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
    changed = engines.with_manifest(targets=targets, default_target=chosen)
    return changed, f"default target: {chosen}, {why}"


def _seconds(engines: EnginesFolder, names: Sequence[str]) -> dict[str, list[float]]:
    """For each target, seconds of all segments at each shape; the best of several runs."""
    best = {name: [math.inf] * len(_SHAPES) for name in names}
    with ExitStack() as stack:
        loaded = [stack.enter_context(engine_of(engines, name)) for name in names]
        # In turns, so that a machine whose speed drifts treats all targets alike.
        for _ in range(_TURNS):
            for engine, own in zip(loaded, best.values(), strict=True):
                for number, (rows, tokens) in enumerate(_SHAPES):
                    tokens = min(tokens, engine.limits.max_sequence)
                    time.sleep(_SPIN_SECONDS)
                    for _ in range(_RUNS):
                        seconds = sum(
                            engine.time_exits(rows, tokens)[-len(engines.manifest.segments) :]
                        )
                        own[number] = min(own[number], seconds)
    return best
