"""What every graph of a chain sees on real texts: the ground for int8 ranges.

Runs the fp32 graphs through ONNX Runtime and keeps their inputs. Needs neither torch nor
onnx.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.folder import verified_graph
from ..runtime.artifact.manifest import ATTENTION_BIAS, MASK_FILL, NEXT, Manifest, TokenizerSpec
from ..runtime.encoding import EncodedRow

Feed = dict[str, NDArray[Any]]

_BATCH = 16


def padded_inputs(
    rows: Sequence[EncodedRow], tokenizer: TokenizerSpec, batch: int = _BATCH
) -> Iterator[Feed]:
    """Model inputs of rows, in padded batches: ids and types int64, attention bias float32.

    Args:
        rows: tokenized rows.
        tokenizer: says what padding is.
        batch: rows in a batch.
    """
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        shape = (len(part), max(len(row) for row in part))
        feed: Feed = {
            "input_ids": np.full(shape, tokenizer.pad_id, np.int64),
            "token_type_ids": np.full(shape, tokenizer.pad_type_id, np.int64),
            ATTENTION_BIAS: np.full((shape[0], 1, 1, shape[1]), MASK_FILL, np.float32),
        }
        for name, array in feed.items():
            for number, row in enumerate(part):
                array[number, ..., : len(row)] = row.model_input(name)
        yield feed


def graph_inputs(
    folder: Path, manifest: Manifest, rows: Sequence[EncodedRow], batch: int = _BATCH
) -> dict[str, list[Feed]]:
    """The inputs of every graph on some rows, in fp32.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        rows: tokenized rows.
        batch: rows in a batch.

    Returns:
        By graph, one feed for each batch and call.
    """
    import onnxruntime as ort

    from ..runtime.backends.onnxruntime_session import session_options

    states = list(padded_inputs(rows, manifest.tokenizer, batch))
    found: dict[str, list[Feed]] = {name: [] for name in manifest.graphs}
    sessions: dict[str, Any] = {}
    for name in [call for segment in manifest.segments for call in segment.calls]:
        graph = manifest.graphs[name]
        if name not in sessions:
            path = str(verified_graph(folder, graph.file, graph.sha256))
            sessions = {
                name: ort.InferenceSession(
                    path, session_options(), providers=["CPUExecutionProvider"]
                )
            }
        outputs = [spec.name for spec in graph.outputs]
        for state in states:
            feed = {spec.name: state[spec.name] for spec in graph.inputs}
            found[name].append(feed)
            values = sessions[name].run(outputs, feed)
            state |= {k.removeprefix(NEXT): v for k, v in zip(outputs, values, strict=True)}
    return found
