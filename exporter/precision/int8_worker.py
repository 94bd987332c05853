"""Quantize graphs in a process of its own.

    python -m fpabee.exporter.precision.int8_worker graph.onnx inputs quantized.onnx ...

ONNX Runtime's quantizer creates sessions with their own thread pools, which ONNX Runtime refuses
in a process with the shared pool of our runtime. The folder `inputs` holds a file for each batch,
with an array for each input.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..onnx_file import strip
from .formats import in_head

Quantize = Callable[[Path, list[dict[str, Any]]], Any]
"""Gives a quantized graph, from an fp32 graph and batches of its inputs."""


def quantize(source: Path, batches: list[dict[str, Any]]) -> Any:
    """A graph with symmetric Q/DQ around every product with a weight, except in heads.

    Args:
        source: the fp32 graph.
        batches: inputs of the graph, which give the ranges.
    """
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
            nodes_to_exclude=[n.name for n in onnx.load(source).graph.node if in_head(n.name)],
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
            },
        )
        # The types of the new values say which nodes are lowered to fp16.
        return onnx.shape_inference.infer_shapes(onnx.load(quantized))


def main(quantize: Quantize = quantize) -> None:
    """Quantize the graphs that the arguments name.

    Args:
        quantize: quantizes one graph.
    """
    arguments = [Path(argument) for argument in sys.argv[1:]]
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
