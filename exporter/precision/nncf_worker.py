"""Quantize graphs for CPUs with NNCF, in a process of its own; see `int8_worker`.

python -m fpabee.exporter.precision.nncf_worker graph.onnx inputs quantized.onnx ...
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from .formats import in_head
from .int8_worker import main

# NNCF reports its use to Intel otherwise.
os.environ["NNCF_CI"] = "1"


def quantize(source: Path, batches: list[dict[str, Any]]) -> Any:
    """A graph with Q/DQ by SmoothQuant and bias correction, except in heads.

    Args:
        source: the fp32 graph.
        batches: inputs of the graph, which give the ranges.
    """
    import nncf

    proto = onnx.load(source)
    heads = [node.name for node in proto.graph.node if in_head(node.name)]
    proto = nncf.quantize(
        proto,
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
        ignored_scope=nncf.IgnoredScope(names=heads, validate=False),
    )
    _make_unsigned(proto)
    return proto


def _make_unsigned(proto: Any) -> None:
    """Shift activations from int8 to uint8, which changes no value.

    ONNX Runtime's kernels for CPUs are several times faster with unsigned activations.
    """
    zero_points = {n.input[2] for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    for tensor in proto.graph.initializer:
        if tensor.name in zero_points and tensor.data_type == onnx.TensorProto.INT8:
            shifted = (numpy_helper.to_array(tensor).astype(np.int16) + 128).astype(np.uint8)
            tensor.CopyFrom(numpy_helper.from_array(shifted, tensor.name))
    proto.graph.ClearField("value_info")  # it says int8


if __name__ == "__main__":
    main(quantize)
