"""Targets for CPUs: those of OpenVINO, int8, and the choice of the default target.

A target is kept only if it gives the labels and exits of the model. OpenVINO needs no files and no
texts. int8 is one set of graphs, quantized with the user's own texts, that ONNX Runtime and
OpenVINO both run; heads, and what is not quantized, stay in fp32, and OpenVINO runs these parts in
bf16 if the CPU has it. The default target is the most exact one, or another one that is clearly
faster, as measured on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...runtime.agreement import EXPORT_LIMIT
from ...runtime.artifact.manifest import BuiltFile, Manifest, Target
from ...runtime.backends.openvino import has_bf16, rest_precision
from ...runtime.encoding import Text
from ...runtime.progress import Progress
from ...runtime.targets import why_not
from ..onnx_file import write_graph
from ..staging import replacing
from .backends import CPU_BACKENDS, INT8, OPENVINO, unavailable_reason, version_of
from .check import Checked, check_target, engine_of, exact_logits

Times = NDArray[np.float64]

OPENVINO_TARGETS = tuple(f"{OPENVINO}-{precision}" for precision in ("fp32", "bf16"))
INT8_FOLDER = "targets/cpu-int8"
"""The place in an engines folder of the int8 graphs that both backends run."""

# Rows and tokens of the batches that are timed: a single text, and many.
_SHAPES = ((1, 32), (32, 32))
# Each target is timed in several turns, with several runs in each. In use, a target runs alone, so
# its data are in the caches of the CPU. In the first run of a turn, the caches still hold the data
# of other targets, so the best run of a turn counts.
_TURNS = 6
_RUNS = 2
# A target is clearly faster if it is so many times as fast in the middle turn, and faster in all
# turns but so many. Else, two equal exports on a busy machine would get different default targets.
_LEAST_GAIN = 1.1
_MOST_LOST_TURNS = 1
# How long idle threads of the libraries may keep a core busy.
_SPIN_SECONDS = 0.01


def add_openvino(
    folder: Path,
    manifest: Manifest,
    texts: Sequence[Text],
    progress: Progress,
    wanted: Sequence[str],
) -> tuple[Manifest, list[Checked]]:
    """Add the targets of OpenVINO that suit this machine, and verify each.

    That is fp32, so that the folder runs on every machine, and bf16 if this CPU has it. Targets
    that the same version of OpenVINO verified before are left as they are, unless texts are given.

    Args:
        folder: the engines folder.
        manifest: its manifest. The one with the targets is returned, not written.
        texts: what the targets are compared on, besides the reference texts; may be empty.
        progress: called with (what, done, total).
        wanted: the names of the targets to add.

    Returns:
        The manifest with the targets that passed, and what was found of each new one.
    """
    if error := unavailable_reason(OPENVINO):
        return manifest, [Checked(OPENVINO, refused=error)]
    more = exact_logits(folder, manifest, texts) if texts else None
    versions = {OPENVINO: version_of(OPENVINO)}
    found = []
    for precision in ("fp32", *["bf16"] * has_bf16()):
        name = f"{OPENVINO}-{precision}"
        old = manifest.targets.get(name)
        is_there = old is not None and old.versions == versions and more is None
        if is_there or name not in wanted:
            continue
        target = Target(
            backend=OPENVINO,
            precision=precision,
            graph_precision="fp32",
            versions=versions,
            tolerance=None,
        )
        manifest, checked = check_target(folder, manifest, name, target, progress, more)
        found.append(checked)
    return manifest, found


def add_int8(
    folder: Path,
    manifest: Manifest,
    backends: Sequence[str],
    texts: Sequence[Text],
    progress: Progress,
) -> tuple[Manifest, list[Checked]]:
    """Quantize the graphs to `targets/cpu-int8/`, and add the targets that run them.

    Older graphs stay until `drop_unused_graphs`, which must follow in any case. If no target
    passes, older targets stay as well.

    Args:
        folder: the engines folder.
        manifest: its manifest. The one with the targets is returned, not written.
        backends: the libraries that are to run them. Those of older targets are among them, also
            if they cannot run here.
        texts: at least 32 texts like those that will be classified. Of the first 512, every other
            one gives the ranges. The result is compared with fp32 on the rest.
        progress: called with (what, done, total).

    Returns:
        The manifest with the targets that passed, and what was found of each.

    Raises:
        InputError: too few texts.
        VerificationError: a graph could not be quantized.
    """
    from .int8 import quantize, split_texts

    ranges, others = split_texts(texts)
    more = exact_logits(folder, manifest, [*others, *texts[len(ranges) + len(others) :]])
    quantized = quantize(folder, manifest, ranges, "smooth", progress)
    place, found, changed = folder / INT8_FOLDER, [], manifest
    place.mkdir(parents=True, exist_ok=True)
    files = {}
    with replacing(place) as temporary:
        for name, proto in quantized.items():
            sha256 = write_graph(temporary / name, "", proto).sha256
            # Another name for other content: the manifest of an older target stays true.
            file = f"{name}-{sha256[:8]}.onnx"
            (temporary / name).rename(temporary / file)
            files[name] = BuiltFile(
                file=f"{INT8_FOLDER}/{file}",
                sha256=sha256,
                onnx_sha256=manifest.graphs[name].sha256,
            )
    for backend in backends:
        name, runs = f"{backend}-{INT8}", unavailable_reason(backend) is None
        old = manifest.targets.get(name)
        if not runs and old is not None and old.files == files:
            continue  # an older target with the same graphs stays valid on other machines
        target = Target(
            backend=backend,
            precision=INT8,
            graph_precision="fp32",
            rest_precision=rest_precision() if backend == OPENVINO and runs else "",
            versions={backend: version_of(backend)} if runs else {},
            files=files,
            tolerance=None,
        )
        changed, checked = check_target(folder, changed, name, target, progress, more)
        found.append(checked)
    return (changed if any(checked.agreement for checked in found) else manifest), found


def drop_unused_graphs(folder: Path, manifest: Manifest) -> None:
    """Delete the int8 graphs for CPUs that no target runs any more.

    Args:
        folder: the engines folder.
        manifest: its manifest, which must be written already.
    """
    used = {folder / f.file for target in manifest.targets.values() for f in target.files.values()}
    place = folder / INT8_FOLDER
    for path in place.glob("*.onnx"):
        if path not in used:
            path.unlink()
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()


def with_fastest_default(
    folder: Path, manifest: Manifest, progress: Progress
) -> tuple[Manifest, str]:
    """Measure all targets for CPUs, and make the most exact of the fast ones the default target.

    Another target takes the place of a more exact one only if it is clearly faster. The default
    target stays if it was chosen by hand, if it has operating points that the fast target does not
    have, or if it is for a GPU.

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
    speeds = {name: float(np.median(_gains(seconds, name, names[0]))) for name in names}
    targets = dict(manifest.targets)
    for name, speed in speeds.items():
        targets[name] = msgspec.structs.replace(targets[name], relative_speed=round(speed, 3))
    points = {name: target.operating_points.keys() for name, target in targets.items()}
    before = manifest.default_target

    def inexactness(name: str) -> tuple[float, bool]:
        """All within the limit are as exact; of these, the default target comes first."""
        return max(manifest.targets[name].tolerance or 0.0, EXPORT_LIMIT), name != before

    order = sorted(names, key=inexactness)
    fastest = next(
        name
        for place, name in enumerate(order)
        if not any(_is_clearly_faster(_gains(seconds, each, name)) for each in order[place + 1 :])
    )
    other = before if before in speeds else names[0]
    faster = float(np.median(_gains(seconds, fastest, other)))
    why = f"{faster:.2f} times as fast as {other} here, at full depth"
    if manifest.default_is_fixed:
        chosen, why = before, "as chosen by hand"
    elif points[before] - points[fastest]:
        chosen, why = before, f"because it has operating points; {fastest} is {why}"
    elif before not in speeds:
        chosen, why = before, "which does not run on this CPU"
    elif fastest == before:
        chosen, why = before, "because no other target for CPUs is clearly faster here"
    else:
        chosen = fastest
    changed = msgspec.structs.replace(manifest, targets=targets, default_target=chosen)
    return changed, f"default target: {chosen}, {why}"


def _gains(seconds: Mapping[str, Times], name: str, other: str) -> Times:
    """How many times as fast a target is as another one, in each turn `[turns]`."""
    return np.asarray(np.exp(np.log(seconds[other] / seconds[name]).mean(axis=1)))


def _is_clearly_faster(gains: Times) -> bool:
    lost = np.count_nonzero(gains <= 1)
    return bool(np.median(gains) >= _LEAST_GAIN and lost <= _MOST_LOST_TURNS)


def _seconds(folder: Path, manifest: Manifest, names: Sequence[str]) -> dict[str, Times]:
    """For each target, seconds of all segments `[turns, shapes]`; the best run of each turn."""
    best = {name: np.full((_TURNS, len(_SHAPES)), np.inf) for name in names}
    with ExitStack() as stack:
        engines = [stack.enter_context(engine_of(folder, manifest, name)) for name in names]
        # In turns, so that a machine whose speed drifts treats all targets alike.
        for turn in range(_TURNS):
            for engine, own in zip(engines, best.values(), strict=True):
                for number, (rows, tokens) in enumerate(_SHAPES):
                    tokens = min(tokens, engine.limits.max_sequence)
                    time.sleep(_SPIN_SECONDS)
                    for _ in range(_RUNS):
                        seconds = sum(engine.time_exits(rows, tokens)[-len(manifest.segments) :])
                        own[turn, number] = min(own[turn, number], seconds)
    return best
