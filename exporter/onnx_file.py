"""ONNX graphs of an engines folder: each is one file, with its weights inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..runtime.artifact.folder import sha256_of, verified_graph
from ..runtime.artifact.manifest import Graph, TensorSpec
from ..runtime.errors import ModelError


def load_graphs(folder: Path, graphs: Mapping[str, Graph]) -> dict[str, Any]:
    """The graphs by name, each an `onnx.ModelProto`.

    Args:
        folder: the engines folder.
        graphs: their records.

    Raises:
        ArtifactError: a file is missing, damaged, or holds what the exporter never writes.
    """
    import onnx

    return {
        name: onnx.load(verified_graph(folder, graph.file, graph.sha256))
        for name, graph in graphs.items()
    }


def write_graph(
    path: Path, file: str, proto: Any, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]
) -> Graph:
    """Write a graph and give its record.

    Args:
        path: where to write it.
        file: its path in the engines folder, which may differ until a staging folder is published.
        proto: an `onnx.ModelProto`.
        inputs: its inputs, in order.
        outputs: its outputs, in order.

    Raises:
        ModelError: it is larger than protobuf allows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serialized(proto, path.name))
    return Graph(file=file, sha256=sha256_of(path), inputs=tuple(inputs), outputs=tuple(outputs))


def strip(proto: Any) -> None:
    """Remove notes of tools, which differ from run to run or name files of this machine."""
    nodes = [*proto.graph.node, *(node for f in proto.functions for node in f.node)]
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    for item in [proto, proto.graph, *nodes, *values, *proto.graph.initializer]:
        item.ClearField("metadata_props")
        item.ClearField("doc_string")


def serialized(proto: Any, what: str) -> bytes:
    """The checked content of an ONNX file; the same graph always gives the same bytes.

    Weights are never kept in other files, because the runtime refuses such graphs.

    Args:
        proto: an `onnx.ModelProto`.
        what: what the message calls it.

    Raises:
        ModelError: it is larger than protobuf allows.
    """
    import onnx
    from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

    try:
        content = bytes(proto.SerializeToString(deterministic=True))
    except EncodeError as error:
        raise ModelError(
            f"{what} does not fit into one ONNX file, which holds at most 2 GiB: {error}",
            "keep more `exits`, so that fewer layers lie between two of them",
        ) from error
    onnx.checker.check_model(content)
    return content


def in_head(node: str) -> bool:
    """Whether a node of this name belongs to an exit head, which always stays in fp32.

    `segments` names nodes by their modules, such as `head.classifier/linear_5`.
    """
    return node.split("/")[0].split(".")[0] == "head"
