"""Join graphs that run one after another into one ONNX graph. Needs no torch.

`bench.py` and `gpu_check.py` compare the chain with one graph of the whole model.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from fpabee.exporter.onnx_file import graphs_of, load_graphs, write_graph
from fpabee.exporter.single_file.graph import append
from fpabee.exporter.targets.builders import INT8_FOLDER
from fpabee.exporter.targets.check import FP32_TARGET
from fpabee.runtime.artifact.folder import EnginesFolder, sha256_of
from fpabee.runtime.artifact.manifest import (
    CLASSIFIER_NAME,
    LOGITS,
    REFERENCE_NAME,
    BuiltFile,
    Graph,
    Manifest,
    Target,
    with_operating_points,
)
from fpabee.runtime.artifact.reference import read_reference, write_reference
from fpabee.runtime.engine import Engine
from fpabee.runtime.rules.rules import Budget


def merge_graphs(calls: Sequence[tuple[str, Any]]) -> Any:
    """One graph that does what several graphs do one after another, and gives the last logits.

    Args:
        calls: name and `onnx.ModelProto` of each graph, in order; all names differ. Weights get
            other names in them as well.

    Returns:
        An `onnx.ModelProto`. Nodes that no output needs, such as the heads before the last, are
        left out. A node keeps its name, with the number of the call appended.
    """
    models = [ir.from_proto(proto) for _, proto in calls]
    merged = ir.Graph([], [], nodes=[], opset_imports=models[0].opset_imports, name="merged")
    # What the tensors that are carried from graph to graph are in the new graph.
    carried: dict[str, ir.Value] = {}
    for number, ((name, _), model) in enumerate(zip(calls, models, strict=True)):
        for value in model.graph.inputs:
            if (key := str(value.name)) not in carried:
                carried[key] = ir.Value(name=key, type=value.type, shape=value.shape)
                merged.inputs.append(carried[key])
        for node in model.graph:
            node.name = f"{node.name}.{number:02d}"
        carried |= append(merged, model.graph, carried, f"{name}/")
    carried[LOGITS].name = LOGITS
    merged.outputs.append(carried[LOGITS])
    whole = ir.Model(merged, ir_version=models[0].ir_version)
    RemoveUnusedNodesPass()(whole)
    return ir.to_proto(whole)


def write_one_graph(source: Path, folder: Path) -> Manifest:
    """Write an engines folder whose only segment runs all layers and gives the last exit.

    It has the targets that run ONNX graphs, but no operating points and no exit 0. If layers share
    their weights (ALBERT), the graphs are copied unchanged, and the segment calls all but the other
    heads.

    Args:
        source: the engines folder to copy from.
        folder: an empty folder to write.

    Returns:
        The manifest of the new folder.

    Raises:
        ArtifactError: the source is damaged.
        CheckError: the graph does not reproduce the PyTorch model.
    """
    engines = EnginesFolder.read(source)
    manifest = engines.manifest
    last = manifest.segments[-1]

    def is_needed(name: str) -> bool:
        only_head = [spec.name for spec in manifest.graphs[name].outputs] == [LOGITS]
        return name in last.calls or not only_head

    calls = [name for part in manifest.segments for name in part.calls if is_needed(name)]

    def copy(relative: str, sha256: str) -> None:
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(engines.file(relative, sha256), path)

    def write(old: dict[str, Graph], place: str) -> dict[str, Graph]:
        if manifest.model.shared_layers:
            graphs = {name: old[name] for name in calls}
            for graph in graphs.values():
                copy(graph.file, graph.sha256)
            return graphs
        protos = load_graphs(engines, old)
        proto = merge_graphs([(name, protos[name]) for name in calls])
        file = f"{place}/segment_01.onnx"
        return {"segment_01": write_graph(folder / file, file, proto)}

    int8 = next((target for target in manifest.targets.values() if _is_int8(target)), None)
    # Targets for CPUs in int8 run graphs of their own, which are merged like all others.
    graphs = write(manifest.graphs, "onnx/fp32")
    precisions = {name: write(old, f"onnx/{name}") for name, old in manifest.precisions.items()}
    files = {
        name: BuiltFile(file=graph.file, sha256=graph.sha256, onnx_sha256=graphs[name].sha256)
        for name, graph in (write(graphs_of(manifest, int8), INT8_FOLDER) if int8 else {}).items()
    }
    targets = {
        name: msgspec.structs.replace(
            with_operating_points(target, {}, ""), files=files if target.files else {}
        )
        for name, target in manifest.targets.items()
        if not target.files or _is_int8(target)
    }
    segment = msgspec.structs.replace(
        last, calls=tuple(calls if manifest.model.shared_layers else graphs)
    )
    copy(manifest.tokenizer.file, manifest.tokenizer.sha256)
    copy(CLASSIFIER_NAME, manifest.files[CLASSIFIER_NAME])
    texts, logits = read_reference(engines)
    write_reference(folder, texts, logits[-1:])
    kept = engines.keep_targets(lambda name, _: name in targets)
    whole = EnginesFolder(folder, kept.manifest).with_manifest(
        graphs=graphs,
        precisions=precisions,
        segments=(segment,),
        targets=targets,
        default_rule=Budget(exit=1).to_dict(),
        exit_0=None,
        files={name: sha256_of(folder / name) for name in (REFERENCE_NAME, CLASSIFIER_NAME)},
    )
    whole.write()
    with Engine.load(folder, FP32_TARGET) as engine:
        engine.check()
    return whole.manifest


def _is_int8(target: Target) -> bool:
    return target.precision.startswith("int8")
