"""Write an engines folder's graphs in fp16, to `onnx/fp16/` or, with Q/DQ nodes, `onnx/int8/`.

Before, it is checked on real texts that the model still gives the same labels and exits. For this,
the chain runs with every rounding in place, see `lowering.emulate`. This needs no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort

from ...runtime.agreement import Agreement, Logits
from ...runtime.artifact.manifest import LOGITS, Manifest
from ...runtime.artifact.reference import read_reference
from ...runtime.backends.onnxruntime import cpu_session, session_options
from ...runtime.encoding import Text, TextEncoder, padded_batches, padding_values
from ...runtime.progress import Progress
from ...runtime.rules.rules import ExitRule
from ..onnx_file import graph_runs, write_graph
from ..staging import replacing
from .check import exact_logits, judged
from .lowering import emulate, lower

_BATCH = 16


def add_lowered(
    folder: Path,
    manifest: Manifest,
    precision: str,
    protos: Mapping[str, Any],
    texts: Sequence[Text],
    progress: Progress,
) -> tuple[Manifest, Agreement]:
    """Check graphs in fp16 and write them. They replace earlier ones only when all are written.

    Args:
        folder: the engines folder.
        manifest: its manifest. The one with the new graphs is returned, not written.
        precision: what the manifest calls them.
        protos: the graphs by name, each an `onnx.ModelProto` in fp32 or with Q/DQ nodes.
        texts: more texts to check with than those of `reference.npz`, of which 2,000 are used.
        progress: called with (what, done, total).

    Returns:
        The manifest with the new graphs, and how closely they agree with the fp32 model.

    Raises:
        VerificationError: values overflow, or too many labels or exits change.
        ModelError: a weight does not fit into fp16.
    """
    known, expected = read_reference(folder, manifest)
    # The reference may hold the same texts already, from the export's own verification.
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        new, exact = exact_logits(folder, manifest, new)
        expected = np.concatenate([expected, exact], axis=1)
    rows = TextEncoder(folder, manifest.tokenizer).encode([*known, *new])

    def open_session(name: str) -> Any:
        options = session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return cpu_session(emulate(protos[name]).SerializeToString(), options)

    calls = sum(len(segment.calls) for segment in manifest.segments)
    batches = padded_batches(rows, padding_values(manifest.tokenizer), _BATCH)
    logits: dict[int, list[Logits]] = {}
    for run in graph_runs(manifest, batches, open_session):
        if run.batch == 0:
            progress("emulate the chain", run.call, calls)
        if LOGITS in run.outputs:
            logits.setdefault(run.call, []).append(run.outputs[LOGITS])
    found = np.stack([np.concatenate(part) for part in logits.values()])
    rule = ExitRule.from_dict(manifest.default_rule)
    # Without exit 0, which no precision changes.
    agreement = judged(found, expected[-len(found) :], manifest, rule, precision)
    place = f"onnx/{precision}"
    graphs = {}
    with replacing(folder / place) as temporary:
        for number, (name, proto) in enumerate(protos.items()):
            progress(f"{precision} {name}", number, len(protos))
            file = f"{name}.onnx"
            graphs[name] = write_graph(temporary / file, f"{place}/{file}", lower(proto))
    precisions = {**manifest.precisions, precision: graphs}
    return msgspec.structs.replace(manifest, precisions=precisions), agreement
