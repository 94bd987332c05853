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
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ArtifactError
from .protobuf import fields, numbers

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

# Field numbers of each message, as in onnx.proto: what is read, and what a file must not have.
MODEL = {"graph": 7, "opset_import": 8, "training_info": 20, "functions": 25}
OPSET = {"domain": 1}
GRAPH = {"node": 1, "initializer": 5, "sparse_initializer": 15}
NODE = {"input": 1, "output": 2, "op_type": 4, "attribute": 5, "domain": 7}
ATTRIBUTE = {"t": 5, "ints": 8, "tensors": 10}
ATTRIBUTE |= {"g": 6, "graphs": 11, "sparse_tensor": 22, "sparse_tensors": 23}
TENSOR = {"data_type": 2, "int32_data": 5, "int64_data": 7, "name": 8, "raw_data": 9}
TENSOR |= {"external_data": 13, "data_location": 14}
# By the value of data_type.
_INTEGERS: dict[int, np.dtype[Any]] = {6: np.dtype("<i4"), 7: np.dtype("<i8")}

_Value = int | memoryview
_Message = Mapping[str, Sequence[_Value]]


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
        problem = next(_problems(content), "")
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is not an ONNX graph: {error}", _HINT) from error
    if problem:
        raise ArtifactError(f"{path} {problem}", _HINT)


def _problems(content: memoryview) -> Iterator[str]:
    """What is wrong with a model."""
    model = _read(content, MODEL)
    for name in ("training_info", "functions"):
        if model[name]:
            yield f"has {name}, which fpabee never exports"
    for opset in model["opset_import"]:
        yield from _unknown("domain", _read(opset, OPSET)["domain"], DOMAINS)
    for graph in model["graph"]:
        yield from _graph_problems(_read(graph, GRAPH))
    if not model["graph"]:
        yield "contains no graph"


def _graph_problems(graph: _Message) -> Iterator[str]:
    if graph["sparse_initializer"]:
        yield "has sparse_initializer, which fpabee never exports"
    # For how many values each tensor asks if it is a size; infinite if it should not be one.
    asked: dict[bytes, float] = defaultdict(float)
    for initializer in graph["initializer"]:
        tensor = _read(initializer, TENSOR)
        yield from _tensor_problems(tensor)
        for key in _texts(tensor["name"]):
            asked[key] = max(asked[key], _asked_by(tensor))
    for message in graph["node"]:
        node = _read(message, NODE)
        yield from _unknown("domain", node["domain"], DOMAINS)
        yield from _unknown("operator", node["op_type"], OPERATORS)
        attributes = [_read(attribute, ATTRIBUTE) for attribute in node["attribute"]]
        for attribute in attributes:
            for name in ("g", "graphs", "sparse_tensor", "sparse_tensors"):
                if attribute[name]:
                    yield f"has a node attribute of type {name}: control flow or a sparse tensor"
            for inner in (*attribute["t"], *attribute["tensors"]):
                yield from _tensor_problems(_read(inner, TENSOR))
        operator = b"".join(_texts(node["op_type"][-1:])).decode()
        inputs = [asked.get(key, math.inf) for key in _texts(node["input"])]
        sizes = [inputs[place] for place in _SIZED.get(operator, ()) if place < len(inputs)]
        # The padding of Conv is such a list.
        sizes += [_product(numbers(attribute["ints"])) for attribute in attributes]
        if max(sizes, default=0.0) > _MOST_VALUES:
            yield f"has a node of operator {operator!r} that may ask for a huge tensor"
        if operator in ("Shape", "Size"):
            inputs = [1.0]
        elif operator == "Constant":
            inputs = [_asked_by(_read(t, TENSOR)) for found in attributes for t in found["t"]]
        elif operator in ("Gather", "Slice"):
            inputs = inputs[:1]  # the others say which numbers are taken
        result = math.prod(inputs) if inputs and operator not in _SIZED else math.inf
        asked.update(dict.fromkeys(_texts(node["output"]), result))


def _unknown(what: str, values: Sequence[_Value], known: Collection[str]) -> Iterator[str]:
    for value in values:
        text = bytes(value[:100]).decode(errors="replace") if isinstance(value, memoryview) else ""
        if text not in known:
            yield f"uses {what} {text!r}, which fpabee never exports"


def _tensor_problems(tensor: _Message) -> Iterator[str]:
    if tensor["external_data"] or any(tensor["data_location"]):
        yield "keeps weights in other files, which no hash of the manifest covers"


def _asked_by(tensor: _Message) -> float:
    """The product of the whole numbers of a small tensor; infinite for any other tensor."""
    raw = [value for value in tensor["raw_data"] if isinstance(value, memoryview)]
    listed = [*tensor["int32_data"], *tensor["int64_data"]]
    size = sum(len(value) if isinstance(value, memoryview) else 1 for value in (*raw, *listed))
    (kind,) = tensor["data_type"][-1:] or (0,)
    if not isinstance(kind, int) or kind not in _INTEGERS or size > _MOST_SIZE_BYTES:
        return math.inf
    stored = [number for part in raw for number in np.frombuffer(part, _INTEGERS[kind]).tolist()]
    return _product([*numbers(listed), *stored])


def _read(message: _Value, known: Mapping[str, int]) -> _Message:
    """The fields in `known` of a message, by name."""
    if not isinstance(message, memoryview):
        raise ValueError("a message is a number")
    found: dict[str, list[_Value]] = {name: [] for name in known}
    names = {number: name for name, number in known.items()}
    for number, value in fields(message):
        if number in names:
            found[names[number]].append(value)
    return found


def _product(sizes: Sequence[int]) -> float:
    return math.prod(float(max(1, abs(size))) for size in sizes)


def _texts(values: Sequence[_Value]) -> list[bytes]:
    return [bytes(value) for value in values if isinstance(value, memoryview)]
