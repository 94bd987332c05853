"""Quantize one graph: a process of its own.

    python -m fpabee.exporter.precision.int8_worker graph.onnx feeds.npz quantized.onnx

ONNX Runtime's quantizer makes sessions with thread pools of their own, which it refuses in a
process that has the shared pool of our runtime. `feeds.npz` holds arrays called
`<number>/<input>`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .formats import in_head


def quantize(source: Path, feeds: list[dict[str, Any]], target: Path) -> None:
    """Write a graph with symmetric Q/DQ around every product with a weight, heads left out.

    Args:
        source: the fp32 graph.
        feeds: inputs that give the ranges.
        target: the file to write.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    heads = [node.name for node in onnx.load(source).graph.node if in_head(node.name)]
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
            nodes_to_exclude=heads,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
            },
        )
        # Types of the new values are what tells which nodes are lowered to fp16.
        proto = onnx.shape_inference.infer_shapes(onnx.load(quantized))
    for item in [proto, proto.graph, *proto.graph.node, *proto.graph.initializer]:
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    target.write_bytes(proto.SerializeToString(deterministic=True))


def main() -> None:
    """Quantize what the arguments name."""
    source, stored, target = (Path(argument) for argument in sys.argv[1:])
    feeds: dict[int, dict[str, Any]] = {}
    with np.load(stored, allow_pickle=False) as content:
        for key in content.files:
            number, name = key.split("/", 1)
            feeds.setdefault(int(number), {})[name] = content[key]
    quantize(source, [feeds[number] for number in sorted(feeds)], target)


if __name__ == "__main__":
    main()
