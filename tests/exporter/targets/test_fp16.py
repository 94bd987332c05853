"""Graphs in fp16: what is lowered, how it is emulated, and what is refused before it is written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from fpabee.exporter.onnx_file import in_head
from fpabee.exporter.targets import BuildResult, build_targets, check, fp16
from fpabee.exporter.targets.fp16 import emulate, lower
from fpabee.runtime import CheckError, ModelError, read_manifest
from fpabee.runtime.artifact.folder import EnginesFolder, sha256_of
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.artifact.untrusted.graph_content import check_graph
from fpabee.runtime.backends.onnxruntime import session_options
from fpabee.runtime.check import BATCH_LIMIT, Agreement
from fpabee.runtime.encoding import Text

from ...bad_input.cases import contents


def add_fp16(folder: Path, texts: Sequence[Text] = ()) -> BuildResult:
    return build_targets(folder, ["onnxruntime-fp16-cuda"], texts)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Agreement]:
    """How the graphs in fp16 agree with those in fp32."""
    found: list[Agreement] = []

    def noted(*arguments: Any) -> Agreement:
        found.append(check.check_logits(*arguments))
        return found[-1]

    monkeypatch.setattr(fp16, "check_logits", noted)
    return found


@pytest.mark.parametrize("family", ["albert", "mpnet"])
def test_graphs_are_written_beside_those_of_fp32(
    family: str, engine_copy: Callable[..., Path], compared: list[Agreement]
) -> None:
    folder = engine_copy(family)
    before = read_manifest(folder)
    manifest = add_fp16(folder).manifest
    (agreement,) = compared
    assert agreement.passed
    assert agreement.rows == 12
    assert BATCH_LIMIT < agreement.max_logit_difference < 0.5, "it is rounded"
    graphs = manifest.graphs_in("fp16")
    assert manifest.graphs == before.graphs
    assert graphs.keys() == before.graphs.keys()
    assert read_manifest(folder) == manifest
    kinds = {"float32": 1, "int64": 7, "float16": 10}
    for graph in graphs.values():
        proto = onnx.load(folder / graph.file)
        assert sha256_of(folder / graph.file) == graph.sha256
        check_graph(folder / graph.file)
        ends = [*proto.graph.input, *proto.graph.output]
        for value, spec in zip(ends, [*graph.inputs, *graph.outputs], strict=True):
            assert (value.name, value.type.tensor_type.elem_type) == (spec.name, kinds[spec.dtype])


def test_heads_that_attend_stay_in_fp32(
    attending_engines: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(attending_engines["bert"], tmp_path / "engines"))
    added = add_fp16(folder)
    assert added.refused == {}
    for graph in added.manifest.graphs_in("fp16").values():
        graph_of_exit = onnx.shape_inference.infer_shapes(onnx.load(folder / graph.file)).graph
        values = [*graph_of_exit.value_info, *graph_of_exit.input, *graph_of_exit.output]
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        types |= {weight.name: weight.data_type for weight in graph_of_exit.initializer}
        computed = ("MatMul", "Gemm", "Softmax", "Gelu")
        nodes = [n for n in graph_of_exit.node if in_head(n.name) and n.op_type in computed]
        kinds = [node.op_type for node in nodes]
        assert [kinds.count(kind) for kind in computed[:3]] == [2, 2, 1]
        for name in (name for node in nodes for name in (*node.input, *node.output)):
            assert types[name] == TensorProto.FLOAT, name


def test_more_texts_are_also_checked_with_exit_0(
    exit_0_engines: Mapping[str, Path], tmp_path: Path, compared: list[Agreement]
) -> None:
    folder = Path(shutil.copytree(exit_0_engines["bert"], tmp_path / "engines"))
    known, _ = read_reference(EnginesFolder.read(folder))
    assert add_fp16(folder, ["the film", ("a", "b")]).refused == {}
    (agreement,) = compared
    assert agreement.passed
    assert agreement.rows == len(known) + 2


def test_answers_that_change_are_refused(
    engine_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = engine_copy()
    before = contents(folder)
    texts, logits = read_reference(EnginesFolder.read(folder))
    turned = (texts, np.ascontiguousarray(logits[..., ::-1]))
    monkeypatch.setattr(fp16, "read_reference", lambda *_: turned)
    (refused,) = add_fp16(folder).refused.values()
    assert isinstance(refused, CheckError)
    assert re.search(r"changes answers from exit 1 on.*at least 99\.9% required", str(refused))
    assert contents(folder) == before


FAMILIES = ("bert", "albert", "deberta-v2")  # the last one has casts


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


def run(proto: Any, x: float) -> float:
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return float(session.run(["y"], {"x": np.array([x], np.float32)})[0][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_lowered_and_fragile_nodes_are_not(
    family: str, engines: Mapping[str, Path]
) -> None:
    products = 0
    for proto in graphs_of(engines[family]).values():
        lowered, again = (lower(proto) for _ in range(2))
        contents = {graph.SerializeToString(deterministic=True) for graph in (lowered, again)}
        assert len(contents) == 1
        types = types_of(lowered)
        ends = {value.name: types[value.name] for value in lowered.graph.output}
        assert ends.get("logits", TensorProto.FLOAT) == TensorProto.FLOAT
        assert ends.get("next_hidden_states", TensorProto.FLOAT16) == TensorProto.FLOAT16
        for node in lowered.graph.node:
            found = {types[name] for name in (*node.input, *node.output)} & {1, 10}
            assert len(found) < 2 or node.op_type == "Cast", node.name
            if node.op_type in ("LayerNormalization", "Softmax") or node.name.startswith("head"):
                assert found == {TensorProto.FLOAT}, node.name
            elif node.op_type == "MatMul":
                assert found == {TensorProto.FLOAT16}, node.name
                products += 1
    assert products >= 6


def test_emulation_rounds_and_overflows_like_the_format() -> None:
    assert run(emulate(small("Add", 2**-12)), 1.0) == 1.0
    assert run(emulate(small("Add", 2**-10)), 1.0) == 1.0 + 2**-10
    assert run(emulate(small("Mul", 1000.0)), 70.0) == np.inf
    # `lower` casts where lowered nodes read, and the output of an fp32 node may overflow there.
    assert run(emulate(small("Mul", 1000.0, name="head/op", again=1e-3)), 70.0) == np.inf


def test_a_weight_of_nodes_in_both_precisions_is_rounded_for_one_only() -> None:
    """Rounding must depend on the node that reads a weight, in the graph as in its emulation."""
    proto = small("Mul", 1 / 3, again=1.0)
    proto.graph.node[1].input[1] = "w"
    proto.graph.node[1].name = "head/again"
    del proto.graph.initializer[1]
    weights = {tensor.data_type for tensor in lower(proto).graph.initializer}
    assert weights == {TensorProto.FLOAT, TensorProto.FLOAT16}
    found = run(emulate(proto), 1.0)
    rounded = np.float16(1 / 3).astype(np.float32)
    assert found == float(rounded * np.float32(1 / 3)) != float(rounded * rounded)


def test_a_weight_that_does_not_fit_is_named() -> None:
    with pytest.raises(ModelError, match=r"weight w holds 1e\+05.*fp16.* in fp32"):
        lower(small("Mul", 1e5))
