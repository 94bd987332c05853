"""The conditions that a manifest must satisfy beyond the types of its fields."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..manifest import ATTENTION_BIAS, LOGITS, NEXT, Manifest, Target, TensorSpec
from ..quick import quick_of

# The inputs that the runtime makes from a text; graphs must produce all others themselves.
_FIRST_INPUTS = frozenset({"input_ids", "token_type_ids", ATTENTION_BIAS})


def problems(manifest: Manifest) -> Iterator[str]:
    """The contradictions in a manifest. Stop at the first: later ones may be meaningless."""
    if manifest.first_stage is not None and not manifest.task.ranks:
        yield "it has the first stage of a ranking, but it classifies"
    if manifest.first_stage is not None and manifest.exit_0 is not None:
        yield "it has two exits before layer 1"
    yield from _tensor_problems(manifest)
    yield from _chain_problems(manifest)
    yield from _target_problems(manifest)
    labels = manifest.task.labels
    thresholds = manifest.task.label_thresholds
    if len(set(labels)) < len(labels):
        yield "two of its labels have the same name"
    if thresholds and len(thresholds) != len(labels):
        yield f"it has {len(thresholds)} label thresholds for {len(labels)} labels"


def _tensor_problems(manifest: Manifest) -> Iterator[str]:
    """Tensors that two graphs describe differently: they share the memory."""
    known: dict[str, TensorSpec] = {}
    for name, graph in manifest.graphs.items():
        for spec in (*graph.inputs, *graph.outputs):
            carried = spec.name.removeprefix(NEXT)
            first = known.setdefault(carried, spec)
            if (first.dtype, first.shape) != (spec.dtype, spec.shape):
                yield f"graph {name} has a different {carried!r} than the graphs before it"


def _chain_problems(manifest: Manifest) -> Iterator[str]:
    """Segments that cannot be run one after another."""
    available = set(_FIRST_INPUTS)
    layers = [segment.layer for segment in manifest.segments]
    if layers != sorted(set(layers)) or layers[-1] != manifest.model.layers:
        last = manifest.model.layers
        yield f"its exits are after layers {layers}, expected ascending ones up to {last}"
    for number, segment in enumerate(manifest.segments, start=1):
        outputs: dict[str, TensorSpec] = {}
        for call in segment.calls:
            graph = manifest.graphs.get(call)
            if graph is None:
                yield f"segment {number} calls graph {call!r}, which is not listed"
                continue
            missing = sorted({spec.name for spec in graph.inputs} - available)
            if missing:
                yield f"segment {number} needs {missing[0]!r}, which nothing before it produces"
            outputs |= {spec.name: spec for spec in graph.outputs}
            available |= {spec.name.removeprefix(NEXT) for spec in graph.outputs}
        labels = len(manifest.task.labels)
        if LOGITS not in outputs:
            yield f"segment {number} produces no {LOGITS}"
        elif outputs[LOGITS].shape != ("batch", labels):
            yield f"it names {labels} labels, but the heads give {list(outputs[LOGITS].shape)}"


def _is_alone(target: Target, point: str) -> bool:
    """Whether a target has a point of this name, without a quick pass."""
    points = target.operating_points
    return point in points and quick_of(points[point]) is None


def _target_problems(manifest: Manifest) -> Iterator[str]:
    if manifest.default_target not in manifest.targets:
        yield f"the default target {manifest.default_target!r} is not listed"
    for precision, graphs in manifest.precisions.items():
        if graphs.keys() != manifest.graphs.keys():
            yield f"its {precision} graphs do not have the names of the fp32 graphs"
    for name, target in manifest.targets.items():
        if not re.fullmatch(r"\w[\w.+-]*", name):  # it is part of the names of files
            yield f"{name!r} cannot be the name of a target"
        default = target.default_operating_point
        if default and default not in target.operating_points:
            yield f"the default operating point {default!r} of {name} is not listed"
        source = target.graph_precision or target.precision
        if source != "fp32" and source not in manifest.precisions:
            yield f"target {name} runs graphs in {source!r}, which are not listed"
        if target.files and target.files.keys() != manifest.graphs.keys():
            yield f"target {name} does not have one file for each graph"
        quick_targets = set()
        for title, point in target.operating_points.items():
            quick = quick_of(point)
            exits = len(manifest.exits)
            if quick is not None:
                exits += 1
                quick_targets.add(quick.target)
                other = manifest.targets.get(quick.target, target)
                if (other.backend, other.device) != (target.backend, target.device):
                    yield (
                        f"operating point {title!r} of target {name} has its quick pass in "
                        f"{quick.target}, expected a target of the same library and device"
                    )
                if quick.alone and not _is_alone(target, quick.alone):
                    yield (
                        f"operating point {title!r} of target {name} names no point without a "
                        f"quick pass, but {quick.alone!r}"
                    )
            if len(point.exits) != exits or not any(point.exits):
                yield (
                    f"operating point {title!r} of target {name} counts rows at its exits as "
                    f"{list(point.exits)}, expected {exits} counts that are not all 0"
                )
        if len(quick_targets) > 1 or name in quick_targets:
            yield (
                f"the quick passes of target {name} run in {', '.join(sorted(quick_targets))}, "
                "expected one other target for all of them"
            )
