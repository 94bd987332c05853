"""Join graphs that run one after another into one ONNX graph. Needs no torch.

When exits are dropped, the layers between two kept exits become one graph. Benchmarks keep only the
last exit, and compare the chain with this one graph of the whole model. The function
`merge_graphs` of `onnx.compose` refuses two graphs that read the same input.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ...runtime.artifact.manifest import NEXT


def merge_graphs(calls: Sequence[tuple[str, Any]], outputs: Collection[str]) -> Any:
    """One graph that does what several graphs do one after another.

    Args:
        calls: name and `onnx.ModelProto` of each graph, in order; all names differ.
        outputs: the outputs of the new graph: `LOGITS`, or `NEXT` and the name of a carried
            tensor.

    Returns:
        An `onnx.ModelProto`. Nodes that no output needs, such as the heads before the last, are
        left out. A node keeps its name, with the number of the call appended.
    """
    import onnx

    merged = onnx.GraphProto(name="merged")
    last = {value.name: name for name, proto in calls for value in proto.graph.output}
    # What the tensors that are carried from graph to graph are called in the new graph.
    carried: dict[str, str] = {}
    for number, (name, proto) in enumerate(calls):
        graph, prefix = proto.graph, f"{name}/"
        new = [value for value in graph.input if value.name not in carried]
        carried |= {value.name: value.name for value in new}
        kept = {x.name for x in graph.output if x.name in outputs and last[x.name] == name}
        names = {value: prefix + value for node in graph.node for value in node.output if value}
        names |= {value.name: carried[value.name] for value in graph.input}
        names |= {value: value for value in kept}
        part = onnx.compose.add_prefix_graph(
            graph,
            prefix,
            rename_nodes=False,
            rename_edges=False,
            rename_inputs=False,
            rename_outputs=False,
            rename_value_infos=False,
            name_map=names,
        )
        for node in part.node:
            node.name += f".{number:02d}"
        for before, after in zip(graph.output, part.output, strict=True):
            carried[before.name.removeprefix(NEXT)] = after.name
            # The type of a tensor between two graphs is needed if a later conversion lowers it.
            (merged.output if before.name in kept else merged.value_info).append(after)
        merged.input.extend(new)
        merged.node.extend(part.node)
        merged.initializer.extend(part.initializer)
        merged.value_info.extend(part.value_info)
    first = calls[0][1]
    model = onnx.helper.make_model(
        merged, opset_imports=first.opset_import, ir_version=first.ir_version
    )
    return onnx.utils.Extractor(model).extract_model([x.name for x in merged.input], [*outputs])
