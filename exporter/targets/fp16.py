"""The graphs of an engines folder in fp16.

TensorRT networks are strongly typed: a graph runs in the precision it is written in. Matrix
products are written in fp16. Normalisation, softmax and the exit heads stay in fp32, because
16 bits would cost them range or accuracy.

`lower` writes such a graph. Before it is written to the folder, it is checked on real texts that
the model still gives the same labels and exits. For this, the chain runs graphs that `emulate`
made: in fp32, with every rounding of the lowered graphs in place. Running the lowered graphs on a
CPU would prove nothing, because ONNX Runtime computes them in fp32. The check needs no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from ...calibration.progress import Progress
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import LOGITS
from ...runtime.artifact.reference import read_reference
from ...runtime.backends.onnxruntime import cpu_session, session_options
from ...runtime.check import Logits
from ...runtime.encoding import Text, TextEncoder, padded_batches, padding_values
from ...runtime.errors import ModelError
from ...runtime.rules.rules import ExitRule
from ..for_tensorrt import fit_tensorrt
from ..onnx_file import chain_logits, in_head, load_graphs
from .check import check_logits

_BATCH = 16
_FP32_OPS = frozenset(
    {"LayerNormalization", "Softmax", "ReduceMean", "Pow", "Sqrt", "Log", "Exp"}
    | {"Cast", "Constant"}  # which say themselves what they give
)
# Graphs of format 1.0 hand token weights on.
_FP32_TENSORS = ("token_weights", "next_token_weights", LOGITS)
_LARGEST = 65504.0


def lowered_graphs(
    engines: EnginesFolder, more: tuple[Sequence[Text], Logits] | None, progress: Progress
) -> dict[str, Any]:
    """The graphs in fp16, after a check that they give the answers of the fp32 model.

    Args:
        engines: the engines folder.
        more: texts to check with besides the reference texts, and their logits in fp32.
        progress: called with (what, done, total).

    Returns:
        Each graph as an `onnx.ModelProto`, by its name.

    Raises:
        CheckError: values overflow, or too many labels or exits change.
        ModelError: a weight does not fit into fp16.
    """
    manifest = engines.manifest
    protos = load_graphs(engines, manifest.graphs)
    for proto in protos.values():
        fit_tensorrt(proto.graph)
    texts, expected = read_reference(engines)
    if more is not None:
        texts = [*texts, *more[0]]
        expected = np.concatenate([expected, more[1]], axis=1)
    rows = TextEncoder(engines.path, manifest.tokenizer).encode(texts)

    def open_session(name: str) -> Any:
        progress("emulate the chain", [*protos].index(name), len(protos))
        options = session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return cpu_session(emulate(protos[name]).SerializeToString(), options)

    batches = padded_batches(rows, padding_values(manifest.tokenizer), _BATCH)
    emulated = chain_logits(manifest, batches, open_session)
    # Without exit 0, which no precision changes.
    exact = expected[-len(emulated) :]
    rule = ExitRule.from_dict(manifest.default_rule)
    check_logits(emulated, exact, manifest, rule, "fp16")
    return {name: lower(proto) for name, proto in protos.items()}


def lowered_nodes(proto: Any) -> frozenset[str]:
    """The names of the nodes of an fp32 graph that compute in fp16 in the lowered graph."""
    floats = _float_values(proto)
    return frozenset(
        node.name
        for node in proto.graph.node
        if node.op_type not in _FP32_OPS
        and not in_head(node.name)
        and floats.intersection((*node.input, *node.output))
    )


def lower(proto: Any) -> Any:
    """A copy of an fp32 graph, an `onnx.ModelProto`, that computes in fp16.

    Raises:
        ModelError: a weight does not fit into fp16.
    """
    nodes = lowered_nodes(proto)
    floats = _float_values(proto)
    # The inputs and outputs that become fp16.
    tensors = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    tensors = (tensors & floats) - {*_FP32_TENSORS}
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(tensor for name, tensor in weights.items() if name not in floats)
    for value in (*graph.input, *graph.output):
        if value.name in tensors:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    ends = {value.name for value in graph.output}
    # Whether each value that was made so far is in fp16, and its copies in the other type.
    is_low = {value.name: value.name in tensors for value in graph.input}
    copies: dict[tuple[str, bool], str] = {}

    def in_precision(name: str, low: bool) -> str:
        """The name of a value in a precision; a weight is stored in it, other values are cast."""
        if name not in floats or (name not in weights and is_low[name] == low):
            return name
        if (name, low) not in copies:
            copies[name, low] = _in_type(name, low)
            if name not in weights:
                graph.node.append(_cast(name, copies[name, low], low))
            elif low:
                graph.initializer.append(_lowered(weights[name]))
                graph.initializer[-1].name = copies[name, low]
            else:
                copies[name, low] = name
                graph.initializer.append(weights[name])
        return copies[name, low]

    for original in proto.graph.node:
        low = original.name in nodes
        inputs = [in_precision(name, low) for name in original.input]
        node = graph.node.add()
        node.CopyFrom(original)
        node.input[:] = inputs
        for number, name in enumerate(original.output):
            if name not in floats:
                continue
            is_low[name] = low
            if name in ends and low != (name in tensors):
                # The graph gives it in the other type.
                node.output[number] = copies[name, low] = _in_type(name, low)
                graph.node.append(_cast(node.output[number], name, not low))
                is_low[name] = not low
    return result


def emulate(proto: Any) -> Any:
    """An fp32 graph that rounds wherever the lowered graph computes in fp16.

    It has the inputs and outputs of the fp32 graph, in fp32. It must be run without graph
    optimisation, which would remove the rounding.

    Raises:
        ModelError: a weight does not fit into fp16.
    """
    low = lowered_nodes(proto)
    floats = _float_values(proto)
    result = lower(proto)
    graph = result.graph
    nodes = [*result.graph.node]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    del graph.node[:]
    for node in nodes:
        computed = graph.node.add()
        computed.CopyFrom(node)
        is_cast = any(a.name == "to" and a.i == TensorProto.FLOAT16 for a in node.attribute)
        for number, name in enumerate(node.output):
            if is_cast or (node.name in low and name.removesuffix("/fp16") in floats):
                exact = f"{name}/exact"
                rounded = f"{name}/rounded"
                computed.output[number] = rounded if is_cast else exact
                if is_cast:
                    computed.name += "/exact"
                else:
                    graph.node.append(_cast(exact, rounded, True))
                graph.node.append(_cast(rounded, name, False))
    onnx.checker.check_model(result)
    return result


def _float_values(proto: Any) -> set[str]:
    graph = proto.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return floats | {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}


def _in_type(name: str, low: bool) -> str:
    """The name of a copy of a value."""
    return f"{name}/{'fp16' if low else 'fp32'}"


def _cast(source: str, result: str, low: bool) -> Any:
    """A cast to fp16, or to fp32."""
    onnx_type = TensorProto.FLOAT16 if low else TensorProto.FLOAT
    return helper.make_node("Cast", [source], [result], name=f"{result}/cast", to=onnx_type)


def _lowered(tensor: Any) -> Any:
    """A tensor of the same name, converted to fp16."""
    values = numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0.0))
    if largest > _LARGEST:
        raise ModelError(
            f"weight {tensor.name} holds {largest:.3g}, more than fp16 can represent "
            f"({_LARGEST:.5g})",
            "use the targets in fp32 of this model",
        )
    return numpy_helper.from_array(values.astype(np.float16), tensor.name)
