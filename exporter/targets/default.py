"""The default target: the most exact one, or another one that is clearly faster on this machine.

A build compares targets at full depth. A conversion compares those that keep their promise, with
the layers that run there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...calibration.progress import Progress
from ...calibration.timing import in_turns
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import Manifest
from ...runtime.check import EXPORT_LIMIT
from ...runtime.engine import Engine
from ...runtime.targets import why_not
from .builders import INT8_TARGETS
from .check import engine_of

Times = NDArray[np.float64]

# Rows and tokens of the batches that are timed: a single text, and many.
_SHAPES = ((1, 32), (32, 32))
# Each target is timed in several turns, with several runs in each. In use, a target runs alone, so
# its data are in the caches of the CPU. In the first run of a turn, the caches still hold the data
# of other targets, so the best run of a turn counts.
_TURNS = 6
_RUNS = 2
# A target is clearly faster if it is so many times as fast in the middle turn, and faster in all
# turns but so many. Else, two equal exports on a busy machine would get different default targets.
LEAST_GAIN = 1.1
_MOST_LOST_TURNS = 1
# How long idle threads of the libraries may keep a core busy.
_SPIN_SECONDS = 0.01


def with_fastest_default(engines: EnginesFolder, progress: Progress) -> tuple[EnginesFolder, str]:
    """Measure all targets for CPUs, and make the most exact of the fast ones the default target.

    Another target takes the place of a more exact one only if it is clearly faster. The default
    target stays if it was chosen by hand, if it has operating points that the fast target does not
    have, or if it is for a GPU.

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
    seconds = _seconds(engines, names, progress)
    speeds = {name: float(np.median(_gains(seconds, name, names[0]))) for name in names}
    targets = dict(manifest.targets)
    for name, speed in speeds.items():
        targets[name] = msgspec.structs.replace(targets[name], relative_speed=round(speed, 3))
    points = {name: target.operating_points.keys() for name, target in targets.items()}
    before = manifest.default_target

    order = _by_exactness(manifest, names)
    fastest = next(
        name
        for place, name in enumerate(order)
        if not any(_is_clearly_faster(_gains(seconds, each, name)) for each in order[place + 1 :])
    )
    other = before if before in speeds else names[0]
    faster = float(np.median(_gains(seconds, fastest, other)))
    why = f"{faster:.2f} times as fast as {other} here, at full depth"
    if manifest.default_is_fixed:
        chosen = before
        why = "as chosen by hand"
    elif points[before] - points[fastest]:
        chosen = before
        why = f"because it has operating points; {fastest} is {why}"
    elif before not in speeds:
        chosen = before
        why = "which does not run on this CPU"
    elif fastest == before:
        chosen = before
        why = "because no other target for CPUs is clearly faster here"
    else:
        chosen = fastest
    changed = engines.with_manifest(targets=targets, default_target=chosen)
    return changed, f"default target: {chosen}, {why}"


def fastest_with_exits(manifest: Manifest, depths: Mapping[str, float]) -> str:
    """The most exact of some targets that no less exact one clearly beats with early exits.

    Args:
        manifest: has the speeds at full depth, see `with_fastest_default`.
        depths: by target, how many layers run for a row on average.
    """
    order = _by_exactness(manifest, depths)
    # A single target for CPUs was not measured.
    seconds = {
        name: depths[name] / (manifest.targets[name].relative_speed or 1.0) for name in order
    }
    return next(
        name
        for place, name in enumerate(order)
        if not any(LEAST_GAIN * seconds[each] < seconds[name] for each in order[place + 1 :])
    )


def fastest_exact(manifest: Manifest) -> str:
    """The default target, or if that is in int8 the fastest other one at full depth."""
    if manifest.default_target not in INT8_TARGETS:
        return manifest.default_target
    exact = [name for name in manifest.targets if name not in INT8_TARGETS]
    return max(exact, key=lambda name: manifest.targets[name].relative_speed or 0.0)


def _by_exactness(manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Targets, the most exact first; of those within the limit, the default target comes first."""

    def inexactness(name: str) -> tuple[float, bool]:
        tolerance = manifest.targets[name].tolerance or 0.0
        return max(tolerance, EXPORT_LIMIT), name != manifest.default_target

    return sorted(names, key=inexactness)


def _gains(seconds: Mapping[str, Times], name: str, other: str) -> Times:
    """How many times as fast a target is as another one, in each turn `[turns]`."""
    return np.asarray(np.exp(np.log(seconds[other] / seconds[name]).mean(axis=1)))


def _is_clearly_faster(gains: Times) -> bool:
    lost = np.count_nonzero(gains <= 1)
    return bool(np.median(gains) >= LEAST_GAIN and lost <= _MOST_LOST_TURNS)


def _seconds(engines: EnginesFolder, names: Sequence[str], progress: Progress) -> dict[str, Times]:
    """For each target, seconds of all segments `[turns, shapes]`; the best run of each turn."""
    segments = len(engines.manifest.segments)

    def best(engine: Engine, shape: tuple[int, int]) -> float:
        rows, most = shape
        tokens = min(most, engine.core.limits.max_sequence)
        time.sleep(_SPIN_SECONDS)
        return min(sum(engine.core.time_exits(rows, tokens)[-segments:]) for _ in range(_RUNS))

    with ExitStack() as stack:
        loaded = [stack.enter_context(engine_of(engines, name)) for name in names]
        measures = [partial(best, engine) for engine in loaded]
        found: Times = np.array(
            in_turns(_SHAPES, measures, _TURNS, progress, "measure the targets")
        )
    return {name: found[..., number] for number, name in enumerate(names)}
