"""Join graphs that run one after another into one ONNX graph. Needs no torch.

When exits are dropped, the layers between two kept exits become one graph. Benchmarks keep only the
last exit, and compare the chain with this one graph of the whole model. `onnx.compose` is not used,
because it refuses two graphs that read the same input, and cannot store weights once that several
graphs share (ALBERT).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ...runtime.artifact.manifest import NEXT
from ..onnx_file import prune


def merge_graphs(calls: Sequence[tuple[str, Any]], outputs: Collection[str]) -> Any:
    """One graph that does what several graphs do one after another.

    Args:
        calls: name and `onnx.ModelProto` of each graph, in order. The weights of a graph that is
            called twice are stored once.
        outputs: the outputs of the new graph: `LOGITS`, or `NEXT` and the name of a carried
            tensor.

    Returns:
        An `onnx.ModelProto`. Nodes that no output needs, such as the heads before the last, are
        left out. A node keeps its name, with the number of the call appended.
    """
    import onnx

    merged = onnx.GraphProto(name="merged")
    made: dict[str, Any] = {}
    tensors: dict[str, str] = {}
    for number, (name, proto) in enumerate(calls):
        _append(merged, proto.graph, name, f".{number:02d}", tensors, made)
    prune(merged, {tensors[output.removeprefix(NEXT)] for output in outputs})
    for output in outputs:
        carried = output.removeprefix(NEXT)
        _rename(merged, tensors[carried], output)
        merged.output.add().CopyFrom(made[carried])
        merged.output[-1].name = output
    first = calls[0][1]
    return onnx.helper.make_model(
        merged, opset_imports=list(first.opset_import), ir_version=first.ir_version
    )


def _append(
    merged: Any, graph: Any, name: str, suffix: str, tensors: dict[str, str], made: dict[str, Any]
) -> None:
    """Add one call.

    Args:
        merged: the graph to add to.
        graph: the graph that is called.
        name: its name, which becomes a prefix of its weights.
        suffix: what is appended to the names of its nodes and values.
        tensors: the current names of the carried tensors and the logits; updated.
        made: the type and shape of each of these tensors, from the graph that wrote it; updated.
    """
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
        copy.name = node.name + suffix
        del copy.input[:], copy.output[:]
        copy.input.extend(rename.get(x, x + suffix) if x else "" for x in node.input)
        copy.output.extend(rename.get(x, x + suffix) if x else "" for x in node.output)
    for value in graph.value_info:
        copy = merged.value_info.add()
        copy.CopyFrom(value)
        copy.name = rename.get(value.name, value.name + suffix)
    for value in graph.output:
        carried = value.name.removeprefix(NEXT)
        tensors[carried] = rename.get(value.name, value.name + suffix)
        made[carried] = value
        copy = merged.value_info.add()  # the type is needed if a later conversion lowers it
        copy.CopyFrom(value)
        copy.name = tensors[carried]


def _rename(graph: Any, old: str, new: str) -> None:
    """Rename a value wherever it is used, and remove the note of its type."""
    for node in graph.node:
        for names in (node.input, node.output):
            for number, name in enumerate(names):
                if name == old:
                    names[number] = new
    kept = [value for value in graph.value_info if value.name != old]
    del graph.value_info[:]
    graph.value_info.extend(kept)
