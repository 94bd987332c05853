"""What an ONNX file of an engines folder may hold: plain operators, and all of its weights.

A graph of ours is a list of nodes without control flow, so it ends, and its weights stand in the
file itself, so its hash covers them. A file from a stranger may hold loops, functions, operators
of other domains, or names of other files. ONNX Runtime and TensorRT would follow them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from ..errors import ArtifactError
from .protobuf import LEN, fields

DOMAINS = ("", "ai.onnx")

# What the exporter writes for all families, precisions and activations, and what other releases
# of torch write in their place. tests/exporter/test_graph_content.py exports them all.
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

_HINT = "do not use this folder; export the model again with fpabee-export"

# Numbers of fields, by message, as onnx.proto gives them.
MODEL = {"graph": 7, "opset_import": 8, "training_info": 20, "functions": 25}
GRAPH = {"node": 1, "initializer": 5, "sparse_initializer": 15}
NODE = {"op_type": 4, "attribute": 5, "domain": 7}
ATTRIBUTE = {"t": 5, "g": 6, "tensors": 10, "graphs": 11, "sparse_tensor": 22, "sparse_tensors": 23}
TENSOR = {"external_data": 13, "data_location": 14}
OPSET = {"domain": 1}

_Found = Iterator[tuple[str, memoryview]]


def check_graph(path: Path) -> None:
    """Refuse an ONNX file with anything that the exporter does not write.

    Args:
        path: the file; of its weights nothing is read.

    Raises:
        ArtifactError: it is no ONNX file, or holds control flow, functions, other operators or
            domains, or names other files.
    """
    # By another name, ONNX Runtime would take the file for one of its own format.
    if path.suffix != ".onnx":
        raise ArtifactError(f"{path} is not named as an ONNX graph, *.onnx", _HINT)
    try:
        with path.open("rb") as file:
            # Not closed here: an error holds views of it, and it goes with the last of them.
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        problem = _problem(content)
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is no ONNX graph: {error}", _HINT) from error
    if problem:
        raise ArtifactError(f"{path} {problem[0]}", problem[1])


def _problem(model: memoryview) -> tuple[str, str] | None:
    graphs = 0
    for name, content in _parts(model, MODEL):
        if name == "graph":
            graphs += 1
            problem = _graph_problem(content)
        elif name == "opset_import":
            problem = _domain_problem([text for _, text in _parts(content, OPSET)])
        else:
            problem = f"has {name}, which no graph of fpabee has", _HINT
        if problem:
            return problem
    return None if graphs else ("holds no graph", _HINT)


def _graph_problem(graph: memoryview) -> tuple[str, str] | None:
    for name, content in _parts(graph, GRAPH):
        if name == "node":
            problem = _node_problem(content)
        elif name == "initializer":
            problem = _tensor_problem(content)
        else:
            problem = f"has a {name}, which no graph of fpabee has", _HINT
        if problem:
            return problem
    return None


def _node_problem(node: memoryview) -> tuple[str, str] | None:
    texts: dict[str, list[memoryview]] = {"op_type": [], "domain": []}
    for name, content in _parts(node, NODE):
        if name in texts:
            texts[name].append(content)
            continue
        for kind, value in _parts(content, ATTRIBUTE):
            if kind not in ("t", "tensors"):
                return f"has a node with an attribute of type {kind}: control flow or sparse", _HINT
            problem = _tensor_problem(value)
            if problem:
                return problem
    problem = _domain_problem(texts["domain"])
    if problem:
        return problem
    for operator in map(_text, texts["op_type"]):
        if operator not in OPERATORS:
            return (
                f"has a node of operator {operator!r}, which this fpabee does not know",
                "do not use this folder if a stranger made it; if a later fpabee made it: "
                "pip install -U fpabee; if you exported it with this one, please report it",
            )
    return None


def _tensor_problem(tensor: memoryview) -> tuple[str, str] | None:
    for number, _, value in fields(tensor):
        # Data location 0 says that it stands here.
        external = number == TENSOR["external_data"]
        if external or (number == TENSOR["data_location"] and value != 0):
            return "keeps weights in other files, which no hash of the manifest covers", _HINT
    return None


def _domain_problem(domains: list[memoryview]) -> tuple[str, str] | None:
    for domain in map(_text, domains):
        if domain not in DOMAINS:
            return f"uses operators of domain {domain!r}; expected those of ONNX alone", _HINT
    return None


def _parts(message: memoryview, known: dict[str, int]) -> _Found:
    """The fields of a message that have a name in `known`, all of which have a length."""
    names = {number: name for name, number in known.items()}
    for number, wire, value in fields(message):
        if number not in names:
            continue
        if wire != LEN or not isinstance(value, memoryview):
            raise ValueError(f"its {names[number]} is of wire type {wire}")
        yield names[number], value


def _text(content: memoryview) -> str:
    return bytes(content[:100]).decode(errors="replace")
