"""Join a chain of segments into one ONNX graph: the baseline that the chain is held against.

Torch-free. Shared blocks (ALBERT) keep one copy of their weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runtime.manifest import LOGITS, NEXT, Manifest, verified


def merge_chain(folder: Path, manifest: Manifest) -> Any:
    """One `onnx.ModelProto` from token ids to the logits of the last exit, no other heads.

    Args:
        folder: the engines folder.
        manifest: its manifest.
    """
    import onnx

    parts = {
        name: onnx.load(verified(folder, graph.file, graph.sha256))
        for name, graph in manifest.graphs.items()
    }
    calls = [name for segment in manifest.segments for name in segment.calls]
    merged = onnx.GraphProto(name="full_graph")
    tensors: dict[str, str] = {}
    for number, name in enumerate(calls):
        _append(merged, parts[name].graph, name, f"{number:02d}_", tensors)
    _prune(merged, tensors[LOGITS])
    last = next(v for v in parts[calls[-1]].graph.output if v.name == LOGITS)
    output = merged.output.add()
    output.CopyFrom(last)
    output.name = tensors[LOGITS]
    first = parts[calls[0]]
    return onnx.helper.make_model(
        merged, opset_imports=list(first.opset_import), ir_version=first.ir_version
    )


def _append(merged: Any, graph: Any, name: str, prefix: str, tensors: dict[str, str]) -> None:
    """Add one call: `tensors` says what the carried tensors are called so far."""
    rename = {tensor.name: f"{name}/{tensor.name}" for tensor in graph.initializer}
    for value in graph.input:
        if value.name not in tensors:
            merged.input.add().CopyFrom(value)
            tensors[value.name] = value.name
        rename[value.name] = tensors[value.name]
    stored = {tensor.name for tensor in merged.initializer}
    for tensor in graph.initializer:
        if rename[tensor.name] not in stored:
            copy = merged.initializer.add()
            copy.CopyFrom(tensor)
            copy.name = rename[tensor.name]
    for node in graph.node:
        copy = merged.node.add()
        copy.CopyFrom(node)
        copy.name = prefix + node.name
        del copy.input[:], copy.output[:]
        copy.input.extend(rename.get(x, prefix + x) if x else "" for x in node.input)
        copy.output.extend(rename.get(x, prefix + x) if x else "" for x in node.output)
    for value in graph.output:
        tensors[value.name.removeprefix(NEXT)] = rename.get(value.name, prefix + value.name)


def _prune(graph: Any, output: str) -> None:
    """Drop nodes and initializers that the output does not need: the other heads."""
    needed = {output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    kept.reverse()
    initializers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(initializers)
