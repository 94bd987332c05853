"""Which nodes are lowered, what the lowered graph holds, and that its emulation rounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from fpabee.exporter.precision.formats import Half
from fpabee.exporter.precision.lowering import ABS_MAX, Lowering, choose_lowering, emulate, lower
from fpabee.runtime import ModelError, read_manifest
from fpabee.runtime.backends.onnxruntime_session import session_options

FAMILIES = ("bert", "albert", "mpnet")
LOW = {Half.FP16: TensorProto.FLOAT16, Half.BF16: TensorProto.BFLOAT16}


def graphs_of(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    return {name: onnx.load(folder / graph.file) for name, graph in manifest.graphs.items()}


def types_of(proto: Any) -> dict[str, int]:
    """The element type of every value, inferred again."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in inferred.initializer}


def small(op: str, factor: float, name: str = "body/op", again: float | None = None) -> Any:
    """`y = op(x, factor)` of one float; with `again`, `y = op(op(x, factor), again)`."""
    weights = {"w": factor} if again is None else {"w": factor, "v": again}
    tensors = [numpy_helper.from_array(np.array([w], np.float32), n) for n, w in weights.items()]
    nodes = [helper.make_node(op, ["x", "w"], ["y"], name=name)]
    if again is not None:
        nodes[0].output[0] = "z"
        nodes.append(helper.make_node(op, ["z", "v"], ["y"], name="body/again"))
    x, y, z = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch"]) for n in "xyz")
    inner = [] if again is None else [z]
    graph = helper.make_graph(nodes, "small", [x], [y], tensors, value_info=inner)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(proto: Any, x: float) -> dict[str, float]:
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, {"x": np.array([x], np.float32)})
    return {name: float(np.max(value)) for name, value in zip(names, values, strict=True)}


@pytest.mark.parametrize("half", Half)
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_lowered_and_fragile_nodes_are_not(
    family: str, half: Half, engines: Mapping[str, Path]
) -> None:
    products = 0
    for proto in graphs_of(engines[family]).values():
        lowered, again = (lower(proto, half, choose_lowering(proto)) for _ in range(2))
        contents = {graph.SerializeToString(deterministic=True) for graph in (lowered, again)}
        assert len(contents) == 1
        types = types_of(lowered)
        ends = {value.name: types[value.name] for value in lowered.graph.output}
        assert ends.get("logits", TensorProto.FLOAT) == TensorProto.FLOAT
        assert ends.get("next_hidden_states", LOW[half]) == LOW[half]
        for node in lowered.graph.node:
            found = {types[name] for name in (*node.input, *node.output)} & {1, 10, 16}
            if node.op_type in ("LayerNormalization", "Softmax") or node.name.startswith("head"):
                assert found == {TensorProto.FLOAT}, node.name
            elif node.op_type == "MatMul":
                assert found == {LOW[half]}, node.name
                products += 1
    assert products >= 6


def test_weights_of_fp32_nodes_are_not_rounded(engines: Mapping[str, Path]) -> None:
    proto = graphs_of(engines["bert"])["segment_02"]
    lowered = lower(proto, Half.FP16, choose_lowering(proto))
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in lowered.graph.initializer}
    kept = [name for name in after if "LayerNorm" in name or "classifier" in name]
    assert len(kept) >= 5  # the exporter stores equal weights once
    for name in kept:
        np.testing.assert_array_equal(after[name], before[name])
    assert after["blocks.0.layer.output.dense.bias/fp16"].dtype == np.float16


def test_kept_nodes_and_tensors_stay_in_fp32(engines: Mapping[str, Path]) -> None:
    proto = graphs_of(engines["bert"])["segment_02"]
    node = next(n for n in proto.graph.node if n.name.startswith("blocks.0.layer.output.dense/Mat"))
    lowered = lower(proto, Half.FP16, choose_lowering(proto, [node.name, "hidden_states"]))
    types = types_of(lowered)
    kept = next(n for n in lowered.graph.node if n.name == node.name)
    assert {types[name] for name in (*kept.input, *kept.output)} == {TensorProto.FLOAT}
    assert types["hidden_states"] == types["next_hidden_states"] == TensorProto.FLOAT
    assert types["attention_bias"] == TensorProto.FLOAT16


@pytest.mark.parametrize(("half", "step"), [(Half.FP16, 2**-10), (Half.BF16, 2**-7)])
def test_emulation_rounds_to_the_format(half: Half, step: float) -> None:
    proto = small("Add", step / 4)
    exact = run(emulate(proto, half, Lowering()), 1.0)
    rounded = run(emulate(proto, half, choose_lowering(proto)), 1.0)
    assert exact["y"] == 1.0 + step / 4
    assert rounded["y"] == 1.0
    # Before rounding, so that a message can say how large the value is.
    assert rounded[f"{ABS_MAX}body/op"] == 1.0 + step / 4


def test_emulation_overflows_like_the_format() -> None:
    proto = small("Mul", 1000.0)
    found = run(emulate(proto, Half.FP16, choose_lowering(proto)), 70.0)
    assert found == {"y": np.inf, f"{ABS_MAX}body/op": 70000.0}
    assert run(emulate(proto, Half.BF16, choose_lowering(proto)), 70.0)["y"] == pytest.approx(
        70000, rel=0.01
    )


def test_emulation_rounds_what_lowered_nodes_read() -> None:
    """`lower` casts there, and the output of an fp32 node may overflow in this cast."""
    proto = small("Mul", 1000.0, again=1e-3)
    chosen = choose_lowering(proto, keep=["body/op"])
    assert chosen.nodes == {"body/again"}
    found = run(emulate(proto, Half.FP16, chosen), 70.0)
    assert found[f"{ABS_MAX}body/op"] == 70000.0
    assert found[f"{ABS_MAX}body/again"] == np.inf


def test_a_weight_of_nodes_in_both_precisions_is_rounded_for_one_only() -> None:
    """Rounding must depend on the node that reads a weight, in the graph as in its emulation."""
    proto = small("Mul", 1 / 3, again=1.0)
    proto.graph.node[1].input[1] = "w"
    del proto.graph.initializer[1]
    chosen = choose_lowering(proto, keep=["body/again"])
    weights = {tensor.data_type for tensor in lower(proto, Half.FP16, chosen).graph.initializer}
    assert weights == {TensorProto.FLOAT, TensorProto.FLOAT16}
    found = run(emulate(proto, Half.FP16, chosen), 1.0)["y"]
    rounded = np.float16(1 / 3).astype(np.float32)
    assert found == float(rounded * np.float32(1 / 3)) != float(rounded * rounded)


def test_a_weight_that_does_not_fit_is_named() -> None:
    proto = small("Mul", 1e5)
    with pytest.raises(ModelError, match=r"weight w holds 1e\+05.*fp16.*bf16.*keep_fp32"):
        lower(proto, Half.FP16, choose_lowering(proto))
    lower(proto, Half.BF16, choose_lowering(proto))


def test_products_of_heads_are_lowered_on_request(engines: Mapping[str, Path]) -> None:
    proto = graphs_of(engines["bert"])["segment_02"]
    usual, turing = choose_lowering(proto), choose_lowering(proto, head_products=True)
    more = {node.name: node for node in proto.graph.node if node.name in turing.nodes - usual.nodes}
    assert len(more) >= 2, "pooler and classifier"
    assert {node.op_type for node in more.values()} <= {"MatMul", "Gemm"}
    assert usual.tensors == turing.tensors
