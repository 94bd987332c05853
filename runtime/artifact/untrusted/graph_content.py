"""Check that an ONNX file holds only what the exporter writes: plain operators and weights.

An exported graph is a list of nodes without control flow, so running it always ends, and its
weights are in the file itself, so its hash covers them. A file from a stranger may contain loops,
functions, operators of other domains, or names of other files, and ONNX Runtime and TensorRT would
follow them.

This does not bound the memory that a graph needs: two nodes are enough to ask for more than any
machine has.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import ArtifactError
from .protobuf import ATTRIBUTE, GRAPH, MODEL, NODE, OPSET, TENSOR, fields

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

_KNOWN = {"domain": {"", "ai.onnx"}, "op_type": OPERATORS}

_HINT = (
    "do not use this folder if you do not trust its source; export or convert the model again, or "
    "if a later fpabee exported it, update fpabee"
)

# The messages that are read, by the field that holds them.
_MESSAGES = {
    "graph": GRAPH,
    "opset_import": OPSET,
    "node": NODE,
    "attribute": ATTRIBUTE,
    "initializer": TENSOR,
    "t": TENSOR,
    "tensors": TENSOR,
}
_NEVER = {
    "training_info",
    "functions",
    "sparse_initializer",
    "g",
    "graphs",
    "sparse_tensor",
    "sparse_tensors",
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
        raise ArtifactError(f"{path} is not named *.onnx, as an ONNX graph should be", _HINT)
    try:
        with path.open("rb") as file:
            # Not closed here: an exception may still hold views of it. It is freed with the last.
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        problem = next(_problems(content, MODEL), "")
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} is not an ONNX graph: {error}", _HINT) from error
    if problem:
        raise ArtifactError(f"{path} {problem}", _HINT)


def _problems(message: int | memoryview, numbers: Mapping[str, int]) -> Iterator[str]:
    """The problems of a message, given the numbers of its fields by their names."""
    if isinstance(message, int):
        raise ValueError("a message is a number")
    names = {number: name for name, number in numbers.items()}
    for number, value in fields(message):
        name = names.get(number, "")
        if name in _MESSAGES:
            yield from _problems(value, _MESSAGES[name])
        elif name in _NEVER:
            yield f"has {name}, which fpabee never exports"
        elif name in _KNOWN:
            text = "" if isinstance(value, int) else bytes(value[:100]).decode(errors="replace")
            if text not in _KNOWN[name]:
                yield f"uses {name} {text!r}, which fpabee never exports"
        elif name == "external_data" or (name == "data_location" and value):
            yield "keeps weights in other files, which no hash of the manifest covers"
