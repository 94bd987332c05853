"""int8: Q/DQ nodes around the matrix products with weights; the ranges come from real texts.

    python -m fpabee.exporter.targets.int8 < request.json

Graphs are quantized in a process of its own: the quantizer loads PyTorch, prints and logs, and may
need more memory than there is.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from ...calibration.progress import Progress
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.encoding import (
    Arrays,
    EncodedRow,
    Text,
    TextEncoder,
    padded_batches,
    padding_values,
)
from ...runtime.errors import CheckError
from ..onnx_file import graph_runs, in_head, strip
from .worker import run_worker


def quantize(engines: EnginesFolder, texts: Sequence[Text], progress: Progress) -> dict[str, Any]:
    """The graphs with Q/DQ nodes, made in a separate process.

    Args:
        engines: the engines folder, as it is written.
        texts: texts that give the ranges.
        progress: called with (what, done, total).

    Returns:
        Each graph as an `onnx.ModelProto`, by its name.

    Raises:
        CheckError: a graph could not be quantized, or memory or space is lacking.
    """
    progress("int8 graphs", 0, 1)
    with tempfile.TemporaryDirectory() as temporary:
        request = Int8Request(
            folder=str(engines.path),
            texts=list(texts),
            output=temporary,
        )
        error = run_worker("int8", request)
        paths = {name: Path(temporary) / f"{name}.onnx" for name in engines.manifest.graphs}
        if error:
            failed = next((name for name in paths if not paths[name].exists()), "a graph")
            raise CheckError(
                f"{failed} could not be quantized: {error}",
                "if memory or disk space is lacking, free some, or give fewer or shorter texts; "
                "else use another precision, and report this with your model's config.json",
            )
        return {name: onnx.load(path) for name, path in paths.items()}


class Int8Request(msgspec.Struct, frozen=True, kw_only=True):
    """Graphs to quantize, see `quantize`; `output` is the folder to write them to."""

    folder: str
    texts: list[Text]
    output: str


def main() -> None:
    """Quantize what the request on standard input asks for."""
    os.environ["NNCF_CI"] = "1"  # NNCF reports its use to Intel otherwise
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Int8Request)
    engines = EnginesFolder.read(request.folder)
    rows = TextEncoder(engines.path, engines.manifest.tokenizer).encode(request.texts)
    for name, batches in graph_inputs(engines, rows):
        proto = quantized(engines.path / engines.manifest.graphs[name].file, batches)
        strip(proto)
        onnx.save(proto, Path(request.output) / f"{name}.onnx")


def graph_inputs(
    engines: EnginesFolder, rows: Sequence[EncodedRow], batch: int = 16
) -> Iterator[tuple[str, list[Arrays]]]:
    """The inputs of every graph on some rows, from which int8 ranges are taken.

    Runs the fp32 graphs through ONNX Runtime.

    Args:
        engines: the engines folder.
        rows: tokenized rows.
        batch: rows in a batch.

    Yields:
        The name of a graph, and its inputs in each call on each batch.
    """
    manifest = engines.manifest

    def open_session(name: str) -> Any:
        path = engines.graph(manifest.graphs[name])
        return ort.InferenceSession(path, providers=["CPUExecutionProvider"])

    calls = [name for segment in manifest.segments for name in segment.calls]
    batches = list(padded_batches(rows, padding_values(manifest.tokenizer), batch))
    inputs: dict[str, list[Arrays]] = {}
    for run in graph_runs(manifest, batches, open_session):
        inputs.setdefault(run.graph, []).append(run.inputs)
        if run.batch == len(batches) - 1 and run.graph not in calls[run.call + 1 :]:
            yield run.graph, inputs.pop(run.graph)


def quantized(source: Path, batches: list[Arrays]) -> Any:
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
    _look_up_first(proto)
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


def _look_up_first(proto: Any) -> None:
    """Let tables be looked up in int8, and what was found be dequantized, which changes no value.

    Otherwise ONNX Runtime dequantizes the whole table of word embeddings in every run, which takes
    longer for a single text than all layers.
    """
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    users = Counter(name for node in graph.node for name in node.input)
    dequantized = {
        node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"
    }
    replaced: set[str] = set()
    nodes: list[Any] = []
    for node in graph.node:
        source = dequantized.get(node.input[0]) if node.op_type == "Gather" else None
        if source is None or not _is_symmetric_table(source, node, constants, users):
            nodes.append(node)
            continue
        replaced.add(source.output[0])
        table, scales = source.input[:2]
        (output,) = node.output
        ids = node.input[1]
        names = {part: f"{output}_{part}" for part in ("rows", "floats", "scales", "scale", "last")}
        last = numpy_helper.from_array(np.array([-1], np.int64), names["last"])
        graph.initializer.append(last)
        make = onnx.helper.make_node
        new = [
            make("Gather", [table, ids], [names["rows"]]),
            make("Cast", [names["rows"]], [names["floats"]], to=onnx.TensorProto.FLOAT),
            make("Gather", [scales, ids], [names["scales"]]),
            make("Unsqueeze", [names["scales"], names["last"]], [names["scale"]]),
            make("Mul", [names["floats"], names["scale"]], [output]),
        ]
        for each in new:
            each.name = f"{node.name}.{each.output[0]}"
        nodes += new
    kept = [node for node in nodes if node.output[0] not in replaced]
    del graph.node[:]
    graph.node.extend(kept)


def _is_symmetric_table(
    source: Any, lookup: Any, constants: Mapping[str, Any], users: Mapping[str, int]
) -> bool:
    """Whether a lookup alone reads a dequantized table with a scale for each row, around 0.

    Args:
        source: the node that dequantizes the table.
        lookup: the `Gather` node that reads it.
        constants: the initializers by name.
        users: how many nodes read each tensor.
    """
    table, scales, *zero_points = source.input
    axes = [attribute.i for node in (source, lookup) for attribute in node.attribute]
    return (
        users[source.output[0]] == 1
        and table in constants
        and scales in constants
        and list(constants[scales].dims) == list(constants[table].dims[:1])
        and axes == [0, 0]
        and not any(numpy_helper.to_array(constants[name]).any() for name in zero_points)
    )


def _heads(proto: Any) -> list[str]:
    return [node.name for node in proto.graph.node if in_head(node.name)]


def _products_of_activations(proto: Any) -> list[str]:
    """The names of products that have no weights, which are those within attention."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    products = [node for node in proto.graph.node if node.op_type == "MatMul"]
    return [node.name for node in products if not weights & set(node.input)]


if __name__ == "__main__":
    main()
