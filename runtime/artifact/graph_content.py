"""Check that an ONNX file holds only what the exporter writes: plain operators and weights.

An exported graph is a list of nodes without control flow, so running it always ends, and its
weights are in the file itself, so its hash covers them. A file from a stranger may contain loops,
functions, operators of other domains, or names of other files, and ONNX Runtime and TensorRT would
follow them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from ..errors import ArtifactError
from .protobuf import LEN, fields

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

_REMEDY = (
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
            operators or domains, or refers to other files.
    """
    # ONNX Runtime reads a file with another suffix as its own format.
    if path.suffix != ".onnx":
        raise ArtifactError(f"{path} is not named *.onnx, as an ONNX graph should be", _REMEDY)
    try:
        with path.open("rb") as file:
            # Not closed here: an exception may still hold views of it. It is freed with the last.
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        found = (_problem(name, value) for name, value in _values(content, MODEL))
        problem = next(filter(None, found), "")
        if not problem and all(number != MODEL["graph"] for number, _, _ in fields(content)):
            problem = "contains no graph"
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is not an ONNX graph: {error}", _REMEDY) from error
    if problem:
        raise ArtifactError(f"{path} {problem}", _REMEDY)


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
