"""Half precision in the graph: which nodes compute in it, the graph itself, its emulation.

TensorRT's networks are strongly typed: a graph runs in the precision it is written in. The
matrix products are written in fp16 or bf16; normalisation, softmax and the exit heads stay
in fp32, where range or accuracy would suffer.

`lower` writes such a graph. `emulate` writes a graph in fp32 that rounds after every node as
`lower`'s would, because a CPU run of an fp16 graph proves nothing: ONNX Runtime computes
it in fp32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ...runtime.artifact.manifest import LOGITS, NEXT
from ...runtime.errors import ModelError
from .formats import Half, in_head

_FP32_OPS = frozenset({"LayerNormalization", "Softmax", "ReduceMean", "Pow", "Sqrt", "Log", "Exp"})
_PRODUCTS = frozenset({"MatMul", "Gemm"})
# What only moves or inspects values takes them in whatever precision they come.
_ANY_OPS = frozenset({"Shape", "Size", "Identity"})
_ONNX_TYPE = {Half.FP16: TensorProto.FLOAT16, Half.BF16: TensorProto.BFLOAT16}
_FP32_TENSORS = ("token_weights", LOGITS)

ABS_MAX = "abs_max/"
"""Outputs of an emulation with this prefix are the largest |x| of a node's output."""


@dataclass(frozen=True)
class Lowering:
    """Which nodes and which inputs and outputs of a graph are in half precision.

    Attributes:
        nodes: names of the nodes that compute in it.
        tensors: inputs and outputs that are in it.
    """

    nodes: frozenset[str]
    tensors: frozenset[str]


def choose_lowering(
    proto: Any, keep: Collection[str] = (), head_products: bool = False
) -> Lowering:
    """Choose what of an fp32 graph is lowered.

    Args:
        proto: the graph.
        keep: more nodes, inputs and outputs that stay in fp32, by name. A carried tensor is
            named without its prefix: `hidden_states` keeps `next_hidden_states` too.
        head_products: lower the matrix products of exit heads too, as plans for compute
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


def lower(proto: Any, half: Half, chosen: Lowering) -> Any:
    """The graph with chosen nodes and tensors in half precision.

    Args:
        proto: the fp32 graph; it is left as it is.
        half: the format.
        chosen: what to lower, see `choose_lowering`.

    Raises:
        ModelError: a weight does not fit the format.
    """
    floats = _float_values(proto)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    # The precision each value has so far: True is half.
    is_half = {value.name: value.name in chosen.tensors for value in graph.input}
    graph.initializer.extend(tensor for name, tensor in weights.items() if name not in floats)
    copies: dict[tuple[str, bool], str] = {}

    def in_precision(name: str, low: bool) -> str:
        """The name of a float value in a precision, cast or stored there if need be."""
        if name not in floats:
            return name
        if name not in weights and is_half[name] == low:
            return name
        known = copies.get((name, low))
        if known is None:
            if name in weights:
                both = (name, not low) in copies
                known = f"{name}/{half.value if low else 'fp32'}" if both else name
                tensor = _lowered(weights[name], half) if low else weights[name]
                graph.initializer.add().CopyFrom(tensor)
                graph.initializer[-1].name = known
            else:
                known = f"{name}/{half.value if low else 'fp32'}"
                graph.node.append(
                    _cast(name, known, _ONNX_TYPE[half] if low else TensorProto.FLOAT)
                )
            copies[name, low] = known
        return known

    for original in proto.graph.node:
        node = graph.node.add()
        node.CopyFrom(original)
        if node.op_type in _ANY_OPS:
            low = any(is_half.get(name, False) for name in node.input)
            # A cast would only be looked at: take the value as it is.
            inputs = [n if n not in weights else in_precision(n, low) for n in node.input]
        else:
            low = node.name in chosen.nodes
            del graph.node[-1]  # casts come before it
            inputs = [in_precision(name, low) for name in original.input]
            node = graph.node.add()
            node.CopyFrom(original)
            if low:
                _lower_attributes(node, half)
        del node.input[:]
        node.input.extend(inputs)
        is_half.update({name: low for name in node.output if name in floats})
    _type_ends(graph, half, chosen, is_half)
    onnx.checker.check_model(result)
    return result


def emulate(proto: Any, half: Half, chosen: Lowering) -> Any:
    """An fp32 graph that rounds to half precision wherever `lower`'s graph would.

    Its inputs and outputs are those of the fp32 graph, in fp32, and for every node that has a
    float output one more output, `ABS_MAX` + its name: the largest |x| before rounding. Run
    it without graph optimisation, or the rounding is optimised away.
    """
    floats = _float_values(proto)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    del graph.node[:], graph.value_info[:]
    # What nodes read in place of a value: those in half precision, and the others.
    low = {name: name for name in chosen.tensors}
    exact: dict[str, str] = {}
    for tensor in graph.initializer:
        users = [node for node in proto.graph.node if tensor.name in node.input]
        if tensor.name in floats and users and all(node.name in chosen.nodes for node in users):
            with np.errstate(over="ignore"):  # what does not fit shows as infinity
                rounded = _rounded(tensor, half).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
            low[tensor.name] = tensor.name

    def round_trip(source: str, target: str) -> None:
        between = f"{target}/{half.value}"
        graph.node.append(_cast(source, between, _ONNX_TYPE[half]))
        graph.node.append(_cast(between, target, TensorProto.FLOAT))

    def in_low(name: str) -> str:
        if name in floats and name not in low:
            low[name] = f"{name}/rounded"
            round_trip(name, low[name])
        return low.get(name, name)

    for original in proto.graph.node:
        is_low = original.name in chosen.nodes
        inputs = [in_low(name) if is_low else exact.get(name, name) for name in original.input]
        node = graph.node.add()
        node.CopyFrom(original)
        del node.input[:]
        node.input.extend(inputs)
        outputs = [name for name in original.output if name in floats]
        for name in outputs:
            if not is_low and name not in chosen.tensors:
                continue
            unrounded = f"{name}/exact"
            node.output[list(original.output).index(name)] = unrounded
            round_trip(unrounded, name)
            if is_low:
                low[name] = name
            else:  # only what leaves the graph is rounded
                exact[name] = unrounded
        if outputs:
            first = node.output[list(original.output).index(outputs[0])]
            graph.node.extend(_abs_max(first, node))
            graph.output.append(helper.make_tensor_value_info(ABS_MAX + node.name, 1, []))
    onnx.checker.check_model(result)
    return result


def _float_values(proto: Any) -> set[str]:
    graph = proto.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return floats | {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}


def largest_weight(tensor: Any) -> float:
    """The largest |x| of an initializer."""
    return float(np.abs(numpy_helper.to_array(tensor)).max(initial=0.0))


def _lowered(tensor: Any, half: Half) -> Any:
    largest = largest_weight(tensor)
    if largest > half.largest:
        raise ModelError(
            f"weight {tensor.name} holds {largest:.3g}, more than {half.value} can "
            f"({half.largest:.5g})",
            "export with --bf16, or keep the nodes that use it: --keep-fp32 auto",
        )
    return numpy_helper.from_array(_rounded(tensor, half), tensor.name)


def _rounded(tensor: Any, half: Half) -> NDArray[Any]:
    dtype = helper.tensor_dtype_to_np_dtype(_ONNX_TYPE[half])
    return np.asarray(numpy_helper.to_array(tensor).astype(dtype))


def _cast(source: str, target: str, onnx_type: int) -> Any:
    return helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=onnx_type)


def _lower_attributes(node: Any, half: Half) -> None:
    """Nodes that make floats out of nothing, or out of other types."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = _ONNX_TYPE[half]
        if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_lowered(attribute.t, half))


def _type_ends(graph: Any, half: Half, chosen: Lowering, is_half: dict[str, bool]) -> None:
    """Give inputs and outputs their type, with a cast where an output is made in another."""
    for value in graph.input:
        if value.name in chosen.tensors:
            value.type.tensor_type.elem_type = _ONNX_TYPE[half]
    for value in graph.output:
        low = value.name in chosen.tensors
        if low:
            value.type.tensor_type.elem_type = _ONNX_TYPE[half]
        if is_half.get(value.name, False) == low:
            continue
        made = f"{value.name}/{'fp32' if low else half.value}"
        for node in graph.node:
            for names in (node.input, node.output):
                for number, name in enumerate(names):
                    if name == value.name:
                        names[number] = made
        graph.node.append(_cast(made, value.name, _ONNX_TYPE[half] if low else TensorProto.FLOAT))


def _abs_max(value: str, node: Any) -> Iterator[Any]:
    name = ABS_MAX + node.name
    yield helper.make_node("Abs", [value], [f"{name}/abs"], name=f"{name}/abs")
    yield helper.make_node("ReduceMax", [f"{name}/abs"], [name], name=f"{name}/max", keepdims=0)
