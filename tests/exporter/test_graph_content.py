"""What the exporter never writes does not pass the check; engines load what it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import onnx
import pytest
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fpabee.exporter.onnx_file import write_graph
from fpabee.runtime.artifact.untrusted import graph_content, protobuf
from fpabee.runtime.artifact.untrusted.graph_content import check_graph
from fpabee.runtime.errors import ArtifactError, ModelError


def test_numbers_of_fields_and_names_of_operators_are_those_of_onnx() -> None:
    for message, numbers in (
        (onnx.ModelProto, protobuf.MODEL),
        (onnx.GraphProto, protobuf.GRAPH),
        (onnx.NodeProto, protobuf.NODE),
        (onnx.AttributeProto, protobuf.ATTRIBUTE),
        (onnx.TensorProto, protobuf.TENSOR),
        (onnx.OperatorSetIdProto, protobuf.OPSET),
    ):
        fields = message.DESCRIPTOR.fields_by_name
        assert {name: fields[name].number for name in numbers} == numbers
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    assert known >= graph_content.OPERATORS


def small() -> Any:
    """A model of a node with a tensor in its attribute, and a weight."""
    value = helper.make_tensor("value", TensorProto.FLOAT, [1], [2.0])
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [2], b"\0" * 8, raw=True)
    node = helper.make_node("Constant", [], ["out"], value=value)
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
    return helper.make_model(helper.make_graph([node], "small", [], [out], [weight]))


def outside(tensor: Any) -> None:
    entry = tensor.external_data.add()
    entry.key = "location"
    entry.value = "weights"


def with_graph(name: str, kind: str, many: bool = False) -> Callable[[Any], object]:
    inner = small().graph
    attributes: dict[str, Any] = {kind: [inner] if many else inner}
    return lambda m: m.graph.node.append(helper.make_node(name, [], ["x"], **attributes))


def with_node(name: str, domain: str = "") -> Callable[[Any], object]:
    return lambda m: m.graph.node.append(helper.make_node(name, [], ["x"], domain=domain))


def sparse(model: Any) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(model.graph.initializer[0])


def sparse_attribute(model: Any) -> None:
    attribute = model.graph.node[0].attribute.add(name="sparse_value", type=11)
    outside(attribute.sparse_tensor.values)


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "loop": (with_graph("Loop", "body"), "op_type 'Loop'"),
    "graphs": (with_graph("Identity", "bodies", many=True), "has graphs, which"),
    "unknown operator": (with_node("Sumo"), "op_type 'Sumo'.*export or convert the model again"),
    "node of another domain": (with_node("Gelu", "com.ours"), "domain 'com.ours'"),
    "import of another domain": (
        lambda m: m.opset_import.append(helper.make_opsetid("com.ours", 1)),
        "domain 'com.ours'",
    ),
    "function": (lambda m: m.functions.add(name="f"), "has functions"),
    "training": (lambda m: m.training_info.add(), "has training_info"),
    "sparse weights": (sparse, "has sparse_initializer"),
    "sparse attribute": (sparse_attribute, "has sparse_tensor"),
    "weights elsewhere": (lambda m: outside(m.graph.initializer[0]), "weights in other files"),
    "location alone": (
        lambda m: setattr(m.graph.initializer[0], "data_location", TensorProto.EXTERNAL),
        "weights in other files",
    ),
    "attribute elsewhere": (
        lambda m: outside(m.graph.node[0].attribute[0].t),
        "weights in other files",
    ),
    "attributes elsewhere": (
        lambda m: outside(m.graph.node[0].attribute[0].tensors.add()),
        "weights in other files",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_graphs_that_the_exporter_does_not_write_are_refused(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    model = small()
    path = tmp_path / "small.onnx"
    path.write_bytes(model.SerializeToString())
    check_graph(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=rf"small\.onnx .*{message}"):
        check_graph(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x3a",  # a graph without its length
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # a graph of 2^64 bytes
        b"\x80" * 20,  # a number that does not end
        b"\x3b\x3c",  # a group
        b"\x38\x01",  # a graph that is a number
        b"\x02\x00",  # field 0
    ],
)
def test_bytes_that_are_not_a_model_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"bad\.onnx is not an ONNX graph: .*convert the model"):
        check_graph(path)


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    """ONNX Runtime reads a file named *.ort in another format."""
    path = tmp_path / "small.ort"
    path.write_bytes(small().SerializeToString())
    with pytest.raises(ArtifactError, match=r"small\.ort is not named \*\.onnx"):
        check_graph(path)


def looped() -> bytes:
    model = small()
    with_graph("Loop", "body")(model)
    return bytes(model.SerializeToString())


@settings(max_examples=50)
@given(at=st.integers(0, len(looped()) - 1), byte=st.integers(0, 255))
def test_a_loop_that_onnx_reads_is_found_in_any_bytes(
    at: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After a change of any byte, a file that passes has no inner graph when onnx reads it."""
    content = bytearray(looped())
    content[at] = byte
    path = tmp_path_factory.getbasetemp() / "changed.onnx"
    path.write_bytes(content)
    try:
        check_graph(path)
    except ArtifactError:
        return
    nodes = onnx.ModelProto.FromString(bytes(content)).graph.node
    assert not any(a.HasField("g") or a.graphs for node in nodes for a in node.attribute)


def test_a_graph_that_is_too_large_for_a_file_is_refused(tmp_path: Path) -> None:
    beyond = Mock(side_effect=EncodeError("Failed to serialize proto"))
    proto = SimpleNamespace(SerializeToString=beyond)
    path = tmp_path / "segment_01.onnx"
    with pytest.raises(
        ModelError, match=r"segment_01\.onnx does not fit .*2 GiB.*with more `exits`"
    ):
        write_graph(path, "", proto)
    assert not path.exists()
