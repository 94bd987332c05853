"""One ONNX graph that holds several graphs, of which each run chooses one.

A session of it has one pool of threads and one arena for all of them. Sessions of the single graphs
share a pool only if the whole process does, and then ONNX Runtime refuses the sessions of other
libraries.

The graphs are the leaves of a binary tree of `If` nodes. Each level has a condition, which is an
input. The other inputs are those of all graphs. Every graph has all outputs; one that it lacks is
empty. Large weights stay in the files of the graphs, and are mapped into memory from there.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..artifact.untrusted.graph_content import ATTRIBUTE, GRAPH, MODEL, NODE, TENSOR
from ..artifact.untrusted.protobuf import fields, values_at

# Field numbers in onnx.proto.
_IR_VERSION, _GRAPH, _OPSET_IMPORT = (MODEL[n] for n in ("ir_version", "graph", "opset_import"))
_NODES, _GRAPH_NAME, _INITIALIZERS = (GRAPH[n] for n in ("node", "name", "initializer"))
_INPUTS = GRAPH["input"]
_OUTPUTS = GRAPH["output"]
_NODE_INPUT, _NODE_OUTPUT, _OPERATOR, _ATTRIBUTES = (
    NODE[n] for n in ("input", "output", "op_type", "attribute")
)
_ATTRIBUTE_NAME, _TENSOR_VALUE, _GRAPH_VALUE, _KIND = (
    ATTRIBUTE[n] for n in ("name", "t", "g", "type")
)
_DIMS, _DATA_TYPE, _TENSOR_NAME, _RAW_DATA, _EXTERNAL_DATA, _LOCATION = (
    TENSOR[n] for n in ("dims", "data_type", "name", "raw_data", "external_data", "data_location")
)
# Those of an input or output, and of its type.
_VALUE_NAME = 1
_VALUE_TYPE = 2
_TENSOR_TYPE = 1
_ELEMENT = 1
_SHAPE = 2
# Values of such fields.
_TENSOR_KIND = 4
_GRAPH_KIND = 5
_EXTERNAL = 1
_BOOL = 9

# Smaller tensors are copied: ONNX Runtime needs shapes when it loads the graph.
_LEAST_BYTES = 1024

_Values = Mapping[bytes, memoryview]
"""Inputs or outputs by name, each an `onnx.ValueInfoProto`."""


class OneGraph(NamedTuple):
    """Several graphs in one.

    Attributes:
        model: the graph, an `onnx.ModelProto`.
        folder: the folder that its references to files start from.
        choices: for each graph by its name, the values of the inputs that choose it.
        outputs: what each output of the graphs is called.
    """

    model: bytes
    folder: Path
    choices: dict[str, dict[str, bool]]
    outputs: dict[str, str]


class _Graph(NamedTuple):
    """A graph on its way into a tree.

    Attributes:
        head: version and operator sets of the model.
        inputs: its inputs.
        outputs: its outputs.
        body: its nodes and weights.
    """

    head: list[bytes]
    inputs: _Values
    outputs: _Values
    body: bytes


def one_graph(files: Mapping[str, Path]) -> OneGraph:
    """Join graphs that have passed `check_graph`.

    Args:
        files: the ONNX file of each graph by its name. They must stay as long as the session.

    Raises:
        ValueError: a file is not an ONNX graph, or they have different versions.
    """
    paths = {name: path.resolve() for name, path in files.items()}  # no link may leave the folder
    folder = Path(os.path.commonpath([path.parent for path in paths.values()]))
    # The last graphs are deepest in the tree, because they run least often.
    graphs = [_read(path, folder, n) for n, path in enumerate(reversed(paths.values()))]
    head = graphs[0].head
    if any(graph.head != head for graph in graphs):
        raise ValueError("they have different versions or operator sets")
    inputs = {name: value for graph in graphs for name, value in graph.inputs.items()}
    outputs = {name: value for graph in graphs for name, value in graph.outputs.items()}
    levels = (len(graphs) - 1).bit_length()
    conditions = [f"choice/{level}" for level in range(levels)]
    scalar = _field(_TENSOR_TYPE, _field(_ELEMENT, _BOOL) + _field(_SHAPE, b""))
    tree = _tree(graphs, outputs, levels - 1)
    tree += b"".join(_field(_INPUTS, value) for value in inputs.values())
    for name in conditions:
        value = _field(_VALUE_NAME, name.encode()) + _field(_VALUE_TYPE, scalar)
        tree += _field(_INPUTS, value)
    choices = {
        name: {condition: bool(number >> level & 1) for level, condition in enumerate(conditions)}
        for number, name in enumerate(reversed(paths))
    }
    names = {name.decode(): _name_in_tree(name, levels - 1).decode() for name in outputs}
    return OneGraph(b"".join(head) + _field(_GRAPH, tree), folder, choices, names)


def _read(path: Path, folder: Path, number: int) -> _Graph:
    """Read the graph with a number, to which large weights get names of their own.

    ONNX Runtime up to 1.28 frees weights that it has packed, if no other graph has the same names.
    """
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    (graph,) = values_at(content, (_GRAPH,))  # more or none: ValueError
    body = []
    names = dict[bytes, bytes]()
    for tensor in values_at(graph, (_INITIALIZERS,)):
        raw = next(values_at(tensor, (_RAW_DATA,)), None)
        if raw is None or len(raw) < _LEAST_BYTES:
            body.append(_field(_INITIALIZERS, tensor))
            continue
        (name,) = map(bytes, values_at(tensor, (_TENSOR_NAME,)))
        names[name] = b"%d/%s" % (number, name)
        where = {
            "location": path.relative_to(folder).as_posix(),
            "offset": str(_address(raw) - _address(content)),
            "length": str(len(raw)),
        }
        new = _field(_TENSOR_NAME, names[name]) + _field(_LOCATION, _EXTERNAL)
        for key, text in where.items():
            new += _field(_EXTERNAL_DATA, _field(1, key.encode()) + _field(2, text.encode()))
        for field, value in fields(tensor):
            if field in (_DIMS, _DATA_TYPE):
                new += _field(field, value)
        body.append(_field(_INITIALIZERS, new))
    for node in values_at(graph, (_NODES,)):
        new = b""
        for field, value in fields(node):
            is_input = field == _NODE_INPUT and isinstance(value, memoryview)
            new += _field(field, names.get(bytes(value), value) if is_input else value)
        body.append(_field(_NODES, new))
    head = [_field(n, value) for n, value in fields(content) if n in (_IR_VERSION, _OPSET_IMPORT)]
    return _Graph(head, _by_name(graph, _INPUTS), _by_name(graph, _OUTPUTS), b"".join(body))


def _by_name(graph: memoryview, number: int) -> _Values:
    found = {}
    for value in values_at(graph, (number,)):
        (name,) = map(bytes, values_at(value, (_VALUE_NAME,)))
        found[name] = value
    return found


def _tree(graphs: Sequence[_Graph], outputs: _Values, level: int) -> bytes:
    """An `onnx.GraphProto` without inputs: a graph, or nodes that choose one of several.

    Args:
        graphs: at most twice as many as a branch of this level holds.
        outputs: the outputs of all graphs of the whole tree.
        level: the number of the condition to choose by; branches have smaller ones.
    """
    if len(graphs) == 1:
        return _leaf(graphs[0], outputs)
    half = 2**level
    if len(graphs) <= half:
        return _tree(graphs, outputs, level - 1)
    node = _field(_OPERATOR, b"If") + _field(_NODE_INPUT, f"choice/{level}".encode())
    for name, part in ((b"then_branch", graphs[half:]), (b"else_branch", graphs[:half])):
        branch = _field(_GRAPH_VALUE, _tree(part, outputs, level - 1)) + _field(_KIND, _GRAPH_KIND)
        node += _field(_ATTRIBUTES, _field(_ATTRIBUTE_NAME, name) + branch)
    values = b""
    for name, info in outputs.items():
        (kind,) = values_at(info, (_VALUE_TYPE,))
        output = _field(_VALUE_NAME, _name_in_tree(name, level)) + _field(_VALUE_TYPE, kind)
        node += _field(_NODE_OUTPUT, _name_in_tree(name, level))
        values += _field(_OUTPUTS, output)
    return _field(_GRAPH_NAME, b"choice") + _field(_NODES, node) + values


def _leaf(graph: _Graph, outputs: _Values) -> bytes:
    """A graph as a branch, which has all outputs; those that it lacks are empty."""
    missing = b""
    for name in outputs.keys() - graph.outputs.keys():
        (kind,) = values_at(outputs[name], (_VALUE_TYPE, _TENSOR_TYPE))
        (element,) = (number for field, number in fields(kind) if field == _ELEMENT)
        empty = _field(_TENSOR_VALUE, _field(_DIMS, 0) + _field(_DATA_TYPE, element))
        attribute = _field(_ATTRIBUTE_NAME, b"value") + empty + _field(_KIND, _TENSOR_KIND)
        node = _field(_NODE_OUTPUT, name) + _field(_OPERATOR, b"Constant")
        missing += _field(_NODES, node + _field(_ATTRIBUTES, attribute))
    values = {**outputs, **graph.outputs}.values()
    named = b"".join(_field(_OUTPUTS, value) for value in values)
    return _field(_GRAPH_NAME, b"graph") + graph.body + missing + named


def _name_in_tree(name: bytes, level: int) -> bytes:
    """What an output is called after the choice of a level; -1: within a graph."""
    return name if level < 0 else b"%s/%d" % (name, level)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _field(number: int, value: int | bytes | memoryview) -> bytes:
    """A field of a protobuf message: a number, or bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + bytes(value)


def _varint(number: int) -> bytes:
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*found, number))
