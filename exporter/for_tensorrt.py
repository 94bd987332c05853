"""Graphs that the parser of every version of TensorRT from 10.0 on reads as they are meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx

if TYPE_CHECKING:
    import onnx_ir as ir

# What takes the place of nodes that TensorRT runs slowly, or does not list for int64. The types of
# `Cast` are numbers of `onnx.TensorProto`: float32 and int64.
_REPLACEMENTS = {
    # A product with a triangle of ones. In float32 it is exact, but in bf16 it would not be.
    "CumSum": """
sum_along_rows (int64[batch, sequence] numbers, int64 axis) => (int64[batch, sequence] sums) {
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first_axis = Constant <value_ints = [0]> ()
    second_axis = Constant <value_ints = [1]> ()
    shape = Shape (numbers)
    length = Gather (shape, one)
    places = Range (zero, length, one)
    summed = Unsqueeze (places, second_axis)
    end = Unsqueeze (places, first_axis)
    is_summed = LessOrEqual (summed, end)
    triangle = Cast <to = 1> (is_summed)
    factors = Cast <to = 1> (numbers)
    product = MatMul (factors, triangle)
    sums = Cast <to = 7> (product)
}
""",
    "Clip": """
clip (int64[n] numbers, int64 low, int64 high) => (int64[n] clipped) {
    raised = Max (numbers, low)
    clipped = Min (raised, high)
}
""",
}


def fit_tensorrt(graph: Any) -> None:
    """Replace operators on int64 that TensorRT does not list, in graphs for GPUs.

    One of them is `CumSum`, which TensorRT before 10.8 also runs as a loop on the device.

    Args:
        graph: an `onnx.GraphProto`. Its sums are of `[batch, sequence]` along a row.
    """
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    nodes = []
    for node in graph.node:
        # Graphs in fp16 do not say; only these nodes of theirs compute with integers.
        type_of_result = types.get(node.output[0], onnx.TensorProto.INT64)
        is_replaced = node.op_type in _REPLACEMENTS and type_of_result == onnx.TensorProto.INT64
        nodes += _replacement(node) if is_replaced else [node]
    del graph.node[:]
    graph.node.extend(nodes)


def _replacement(node: Any) -> list[Any]:
    """The nodes that take the place of a node, see `_REPLACEMENTS`."""
    part = onnx.parser.parse_graph(_REPLACEMENTS[node.op_type])
    inputs = [value.name for value in part.input]
    if len(inputs) != len([*filter(None, node.input)]):  # a bound is left out
        return [node]
    result = node.output[0]
    outside = dict(zip(inputs, node.input, strict=True)) | {part.output[0].name: result}
    for each in part.node:
        for names in (each.input, each.output):
            names[:] = [outside.get(name, f"{result}/{name}") for name in names]
        each.name = each.output[0]
    return [*part.node]


def share_weights(graph: ir.Graph, prefix: str) -> None:
    """Let several branches read a weight of a graph as a tensor of the graph.

    TensorRT makes a constant where a weight is first read. If that is in a branch, others cannot
    read it. Integers, such as shapes, stay weights, because the parser wants to know them.

    Args:
        graph: the graph.
        prefix: what the names of these weights begin with.
    """
    import onnx_ir as ir

    for weight in [*graph.initializers.values()]:
        is_number = weight.dtype is not None and weight.dtype.is_floating_point()
        if is_number and str(weight.name).startswith(prefix):
            uses = [*weight.uses()]
            # Not the name of the tensor, or parsers would take the node for one of a branch.
            node = ir.node("Identity", [weight], name=f"share/{weight.name}")
            graph.append(node)
            _describe(node.outputs[0], f"{weight.name}/shared", weight)
            for user, place in uses:
                user.replace_input_with(place, node.outputs[0])


def read_by_identity(branch: ir.Graph) -> None:
    """Let a branch read each tensor from outside through an `Identity` of its own.

    TensorRT runs a branch only if it is taken where the parser knows which layers read tensors
    from outside. Up to 10.5 it asks whether the name of such a tensor begins that of the layer
    (`findLayer` in `ConditionalHelpers.cpp` of onnx-tensorrt, repaired in 10.6). If it finds none,
    every branch runs. Weights are none of these tensors.

    Args:
        branch: a branch whose nodes and tensors have their final names.
    """
    import onnx_ir as ir

    nodes = [*branch]
    inside = {value for node in nodes for value in node.outputs}
    outside = {
        value: None  # in the order of their use
        for node in nodes
        for value in node.inputs
        if value is not None and value not in inside and not value.is_initializer()
    }
    for value in outside:
        name = f"{value.name}/into/{branch.name}"
        reader = ir.node("Identity", [value], name=name)
        copy = reader.outputs[0]
        _describe(copy, name, value)
        for node in nodes:
            for place, read in enumerate(node.inputs):
                if read is value:
                    node.replace_input_with(place, copy)
        branch.insert_before(nodes[0], reader)


def _describe(value: ir.Value, name: str, original: ir.Value) -> None:
    """Give a copy of a value its name, and type and shape of the original."""
    value.name = name
    value.type = original.type
    value.shape = original.shape
