"""Check that an ONNX file holds only what the exporter writes: plain operators and weights.

An exported graph is a list of nodes without control flow, so running it always ends, and its
weights are in the file itself, so its hash covers them. A file from a stranger may contain loops,
functions, operators of other domains, or names of other files, and ONNX Runtime and TensorRT would
follow them.

A few numbers can also ask for a tensor that no machine has room for, which ONNX Runtime makes when
it loads the graph. So the sizes that nodes are given may come only from small constants, whose
product is bounded, and from the shapes of other tensors. This does not bound what a long graph
computes step by step.
"""

from __future__ import annotations

import math
import mmap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArtifactError
from .protobuf import LEN, fields, numbers

DOMAINS = ("", "ai.onnx")

# What the exporter writes for all families, precisions and activations, and what other releases of
# torch write instead. tests/exporter/test_graph_content.py exports them all.
_OPERATORS = """
Abs Add And Cast CastLike Celu Clip Concat Constant ConstantOfShape Conv Cos CumSum
DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand Flatten Floor Gather
GatherElements GatherND Gelu Gemm Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf
IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max Mean Min Mish Mod
Mul Neg Not OneHot Or PRelu Pad Pow QuantizeLinear Range Reciprocal ReduceMax ReduceMean
ReduceMin ReduceProd ReduceSum Relu Reshape Round ScatterElements ScatterND Selu Shape Sigmoid
Sign Sin Size Slice Softmax Softplus Softsign Split Sqrt Squeeze Sub Sum Tanh ThresholdedRelu
Tile Transpose Trilu Unsqueeze Where
"""
OPERATORS = frozenset(_OPERATORS.split())

# Operators that make a tensor of any size, and the inputs that say which.
_SIZED = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Tile": (1,),
}
# Most values for which the constants of a size may ask; exported sizes ask for some thousands.
_MOST_VALUES = 2**24
_MOST_SIZE_BYTES = 1024

_HINT = (
    "do not use this folder if you do not trust its source; export the model again, or if a later "
    "fpabee exported it: pip install -U fpabee"
)

# Field numbers of each message, as in onnx.proto.
MODEL = {"graph": 7, "opset_import": 8, "training_info": 20, "functions": 25}
GRAPH = {"node": 1, "initializer": 5, "sparse_initializer": 15}
NODE = {"op_type": 4, "attribute": 5, "domain": 7}
ATTRIBUTE = {"t": 5, "g": 6, "tensors": 10, "graphs": 11, "sparse_tensor": 22, "sparse_tensors": 23}
TENSOR = {"external_data": 13, "data_location": 14}
OPSET = {"domain": 1}
# Those that only the check of sizes reads.
NODE_VALUES = {"input": 1, "output": 2}
ATTRIBUTE_VALUES = {"ints": 8}
TENSOR_VALUES = {"data_type": 2, "int32_data": 5, "int64_data": 7, "name": 8, "raw_data": 9}
# By the value of data_type.
_INTEGERS: dict[int, np.dtype[Any]] = {6: np.dtype("<i4"), 7: np.dtype("<i8")}

# The messages inside others, by the field that holds them; all other fields of interest are values.
_INSIDE = {
    "graph": GRAPH,
    "opset_import": OPSET,
    "node": NODE,
    "attribute": ATTRIBUTE,
    "initializer": TENSOR,
    "t": TENSOR,
    "tensors": TENSOR,
}


def check_graph(path: Path) -> None:
    """Refuse an ONNX file with anything that the exporter does not write.

    Args:
        path: the file; the values of its weights are not read.

    Raises:
        ArtifactError: the file is not an ONNX file, contains control flow, functions, or other
            operators or domains, refers to other files, or asks for a huge tensor.
    """
    # ONNX Runtime reads a file with another suffix as its own format.
    if path.suffix != ".onnx":
        raise ArtifactError(f"{path} is not named *.onnx, as an ONNX graph should be", _HINT)
    try:
        with path.open("rb") as file:
            # Not closed here: an exception may still hold views of it. It is freed with the last.
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        found = (_problem(name, value) for name, value in _values(content, MODEL))
        problem = next(filter(None, found), "")
        graphs = [value for number, _, value in fields(content) if number == MODEL["graph"]]
        if not problem:
            problem = next(filter(None, map(_size_problem, graphs)), "")
        if not graphs:
            problem = problem or "contains no graph"
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is not an ONNX graph: {error}", _HINT) from error
    if problem:
        raise ArtifactError(f"{path} {problem}", _HINT)


def _values(message: memoryview, known: dict[str, int]) -> Iterator[tuple[str, int | memoryview]]:
    """The fields in `known` of a message and of the messages inside it, by name."""
    names = {number: name for name, number in known.items()}
    for number, wire, value in fields(message):
        name = names.get(number)
        if name is None:
            continue
        if name in _INSIDE:
            if wire != LEN or not isinstance(value, memoryview):
                raise ValueError(f"its {name} is of wire type {wire}")
            yield from _values(value, _INSIDE[name])
        else:
            yield name, value


def _problem(name: str, value: int | memoryview) -> str:
    """What is wrong with a value; empty if nothing is."""
    if name == "data_location" and value == 0:  # the data are in this file
        return ""
    if name in TENSOR:
        return "keeps weights in other files, which no hash of the manifest covers"
    if name in ATTRIBUTE:
        return f"has a node attribute of type {name}: control flow or a sparse tensor"
    if name not in ("domain", "op_type"):
        return f"has {name}, which fpabee never exports"
    text = bytes(value[:100]).decode(errors="replace") if isinstance(value, memoryview) else ""
    if name == "domain" and text not in DOMAINS:
        return f"uses operators of domain {text!r}; only ONNX's own are expected"
    if name == "op_type" and text not in OPERATORS:
        return f"has a node of operator {text!r}, which fpabee never exports"
    return ""


def _size_problem(graph: int | memoryview) -> str:
    """Which node is given the size of a huge tensor; empty if none is."""
    content = _by_number(graph)
    # For how many values each tensor asks if it is a size; infinite if it should not be one.
    asked: dict[bytes, float] = defaultdict(float)
    for tensor in content[GRAPH["initializer"]]:
        for name in _names(_by_number(tensor)[TENSOR_VALUES["name"]]):
            asked[name] = max(asked[name], _asked_by(tensor))
    for message in content[GRAPH["node"]]:
        node = _by_number(message)
        operator = b"".join(_names(node[NODE["op_type"]][-1:])).decode(errors="replace")
        inputs = [asked.get(name, math.inf) for name in _names(node[NODE_VALUES["input"]])]
        attributes = [_by_number(attribute) for attribute in node[NODE["attribute"]]]
        sizes = [inputs[place] for place in _SIZED.get(operator, ()) if place < len(inputs)]
        # The padding of Conv is such a list.
        sizes += [_product(_numbers(found[ATTRIBUTE_VALUES["ints"]])) for found in attributes]
        if max(sizes, default=0.0) > _MOST_VALUES:
            return f"has a node of operator {operator!r} that may ask for a huge tensor"
        if operator in ("Shape", "Size"):
            inputs = [1.0]
        elif operator == "Constant":
            inputs = [_asked_by(tensor) for found in attributes for tensor in found[ATTRIBUTE["t"]]]
        elif operator in ("Gather", "Slice"):
            inputs = inputs[:1]  # the others say which numbers are taken
        result = math.prod(inputs) if inputs and operator not in _SIZED else math.inf
        asked.update(dict.fromkeys(_names(node[NODE_VALUES["output"]]), result))
    return ""


def _asked_by(tensor: int | memoryview) -> float:
    """The product of the whole numbers of a small tensor; infinite for any other tensor."""
    content = _by_number(tensor)
    raw = [value for value in content[TENSOR_VALUES["raw_data"]] if isinstance(value, memoryview)]
    listed = [*content[TENSOR_VALUES["int32_data"]], *content[TENSOR_VALUES["int64_data"]]]
    size = sum(len(value) if isinstance(value, memoryview) else 1 for value in (*raw, *listed))
    (kind,) = content[TENSOR_VALUES["data_type"]][-1:] or (0,)
    if not isinstance(kind, int) or kind not in _INTEGERS or size > _MOST_SIZE_BYTES:
        return math.inf
    found = _numbers(listed)
    for value in raw:
        found += np.frombuffer(value, _INTEGERS[kind]).tolist()
    return _product(found)


def _numbers(values: Sequence[int | memoryview]) -> list[int]:
    return [number for value in values for number in numbers(value)]


def _product(sizes: Sequence[int]) -> float:
    return math.prod(float(max(1, abs(size))) for size in sizes)


def _by_number(message: int | memoryview) -> dict[int, list[int | memoryview]]:
    """The fields of a message by their numbers."""
    if not isinstance(message, memoryview):
        raise ValueError("a message is a number")
    found = defaultdict[int, list[int | memoryview]](list)
    for number, _, value in fields(message):
        found[number].append(value)
    return found


def _names(values: Sequence[int | memoryview]) -> list[bytes]:
    return [bytes(value) for value in values if isinstance(value, memoryview)]
