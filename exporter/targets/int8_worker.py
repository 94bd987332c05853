"""Quantize graphs in a process of its own.

    python -m fpabee.exporter.targets.int8_worker FORM graph.onnx inputs quantized.onnx ...

The form is one of `FORMS`. The folder `inputs` holds a file for each batch, with an array for each
input of the graph.

ONNX Runtime's quantizer creates sessions with their own thread pools, which ONNX Runtime refuses
in a process with the shared pool of our runtime.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ..onnx_file import in_head, strip

# NNCF reports its use to Intel otherwise.
os.environ["NNCF_CI"] = "1"

Batches = list[dict[str, Any]]
"""Inputs of a graph, which give the ranges."""


def symmetric(source: Path, batches: Batches) -> Any:
    """A graph with symmetric Q/DQ around every product with a weight, except in heads."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._batches, None)

    with tempfile.TemporaryDirectory() as temporary:
        quantized = Path(temporary) / "quantized.onnx"
        quantize_static(
            source,
            quantized,
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=_heads(onnx.load(source)),
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
            },
        )
        # The types of the new values say which nodes are lowered to fp16.
        return onnx.shape_inference.infer_shapes(onnx.load(quantized))


def smooth(source: Path, batches: Batches) -> Any:
    """A graph with Q/DQ by SmoothQuant and bias correction of NNCF, except in heads.

    Products within attention are left out, too: OpenVINO would run quantized products of two
    activations in floating point, after converting both.
    """
    import nncf

    proto = onnx.load(source)
    proto = nncf.quantize(
        proto,
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
        ignored_scope=nncf.IgnoredScope(
            names=[*_heads(proto), *_products_of_activations(proto)], validate=False
        ),
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


def _heads(proto: Any) -> list[str]:
    return [node.name for node in proto.graph.node if in_head(node.name)]


def _products_of_activations(proto: Any) -> list[str]:
    """The names of products that have no weights, which are those within attention."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    products = [node for node in proto.graph.node if node.op_type == "MatMul"]
    return [node.name for node in products if not weights & set(node.input)]


FORMS = {"symmetric": symmetric, "smooth": smooth}
"""The forms of int8: `symmetric` for TensorRT, and `smooth` for CPUs."""


def main() -> None:
    """Quantize the graphs that the arguments name."""
    quantize, arguments = FORMS[sys.argv[1]], [Path(argument) for argument in sys.argv[2:]]
    for source, stored, target in zip(*(arguments[start::3] for start in range(3)), strict=True):
        batches = []
        for path in sorted(stored.glob("*.npz")):
            with np.load(path, allow_pickle=False) as content:
                batches.append(dict(content))
        proto = quantize(source, batches)
        strip(proto)
        target.write_bytes(proto.SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
