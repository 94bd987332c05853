"""Write an engines folder that keeps some exits of another one. Torch-free.

The layers between two kept exits become one segment without the heads in between, in every
precision that the folder has. Where layers share their weights (ALBERT), graphs stay as
they are and the segments call fewer heads.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ... import __version__
from ...runtime.agreement import Agreement
from ...runtime.artifact.folder import sha256_of, verified, verified_graph, write_manifest
from ...runtime.artifact.manifest import (
    LOGITS,
    NEXT,
    REFERENCE_NAME,
    Graph,
    Manifest,
    Segment,
    TensorSpec,
)
from ...runtime.artifact.reference import read_reference, write_reference
from ...runtime.engine import Engine
from ...runtime.errors import ModelError
from ..onnx_file import serialized
from ..verify import FP32_TARGET, check_chain, with_verification
from .merge import merge_graphs


def check_exits(exits: Sequence[int], count: int) -> None:
    """Refuse exits that a model does not have.

    Raises:
        ModelError: not ascending numbers between 1 and `count`.
    """
    if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] > count:
        raise ModelError(
            f"--exits {','.join(map(str, exits))} does not fit a model with {count} exits",
            f"give ascending exit numbers between 1 and {count}",
        )


def keep_exits(
    source: Path, manifest: Manifest, exits: Sequence[int], folder: Path
) -> tuple[Manifest, Agreement]:
    """Write the folder, with the targets that run ONNX graphs as they are, and verify it.

    Args:
        source: the engines folder to take from.
        manifest: its manifest.
        exits: the exits to keep, counted from 1, ascending.
        folder: an empty folder to write.

    Returns:
        The manifest of the new folder, without operating points, and its agreement with the
        PyTorch model.

    Raises:
        ModelError: exits that the source does not have.
        ArtifactError: the source is damaged.
        VerificationError: the new chain does not reproduce the PyTorch model.
    """
    check_exits(exits, len(manifest.segments))
    joined = _joined(manifest, exits)
    graphs, precisions = {}, {}
    for precision in ("fp32", *manifest.precisions):
        written = _write_graphs(source, manifest.graphs_in(precision), joined, precision, folder)
        if precision == "fp32":
            graphs = written
        else:
            precisions[precision] = written
    _copy(source, manifest.tokenizer.file, manifest.tokenizer.sha256, folder)
    texts, logits = read_reference(source, manifest)
    logits = logits[[number - 1 for number in exits]]
    write_reference(folder, texts, logits)
    targets = {
        name: msgspec.structs.replace(target, operating_points={}, default_operating_point="")
        for name, target in manifest.targets.items()
        if not target.files
    }
    default = manifest.default_target
    kept = msgspec.structs.replace(
        manifest,
        fpabee_version=__version__,
        model=msgspec.structs.replace(manifest.model, layers=joined[-1].segment.layer),
        graphs=graphs,
        precisions=precisions,
        segments=tuple(part.segment for part in joined),
        targets=targets,
        default_target=default if default in targets else next(iter(targets)),
        verification=None,
        files={REFERENCE_NAME: sha256_of(folder / REFERENCE_NAME)},
    )
    write_manifest(folder, kept)
    with Engine.load(folder, target=FP32_TARGET) as engine:
        agreement = check_chain(engine, texts, logits, graphs={})
    kept = with_verification(folder, kept, FP32_TARGET, agreement)
    write_manifest(folder, kept)
    return kept, agreement


@dataclass(frozen=True)
class _Joined:
    """A segment of the new folder.

    Attributes:
        segment: its record.
        merged: the graphs of the old folder that become one; empty: calls stay as they are.
        outputs: what leaves the merged graph.
    """

    segment: Segment
    merged: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def _joined(manifest: Manifest, exits: Sequence[int]) -> list[_Joined]:
    """The segments up to each kept exit."""
    parts: list[list[str]] = []
    start = 0
    for number in exits:
        between, end = manifest.segments[start : number - 1], manifest.segments[number - 1]
        calls = [call for segment in between for call in segment.calls]
        parts.append([call for call in calls if not _is_head(manifest.graphs[call])])
        parts[-1] += end.calls
        start = number
    shared = max(Counter(call for part in parts for call in part).values()) > 1
    joined = []
    for number, (exit_, calls) in enumerate(zip(exits, parts, strict=True), start=1):
        layer = manifest.segments[exit_ - 1].layer
        if shared:
            joined.append(_Joined(Segment(exit=number, layer=layer, calls=tuple(calls))))
            continue
        later = {
            spec.name
            for part in parts[number:]
            for call in part
            for spec in manifest.graphs[call].inputs
        }
        made = dict.fromkeys(s.name for call in calls for s in manifest.graphs[call].outputs)
        outputs = [name for name in made if name != LOGITS and name.removeprefix(NEXT) in later]
        segment = Segment(exit=number, layer=layer, calls=(f"segment_{number:02d}",))
        joined.append(_Joined(segment, tuple(calls), (*outputs, LOGITS)))
    return joined


def _is_head(graph: Graph) -> bool:
    return [spec.name for spec in graph.outputs] == [LOGITS]


def _write_graphs(
    source: Path, old: dict[str, Graph], joined: Sequence[_Joined], precision: str, folder: Path
) -> dict[str, Graph]:
    """The graphs of one precision, by name."""
    import onnx

    place = folder / "onnx" / precision
    place.mkdir(parents=True)
    graphs: dict[str, Graph] = {}
    for part in joined:
        if not part.merged:
            for name in part.segment.calls:
                graphs[name] = old[name]
            continue
        (name,) = part.segment.calls
        path = place / f"{name}.onnx"
        protos = [
            (n, onnx.load(verified_graph(source, old[n].file, old[n].sha256))) for n in part.merged
        ]
        proto = merge_graphs(protos, part.outputs)
        path.write_bytes(serialized(proto, path.name))
        specs = {s.name: s for n in part.merged for s in (*old[n].inputs, *old[n].outputs)}
        graphs[name] = Graph(
            file=path.relative_to(folder).as_posix(),
            sha256=sha256_of(path),
            inputs=_specs(specs, proto.graph.input),
            outputs=_specs(specs, proto.graph.output),
        )
    for graph in graphs.values():
        if not (folder / graph.file).exists():
            _copy(source, graph.file, graph.sha256, folder)
    return graphs


def _specs(known: dict[str, TensorSpec], values: Any) -> tuple[TensorSpec, ...]:
    return tuple(known[value.name] for value in values)


def _copy(source: Path, relative: str, sha256: str, folder: Path) -> None:
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(verified(source, relative, sha256), path)
