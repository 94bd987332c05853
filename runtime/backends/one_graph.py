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

from ..artifact.untrusted.protobuf import (
    ATTRIBUTE,
    ENTRY,
    GRAPH,
    MODEL,
    NODE,
    TENSOR,
    TENSOR_TYPE,
    TYPE,
    VALUE,
    fields,
    values_at,
)

# Values of fields, as in onnx.proto.
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
    boolean = _field(TENSOR_TYPE["elem_type"], _BOOL) + _field(TENSOR_TYPE["shape"], b"")
    scalar = _field(TYPE["tensor_type"], boolean)
    tree = _tree(graphs, outputs, levels - 1)
    tree += b"".join(_field(GRAPH["input"], value) for value in inputs.values())
    for name in conditions:
        value = _field(VALUE["name"], name.encode()) + _field(VALUE["type"], scalar)
        tree += _field(GRAPH["input"], value)
    choices = {
        name: {condition: bool(number >> level & 1) for level, condition in enumerate(conditions)}
        for number, name in enumerate(reversed(paths))
    }
    names = {name.decode(): _name_in_tree(name, levels - 1).decode() for name in outputs}
    return OneGraph(b"".join(head) + _field(MODEL["graph"], tree), folder, choices, names)


def _read(path: Path, folder: Path, number: int) -> _Graph:
    """Read the graph with a number, to which large weights get names of their own.

    ONNX Runtime up to 1.28 frees weights that it has packed, if no other graph has the same names.
    """
    with path.open("rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    (graph,) = values_at(content, (MODEL["graph"],))  # more or none: ValueError
    body = []
    names = dict[bytes, bytes]()
    for tensor in values_at(graph, (GRAPH["initializer"],)):
        raw = next(values_at(tensor, (TENSOR["raw_data"],)), None)
        if raw is None or len(raw) < _LEAST_BYTES:
            body.append(_field(GRAPH["initializer"], tensor))
            continue
        (name,) = map(bytes, values_at(tensor, (TENSOR["name"],)))
        names[name] = b"%d/%s" % (number, name)
        where = {
            "location": path.relative_to(folder).as_posix(),
            "offset": str(_address(raw) - _address(content)),
            "length": str(len(raw)),
        }
        new = _field(TENSOR["name"], names[name]) + _field(TENSOR["data_location"], _EXTERNAL)
        for key, text in where.items():
            entry = _field(ENTRY["key"], key.encode()) + _field(ENTRY["value"], text.encode())
            new += _field(TENSOR["external_data"], entry)
        for field, value in fields(tensor):
            if field in (TENSOR["dims"], TENSOR["data_type"]):
                new += _field(field, value)
        body.append(_field(GRAPH["initializer"], new))
    for node in values_at(graph, (GRAPH["node"],)):
        new = b""
        for field, value in fields(node):
            is_input = field == NODE["input"] and isinstance(value, memoryview)
            new += _field(field, names.get(bytes(value), value) if is_input else value)
        body.append(_field(GRAPH["node"], new))
    in_head = (MODEL["ir_version"], MODEL["opset_import"])
    return _Graph(
        head=[_field(field, value) for field, value in fields(content) if field in in_head],
        inputs=_by_name(graph, GRAPH["input"]),
        outputs=_by_name(graph, GRAPH["output"]),
        body=b"".join(body),
    )


def _by_name(graph: memoryview, number: int) -> _Values:
    values = {}
    for value in values_at(graph, (number,)):
        (name,) = map(bytes, values_at(value, (VALUE["name"],)))
        values[name] = value
    return values


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
    node = _field(NODE["op_type"], b"If") + _field(NODE["input"], f"choice/{level}".encode())
    for name, part in ((b"then_branch", graphs[half:]), (b"else_branch", graphs[:half])):
        branch = _field(ATTRIBUTE["name"], name)
        branch += _field(ATTRIBUTE["g"], _tree(part, outputs, level - 1))
        branch += _field(ATTRIBUTE["type"], _GRAPH_KIND)
        node += _field(NODE["attribute"], branch)
    values = b""
    for name, info in outputs.items():
        (kind,) = values_at(info, (VALUE["type"],))
        output = _field(VALUE["name"], _name_in_tree(name, level)) + _field(VALUE["type"], kind)
        node += _field(NODE["output"], _name_in_tree(name, level))
        values += _field(GRAPH["output"], output)
    return _field(GRAPH["name"], b"choice") + _field(GRAPH["node"], node) + values


def _leaf(graph: _Graph, outputs: _Values) -> bytes:
    """A graph as a branch, which has all outputs; those that it lacks are empty."""
    missing = b""
    for name in outputs.keys() - graph.outputs.keys():
        (kind,) = values_at(outputs[name], (VALUE["type"], TYPE["tensor_type"]))
        (element,) = (number for field, number in fields(kind) if field == TENSOR_TYPE["elem_type"])
        empty = _field(TENSOR["dims"], 0) + _field(TENSOR["data_type"], element)
        attribute = _field(ATTRIBUTE["name"], b"value")
        attribute += _field(ATTRIBUTE["t"], empty)
        attribute += _field(ATTRIBUTE["type"], _TENSOR_KIND)
        node = _field(NODE["output"], name) + _field(NODE["op_type"], b"Constant")
        missing += _field(GRAPH["node"], node + _field(NODE["attribute"], attribute))
    values = {**outputs, **graph.outputs}.values()
    named = b"".join(_field(GRAPH["output"], value) for value in values)
    return _field(GRAPH["name"], b"graph") + graph.body + missing + named


def _name_in_tree(name: bytes, level: int) -> bytes:
    """The name of an output after the choice of a level; -1: within a graph."""
    return name if level < 0 else b"%s/%d" % (name, level)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _field(number: int, value: int | bytes | memoryview) -> bytes:
    """A field of a protobuf message: a number, or bytes."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + bytes(value)


def _varint(number: int) -> bytes:
    groups_of_7_bits = bytearray()
    while number >= 0x80:
        groups_of_7_bits.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*groups_of_7_bits, number))
