"""int8: Q/DQ nodes around the matrix products with weights; the ranges come from real texts.

    python -m fpabee.exporter.targets.int8 < request.json

For TensorRT, they are symmetric, and what is not quantized is in fp16. For CPUs, activations are
unsigned, see `exporter.targets.cpu`. Graphs are quantized in a process of its own: the quantizers
load PyTorch, print and log, and may need more memory than there is.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from ...runtime.artifact.folder import read_manifest, verified_graph
from ...runtime.artifact.manifest import Manifest
from ...runtime.encoding import (
    Arrays,
    EncodedRow,
    Text,
    TextEncoder,
    padded_batches,
    padding_values,
)
from ...runtime.errors import InputError, VerificationError
from ...runtime.progress import Progress
from ..onnx_file import graph_runs, in_head, strip
from .worker import run_worker

_LEAST_TEXTS = 32
_MOST_TEXTS = 256


def split_texts(texts: Sequence[Text]) -> tuple[Sequence[Text], Sequence[Text]]:
    """Of the first 512 texts: those that give the ranges, and those that judge the result.

    Raises:
        InputError: too few texts.
    """
    if len(texts) < _LEAST_TEXTS:
        raise InputError(
            f"int8 ranges need at least {_LEAST_TEXTS} texts, but there are {len(texts)}",
            "give a few hundred texts like those to classify as `calibration_data`",
        )
    used = texts[: 2 * _MOST_TEXTS]
    return used[::2], used[1::2]


def quantize(
    folder: Path, manifest: Manifest, texts: Sequence[Text], form: str, progress: Progress
) -> dict[str, Any]:
    """The graphs with Q/DQ nodes, made in a separate process.

    Args:
        folder: the engines folder.
        manifest: its manifest, as it is written there.
        texts: texts that give the ranges.
        form: one of `FORMS`.
        progress: called with (what, done, total).

    Raises:
        VerificationError: a graph could not be quantized, or memory or space is lacking.
    """
    progress("int8 graphs", 0, 1)
    with tempfile.TemporaryDirectory() as temporary:
        request = Int8Request(folder=str(folder), texts=list(texts), form=form, output=temporary)
        error = run_worker("int8", request)
        paths = {name: Path(temporary) / f"{name}.onnx" for name in manifest.graphs}
        if error:
            failed = next((name for name in paths if not paths[name].exists()), "a graph")
            raise VerificationError(
                f"{failed} could not be quantized: {error}",
                "if memory or disk space is lacking, free some, or give fewer or shorter texts; "
                "else use another precision, and report this with your model's config.json",
            )
        return {name: onnx.load(path) for name, path in paths.items()}


class Int8Request(msgspec.Struct, frozen=True, kw_only=True):
    """Graphs to quantize, see `quantize`; `output` is the folder to write them to."""

    folder: str
    texts: list[Text]
    form: str
    output: str


def main() -> None:
    """Quantize what the request on standard input asks for."""
    os.environ["NNCF_CI"] = "1"  # NNCF reports its use to Intel otherwise
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Int8Request)
    folder = Path(request.folder)
    manifest = read_manifest(folder)
    rows = TextEncoder(folder, manifest.tokenizer).encode(request.texts)
    for name, batches in graph_inputs(folder, manifest, rows):
        proto = FORMS[request.form](folder / manifest.graphs[name].file, batches)
        strip(proto)
        onnx.save(proto, Path(request.output) / f"{name}.onnx")


def graph_inputs(
    folder: Path, manifest: Manifest, rows: Sequence[EncodedRow], batch: int = 16
) -> Iterator[tuple[str, list[Arrays]]]:
    """The inputs of every graph on some rows, from which int8 ranges are taken.

    Runs the fp32 graphs through ONNX Runtime.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        rows: tokenized rows.
        batch: rows in a batch.

    Yields:
        The name of a graph, and its inputs in each call on each batch.
    """

    def open_session(name: str) -> Any:
        graph = manifest.graphs[name]
        path = verified_graph(folder, graph.file, graph.sha256)
        return ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    calls = [name for segment in manifest.segments for name in segment.calls]
    batches = list(padded_batches(rows, padding_values(manifest.tokenizer), batch))
    inputs: dict[str, list[Arrays]] = {}
    for run in graph_runs(manifest, batches, open_session):
        inputs.setdefault(run.graph, []).append(run.inputs)
        if run.batch == len(batches) - 1 and run.graph not in calls[run.call + 1 :]:
            yield run.graph, inputs.pop(run.graph)


def symmetric(source: Path, batches: list[Arrays]) -> Any:
    """A graph with symmetric Q/DQ around every product with a weight, except in heads."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    reader = SimpleNamespace(get_next=partial(next, iter(batches), None))
    with tempfile.TemporaryDirectory() as temporary:
        quantized = Path(temporary) / "quantized.onnx"
        quantize_static(
            source,
            quantized,
            reader,
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


def smooth(source: Path, batches: list[Arrays]) -> Any:
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

if __name__ == "__main__":
    main()
