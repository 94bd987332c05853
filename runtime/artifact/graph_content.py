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
            # Not closed here: an exception holds views of it, and frees it with the last of them.
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        problem = next(_model_problems(content), "")
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is not an ONNX graph: {error}", _REMEDY) from error
    if problem:
        raise ArtifactError(f"{path} {problem}", _REMEDY)


def _model_problems(model: memoryview) -> Iterator[str]:
    has_graph = False
    for name, content in _parts(model, MODEL):
        if name == "graph":
            has_graph = True
            yield from _graph_problems(content)
        elif name == "opset_import":
            for _, domain in _parts(content, OPSET):
                yield from _domain_problems(domain)
        else:
            yield f"has {name}, which fpabee never exports"
    if not has_graph:
        yield "contains no graph"


def _graph_problems(graph: memoryview) -> Iterator[str]:
    for name, content in _parts(graph, GRAPH):
        if name == "node":
            yield from _node_problems(content)
        elif name == "initializer":
            yield from _tensor_problems(content)
        else:
            yield f"has a {name}, which fpabee never exports"


def _node_problems(node: memoryview) -> Iterator[str]:
    for name, content in _parts(node, NODE):
        if name == "domain":
            yield from _domain_problems(content)
        elif name == "op_type":
            if _text(content) not in OPERATORS:
                yield f"has a node of operator {_text(content)!r}, which fpabee never exports"
        else:
            for kind, value in _parts(content, ATTRIBUTE):
                if kind in ("t", "tensors"):
                    yield from _tensor_problems(value)
                else:
                    yield f"has a node attribute of type {kind}: control flow or a sparse tensor"


def _tensor_problems(tensor: memoryview) -> Iterator[str]:
    for number, _, value in fields(tensor):
        # Data location 0 means that the data are in this file.
        external = number == TENSOR["external_data"]
        if external or (number == TENSOR["data_location"] and value != 0):
            yield "keeps weights in other files, which no hash of the manifest covers"


def _domain_problems(domain: memoryview) -> Iterator[str]:
    if _text(domain) not in DOMAINS:
        yield f"uses operators of domain {_text(domain)!r}; only ONNX's own are expected"


def _parts(message: memoryview, known: dict[str, int]) -> Iterator[tuple[str, memoryview]]:
    """The fields of a message that are named in `known`; all of these hold bytes or messages."""
    names = {number: name for name, number in known.items()}
    for number, wire, value in fields(message):
        if number not in names:
            continue
        if wire != LEN or not isinstance(value, memoryview):
            raise ValueError(f"its {names[number]} is of wire type {wire}")
        yield names[number], value


def _text(content: memoryview) -> str:
    return bytes(content[:100]).decode(errors="replace")
