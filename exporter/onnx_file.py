"""ONNX graphs of an engines folder: each is one file, with its weights inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.folder import EnginesFolder, sha256_of
from ..runtime.artifact.manifest import LOGITS, NEXT, Graph, Manifest, Target, TensorSpec
from ..runtime.encoding import Arrays
from ..runtime.errors import ModelError

OPSET = 20
_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


def load_graphs(engines: EnginesFolder, graphs: Mapping[str, Graph]) -> dict[str, Any]:
    """The graphs by name, each an `onnx.ModelProto`.

    Args:
        engines: the engines folder.
        graphs: their records.

    Raises:
        ArtifactError: a file is missing, damaged, or holds what the exporter never writes.
    """
    import onnx

    return {name: onnx.load(engines.graph(graph)) for name, graph in graphs.items()}


def graphs_of(manifest: Manifest, target: Target) -> dict[str, Graph]:
    """The graphs of a manifest by name; those that a target has built are its own files."""
    return manifest.graphs | {
        name: msgspec.structs.replace(manifest.graphs[name], file=file.file, sha256=file.sha256)
        for name, file in target.files.items()
    }


def write_graph(path: Path, file: str, proto: Any) -> Graph:
    """Write a checked graph and give its record; the same graph always gives the same bytes.

    Weights are never kept in other files, because the runtime refuses such graphs.

    Args:
        path: where to write it.
        file: its path in the engines folder, which may differ until a staging folder is published.
        proto: an `onnx.ModelProto`.

    Raises:
        ModelError: it is larger than protobuf allows.
    """
    import onnx
    from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

    try:
        content = proto.SerializeToString(deterministic=True)
    except EncodeError as error:
        raise ModelError(
            f"{path.name} does not fit into one ONNX file, which holds at most 2 GiB: {error}",
            "export again with more `exits`, so that fewer layers lie between two of them",
        ) from error
    onnx.checker.check_model(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    graph = proto.graph
    return Graph(
        file=file,
        sha256=sha256_of(path),
        inputs=_specs(graph.input),
        outputs=_specs(graph.output),
    )


def _specs(values: Iterable[Any]) -> tuple[TensorSpec, ...]:
    from onnx import TensorProto

    names = {TensorProto.INT64: "int64", TensorProto.FLOAT: "float32"}
    return tuple(
        TensorSpec(
            name=value.name,
            dtype=names.get(value.type.tensor_type.elem_type, "float16"),
            shape=tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for value in values
    )


def strip(proto: Any) -> None:
    """Remove notes of tools, which differ from run to run or name files of this machine."""
    nodes = [*proto.graph.node, *(node for f in proto.functions for node in f.node)]
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    for item in [proto, proto.graph, *nodes, *values, *proto.graph.initializer]:
        item.ClearField("metadata_props")
        item.ClearField("doc_string")


def in_head(node: str) -> bool:
    """Whether a node of this name belongs to an exit head, which always stays in fp32.

    `segments` names nodes by their modules, such as `head.classifier/linear_5`.
    """
    return node.split("/")[0].split(".")[0] == "head"


@dataclass(frozen=True, slots=True)
class GraphRun:
    """One graph, run on one batch.

    Attributes:
        call: number of the call in the chain, from 0; a shared graph is called several times.
        graph: name of the graph.
        batch: number of the batch, from 0.
        inputs: what the graph read, by input name.
        outputs: what it gave, by output name. Later graphs read these values. A caller may
            replace them before it asks for the next run.
    """

    call: int
    graph: str
    batch: int
    inputs: Arrays
    outputs: Arrays


def graph_runs(
    manifest: Manifest, batches: Iterable[Arrays], open_session: Callable[[str], Any]
) -> Iterator[GraphRun]:
    """Run the calls of the chain one after another, each on all batches, to see every tensor.

    This serves checks and measurements of an export; the engine runs segments through `Execution`.
    Only one graph is in memory at a time, together with the tensors of all batches.

    Args:
        manifest: says which segment calls which graphs.
        batches: the model inputs of each batch, see `padded_batches`.
        open_session: gives the session of a graph by the graph's name.

    Yields:
        One run for each call and batch, in this order.
    """
    states = [dict(batch) for batch in batches]
    calls = [name for segment in manifest.segments for name in segment.calls]
    session: Any = None
    loaded = ""
    for call, name in enumerate(calls):
        if name != loaded:
            session = None  # so that two graphs are never in memory together
            session = open_session(name)
            loaded = name
        # The mask of fp16 graphs is in fp16, too.
        types = {value.name: _TYPES[value.type] for value in session.get_inputs()}
        output_names = [value.name for value in session.get_outputs()]
        for batch, state in enumerate(states):
            inputs = {key: state[key].astype(each, copy=False) for key, each in types.items()}
            values = session.run(output_names, inputs)
            run = GraphRun(call, name, batch, inputs, dict(zip(output_names, values, strict=True)))
            yield run
            state |= {key.removeprefix(NEXT): value for key, value in run.outputs.items()}


def chain_logits(
    manifest: Manifest, batches: Iterable[Arrays], open_session: Callable[[str], Any]
) -> NDArray[np.float32]:
    """The logits `[segments, rows, labels]` of the chain, see `graph_runs`."""
    logits: dict[int, list[NDArray[np.float32]]] = {}
    for run in graph_runs(manifest, batches, open_session):
        if LOGITS in run.outputs:
            logits.setdefault(run.call, []).append(run.outputs[LOGITS])
    return np.stack([np.concatenate(parts) for parts in logits.values()])
