"""Parsers of all versions of TensorRT know the operators of a plan, and what its branches read.

The graphs are parsed by TensorRT for RTX. What older parsers would do with them follows from their
source and from the tables of NVIDIA.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from fpabee.exporter.backbones import _FAMILIES
from fpabee.exporter.single_file import pack, plan

from .conftest import FP32
from .test_plan import RTX_FP16, RULES

TABLES: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "tensorrt_operators.json").read_text(encoding="utf-8")
)
"""The types of the inputs of operators by version, from `operators.md` of onnx-tensorrt."""

TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.BOOL: "BOOL",
}
GIVE_OTHER_TYPES = ("Cast", "Constant", "If", "Range")
MATCHES = [*zip(_FAMILIES, itertools.cycle(RULES), strict=False)]


@pytest.fixture
def graph_of_plan(
    rtx: None,
    engine_copy: Callable[..., Path],
    tmp_path: Path,
    set_points: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, str], Path]:
    """Makes the graph of a plan of a family with a rule; nothing is built from it."""

    def build_nothing(request: Any, *_: object) -> None:
        Path(request.plan).touch()

    monkeypatch.setattr(plan, "build_in_worker", build_nothing)

    def make(family: str, rule: str) -> Path:
        folder = engine_copy(family, exit_0=True)
        set_points(folder, FP32, "point", point=RULES[rule][0])
        pack(folder, tmp_path / "plan", RTX_FP16, "point")
        return tmp_path / "plan" / "model.onnx"

    return make


def operators(
    graph: onnx.GraphProto, outer: Mapping[str, int] | None = None
) -> Iterator[tuple[str, str]]:
    """Every operator of a graph and its branches, with each type that it takes."""
    types = dict(outer or {})
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        values = (*node.input, *(node.output if node.op_type in GIVE_OTHER_TYPES else ()))
        for value in filter(None, values):
            yield node.op_type, TYPES.get(types[value], "no type of TensorRT")
        for attribute in node.attribute:
            yield from operators(attribute.g, types)


def misread_layers(network: Any, kinds: Any) -> list[str]:
    """Layers whose inputs from outside their branch the parser of TensorRT 10.0 to 10.5 misses.

    It looks for those whose name begins with the name of a tensor from outside, and takes the
    inputs of all these: `findLayer` in `ConditionalHelpers.cpp` of onnx-tensorrt. This parser has
    found all of them, and marked them.
    """
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    outside = {
        layer.get_output(0).name: layer.get_input(0).name
        for layer in layers
        if layer.type == kinds.CONDITIONAL_INPUT
    }
    marks = (kinds.CONDITION, kinds.CONDITIONAL_INPUT, kinds.CONDITIONAL_OUTPUT)
    wrong = []
    for layer in layers:
        if layer.type in marks:
            continue
        inputs = [layer.get_input(number) for number in range(layer.num_inputs)]
        read = [outside[each.name] for each in inputs if each is not None and each.name in outside]
        matches = any(layer.name.startswith(name) for name in outside.values())
        is_right = len(inputs) == 1 and layer.name.startswith(read[0]) if read else not matches
        wrong += [] if is_right else [layer.name]
    assert outside, "there are branches"
    return wrong


@pytest.mark.parametrize(("family", "rule"), MATCHES)
def test_every_parser_reads_the_graph(
    family: str, rule: str, graph_of_plan: Callable[[str, str], Path]
) -> None:
    path = graph_of_plan(family, rule)
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    for version, table in TABLES.items():
        beyond = {
            (operator, kind)
            for operator, kind in operators(model.graph)
            if kind not in table[operator].split(", ")
        }
        assert not beyond, f"TensorRT {version} does not list them"
    trt: Any = importlib.import_module("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
    assert misread_layers(network, trt.LayerType) == []
