"""Graphs in 16-bit floats: choose the nodes that compute in them, write the graph, emulate it.

TensorRT networks are strongly typed: a graph runs in the precision it is written in. Matrix
products are written in fp16 or bf16. Normalisation, softmax and the exit heads stay in fp32,
because 16 bits would cost them range or accuracy.

`lower` writes such a graph. `emulate` writes an fp32 graph that rounds after every node as the
lowered graph would. Running the lowered graph on a CPU would prove nothing, because ONNX Runtime
computes it in fp32.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...runtime.artifact.manifest import LOGITS, NEXT
from ...runtime.errors import ModelError, Remedy
from .formats import Half, in_head

_FP32_OPS = frozenset({"LayerNormalization", "Softmax", "ReduceMean", "Pow", "Sqrt", "Log", "Exp"})
_PRODUCTS = frozenset({"MatMul", "Gemm"})
# These only pass on or inspect a value, so they accept it in any precision.
_ANY_OPS = frozenset({"Shape", "Size", "Identity"})
_ONNX_TYPE = {Half.FP16: TensorProto.FLOAT16, Half.BF16: TensorProto.BFLOAT16}
_FP32_TENSORS = ("token_weights", LOGITS)

ABS_MAX = "abs_max/"
"""An output of an emulation with this prefix is the largest |x| in a node's output."""


@dataclass(frozen=True)
class Lowering:
    """The part of a graph that is in 16-bit floats; by default, nothing.

    Attributes:
        nodes: names of the nodes that compute in them.
        tensors: names of the graph inputs and outputs that are in them.
    """

    nodes: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LoweredGraphs:
    """The graphs of a chain, and what is lowered in them.

    Attributes:
        protos: the fp32 graphs by name, each an `onnx.ModelProto`.
        half: the format that they are lowered to.
        lowerings: what is lowered, by graph; graphs without an entry stay in fp32.
    """

    protos: dict[str, Any]
    half: Half
    lowerings: dict[str, Lowering] = field(default_factory=dict)

    def lowering(self, graph: str) -> Lowering:
        """What is lowered in a graph."""
        return self.lowerings.get(graph, Lowering())


def choose_lowering(
    proto: Any, keep: Collection[str] = (), head_products: bool = False
) -> Lowering:
    """Choose which parts of an fp32 graph are lowered.

    Args:
        proto: the graph, an `onnx.ModelProto`.
        keep: names of more nodes, inputs and outputs that stay in fp32. A carried tensor is named
            without its prefix: `hidden_states` also keeps `next_hidden_states`.
        head_products: also lower the matrix products of exit heads, as plans for compute
            capability 7.5 do.
    """
    floats = _float_values(proto)
    nodes = frozenset(
        node.name
        for node in proto.graph.node
        if node.op_type not in _FP32_OPS | _ANY_OPS
        and (not in_head(node.name) or (head_products and node.op_type in _PRODUCTS))
        and node.name not in keep
        and floats.intersection((*node.input, *node.output))
    )
    fixed = {*_FP32_TENSORS, *keep}
    tensors = frozenset(
        value.name
        for value in (*proto.graph.input, *proto.graph.output)
        if value.name in floats and value.name.removeprefix(NEXT) not in fixed
    )
    return Lowering(nodes, tensors)


def lower(proto: Any, half: Half, lowering: Lowering, check: bool = True) -> Any:
    """A copy of the graph with the chosen nodes and tensors in 16-bit floats.

    Args:
        proto: the fp32 graph; it is not changed.
        half: the format.
        lowering: what to lower, see `choose_lowering`.
        check: whether to refuse weights that do not fit the format; otherwise they are infinite.

    Raises:
        ModelError: a weight does not fit the format.
    """
    floats = _float_values(proto)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(tensor for name, tensor in weights.items() if name not in floats)
    for value in (*graph.input, *graph.output):
        if value.name in lowering.tensors:
            value.type.tensor_type.elem_type = _ONNX_TYPE[half]
    ends = {value.name for value in graph.output}
    # Whether each value that was made so far is in 16-bit floats, and its copies in the other type.
    is_low = {value.name: value.name in lowering.tensors for value in graph.input}
    copies: dict[tuple[str, bool], str] = {}

    def in_precision(name: str, low: bool) -> str:
        """The name of a value in a precision; a weight is stored in it, other values are cast."""
        if name not in floats or (name not in weights and is_low[name] == low):
            return name
        if (name, low) not in copies:
            copies[name, low] = _in_type(name, half, low)
            if name not in weights:
                graph.node.append(_cast(name, copies[name, low], half if low else None))
            elif low:
                graph.initializer.append(_lowered(weights[name], half, check))
                graph.initializer[-1].name = copies[name, low]
            else:
                copies[name, low] = name
                graph.initializer.append(weights[name])
        return copies[name, low]

    for original in proto.graph.node:
        if original.op_type in _ANY_OPS:
            low = any(is_low.get(name, False) for name in original.input)
            inputs = [in_precision(n, low) if n in weights else n for n in original.input]
        else:
            low = original.name in lowering.nodes
            inputs = [in_precision(name, low) for name in original.input]
        node = graph.node.add()
        node.CopyFrom(original)
        node.input[:] = inputs
        if low:
            _lower_attributes(node, half, check)
        for number, name in enumerate(original.output):
            if name not in floats:
                continue
            is_low[name] = low
            if name in ends and low != (name in lowering.tensors):
                # The graph gives it in the other type.
                node.output[number] = copies[name, low] = _in_type(name, half, low)
                graph.node.append(_cast(node.output[number], name, None if low else half))
                is_low[name] = not low
    return result


def emulate(proto: Any, half: Half, lowering: Lowering) -> Any:
    """An fp32 graph that rounds wherever the lowered graph computes in 16-bit floats.

    It has the inputs and outputs of the fp32 graph, in fp32. For every node with a float output it
    has one more output, `ABS_MAX` and the node's name: the largest |x| before rounding. It must be
    run without graph optimisation, which would remove the rounding.

    Args:
        proto: the fp32 graph; it is not changed.
        half: the format.
        lowering: what is lowered, see `choose_lowering`.
    """
    floats = _float_values(proto)
    originals = {node.name: node for node in proto.graph.node}
    lowered = lower(proto, half, lowering, check=False)
    result = onnx.ModelProto()
    result.CopyFrom(lowered)
    graph = result.graph
    del graph.node[:]
    for value in (*graph.input, *graph.output):
        if value.name in lowering.tensors:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type == _ONNX_TYPE[half]:
            exact = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(exact, tensor.name))
    for node in lowered.graph.node:
        original = originals.get(node.name)
        if original is None:  # a cast that `lower` added
            if node.attribute[0].i != TensorProto.FLOAT:
                _round(graph, node.input[0], node.output[0], half)
            else:
                graph.node.append(node)
            continue
        copy = graph.node.add()
        copy.CopyFrom(node)
        del copy.attribute[:]
        copy.attribute.extend(original.attribute)
        outputs = [n for n, name in enumerate(original.output) if name in floats]
        if node.name in lowering.nodes:
            for number in outputs:
                copy.output[number] += "/exact"
                _round(graph, copy.output[number], node.output[number], half)
        if outputs:
            name, value = ABS_MAX + node.name, copy.output[outputs[0]]
            graph.node.append(helper.make_node("Abs", [value], [f"{name}/abs"]))
            graph.node.append(helper.make_node("ReduceMax", [f"{name}/abs"], [name], keepdims=0))
            graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
    onnx.checker.check_model(result)
    return result


def largest_weight(tensor: Any) -> float:
    """The largest |x| of an initializer."""
    return float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))


def _float_values(proto: Any) -> set[str]:
    graph = proto.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return floats | {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}


def _in_type(name: str, half: Half, low: bool) -> str:
    """What a copy of a value is called."""
    return f"{name}/{half.value if low else 'fp32'}"


def _cast(source: str, target: str, half: Half | None) -> Any:
    """A cast to 16-bit floats; None: to fp32."""
    onnx_type = TensorProto.FLOAT if half is None else _ONNX_TYPE[half]
    return helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=onnx_type)


def _round(graph: Any, source: str, target: str, half: Half) -> None:
    """Add nodes that round a value to the format and give it in fp32."""
    graph.node.append(_cast(source, f"{target}/rounded", half))
    graph.node.append(_cast(f"{target}/rounded", target, None))


def _lowered(tensor: Any, half: Half, check: bool) -> Any:
    """A tensor of the same name, converted to the format."""
    largest = largest_weight(tensor)
    if check and largest > half.largest:
        raise ModelError(
            f"weight {tensor.name} holds {largest:.3g}, more than {half.value} can represent "
            f"({half.largest:.5g})",
            Remedy(
                "{other}keep the nodes that use it in fp32: {keep_fp32} auto",
                other="use bf16, or " if half is Half.FP16 else "",
            ),
        )
    dtype = helper.tensor_dtype_to_np_dtype(_ONNX_TYPE[half])
    with np.errstate(over="ignore"):
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name)


def _lower_attributes(node: Any, half: Half, check: bool) -> None:
    """Change the output type of a Cast or Constant node to 16 bits."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = _ONNX_TYPE[half]
        if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_lowered(attribute.t, half, check))
