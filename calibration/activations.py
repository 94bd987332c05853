"""The inputs of every graph of a chain on real texts, from which int8 ranges are taken.

Runs the fp32 graphs through ONNX Runtime. Needs neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.artifact.folder import verified_graph
from ..runtime.artifact.manifest import Manifest
from ..runtime.encoding import Arrays, EncodedRow, padded_batches, padding_values

_BATCH = 16


def graph_inputs(
    folder: Path, manifest: Manifest, rows: Sequence[EncodedRow], batch: int = _BATCH
) -> dict[str, list[Arrays]]:
    """The inputs of every graph on some rows, in fp32.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        rows: tokenized rows.
        batch: rows in a batch.

    Returns:
        By graph, the inputs of each call on each batch.
    """
    from ..runtime.backends.onnxruntime_session import cpu_session
    from ..runtime.backends.stepping import steps

    def open_session(name: str) -> Any:
        graph = manifest.graphs[name]
        return cpu_session(verified_graph(folder, graph.file, graph.sha256))

    found: dict[str, list[Arrays]] = {name: [] for name in manifest.graphs}
    batches = padded_batches(rows, padding_values(manifest.tokenizer), batch)
    for step in steps(manifest, batches, open_session):
        found[step.graph].append(step.inputs)
    return found
