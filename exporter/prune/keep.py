"""Write an engines folder that keeps some of the exits of another one. Needs no torch.

In every precision of the folder, the layers between two kept exits become one graph without the
heads in between. If layers share their weights (ALBERT), the graphs are copied unchanged and each
segment just calls fewer heads.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ... import __version__
from ...runtime.agreement import Agreement
from ...runtime.artifact.folder import sha256_of, verified, write_manifest
from ...runtime.artifact.manifest import (
    LOGITS,
    NEXT,
    REFERENCE_NAME,
    BuiltFile,
    Graph,
    Manifest,
    Segment,
    keep_targets,
    with_operating_points,
)
from ...runtime.artifact.reference import read_reference, write_reference
from ...runtime.engine import Engine
from ...runtime.errors import ModelError, Remedy
from ..onnx_file import load_graphs, write_graph
from ..targets.cpu import INT8_FOLDER, is_cpu_int8, verified_target
from ..verify import FP32_TARGET, check_chain, with_verification
from .merge import merge_graphs


def check_exits(exits: Sequence[int], count: int) -> None:
    """Refuse exits that a model does not have.

    Args:
        exits: numbers of the exits to keep, counted from 1.
        count: how many exits the model has.

    Raises:
        ModelError: the exits are not ascending numbers between 1 and `count`.
    """
    if not exits or list(exits) != sorted(set(exits)) or exits[0] < 1 or exits[-1] > count:
        raise ModelError(
            f"exits {','.join(map(str, exits))} do not fit a model with {count} exits",
            Remedy("give {exits} as ascending numbers between 1 and {count}", count=count),
        )


def keep_exits(
    source: Path, manifest: Manifest, exits: Sequence[int], folder: Path
) -> tuple[Manifest, Agreement]:
    """Write the folder, with those targets that run ONNX graphs, and verify it.

    Targets in int8 keep their ranges, and need no texts. One that cannot run here is left out.

    Args:
        source: the engines folder to copy from.
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
    calls = _calls(manifest, exits)
    every = [name for part in calls for name in part]
    is_shared = len(set(every)) < len(every)

    def write(old: dict[str, Graph], place: str) -> dict[str, Graph]:
        if not is_shared:
            return _merge(source, old, calls, place, folder)
        graphs = {name: old[name] for name in every}
        for graph in graphs.values():
            _copy(source, graph.file, graph.sha256, folder)
        return graphs

    graphs = write(manifest.graphs, "onnx/fp32")
    precisions = {name: write(old, f"onnx/{name}") for name, old in manifest.precisions.items()}
    segments = tuple(
        Segment(exit=number, layer=manifest.segments[old - 1].layer, calls=tuple(part))
        for number, (old, part) in enumerate(
            zip(exits, calls if is_shared else [[name] for name in graphs], strict=True), start=1
        )
    )
    _copy(source, manifest.tokenizer.file, manifest.tokenizer.sha256, folder)
    if manifest.exit_0 is not None:
        _copy(source, manifest.exit_0.file, manifest.exit_0.sha256, folder)
    texts, logits = read_reference(source, manifest)
    first = manifest.exits.start
    # Exit 0 is kept.
    logits = logits[[number - first for number in (*range(first, 1), *exits)]]
    write_reference(folder, texts, logits)
    targets = {
        name: with_operating_points(target, {}, "")
        for name, target in manifest.targets.items()
        if not target.files or is_cpu_int8(target)
    }
    # Targets for CPUs in int8 run the same graphs, which are merged like all others.
    built = next((target.files for target in targets.values() if target.files), {})
    old = {
        name: msgspec.structs.replace(manifest.graphs[name], file=file.file, sha256=file.sha256)
        for name, file in built.items()
    }
    files = {
        name: BuiltFile(file=graph.file, sha256=graph.sha256, onnx_sha256=graphs[name].sha256)
        for name, graph in (write(old, INT8_FOLDER) if old else {}).items()
    }
    for name, target in targets.items():
        if target.files:
            targets[name] = msgspec.structs.replace(target, files=files)
    kept = msgspec.structs.replace(
        keep_targets(manifest, lambda name, _: name in targets),
        fpabee_version=__version__,
        model=msgspec.structs.replace(manifest.model, layers=segments[-1].layer),
        graphs=graphs,
        precisions=precisions,
        segments=segments,
        targets=targets,
        files={REFERENCE_NAME: sha256_of(folder / REFERENCE_NAME)},
    )
    write_manifest(folder, kept)
    with Engine.load(folder, target=FP32_TARGET) as engine:
        agreement = check_chain(engine, texts, logits, graphs={})
    kept = with_verification(folder, kept, FP32_TARGET, agreement)
    for name, target in targets.items():
        if target.files:
            kept, _ = verified_target(folder, kept, name, target)
    if files and not any(target.files for target in kept.targets.values()):
        shutil.rmtree(folder / INT8_FOLDER)
    write_manifest(folder, kept)
    return kept, agreement


def _calls(manifest: Manifest, exits: Sequence[int]) -> list[list[str]]:
    """The graphs that run up to each kept exit, without the heads of dropped exits."""
    heads = {
        name
        for name, graph in manifest.graphs.items()
        if [spec.name for spec in graph.outputs] == [LOGITS]
    }
    calls, start = [], 0
    for number in exits:
        between, last = manifest.segments[start : number - 1], manifest.segments[number - 1]
        dropped = [name for segment in between for name in segment.calls if name not in heads]
        calls.append([*dropped, *last.calls])
        start = number
    return calls


def _merge(
    source: Path, old: dict[str, Graph], calls: Sequence[Sequence[str]], place: str, folder: Path
) -> dict[str, Graph]:
    """Write one graph for each list of calls, and give their records by name."""
    merged = {}
    for number, part in enumerate(calls, start=1):
        later = {s.name for names in calls[number:] for name in names for s in old[name].inputs}
        specs = {s.name: s for name in part for s in (*old[name].inputs, *old[name].outputs)}
        leaving = [
            name
            for name in dict.fromkeys(s.name for call in part for s in old[call].outputs)
            if name != LOGITS and name.removeprefix(NEXT) in later
        ]
        protos = load_graphs(source, {name: old[name] for name in part})
        proto = merge_graphs([(name, protos[name]) for name in part], [*leaving, LOGITS])
        name = f"segment_{number:02d}"
        file = f"{place}/{name}.onnx"
        merged[name] = write_graph(
            folder / file,
            file,
            proto,
            [specs[value.name] for value in proto.graph.input],
            [specs[value.name] for value in proto.graph.output],
        )
    return merged


def _copy(source: Path, relative: str, sha256: str, folder: Path) -> None:
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(verified(source, relative, sha256), path)
