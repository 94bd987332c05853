"""The graphs of an engines folder in fp16.

Before they are written, it is checked on real texts that the model still gives the same labels and
exits. For this, the chain runs with every rounding in place, see `lowering.emulate`. This needs no
GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from ...calibration.progress import Progress
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import LOGITS
from ...runtime.artifact.reference import read_reference
from ...runtime.backends.onnxruntime import cpu_session, session_options
from ...runtime.check import Logits
from ...runtime.encoding import Text, TextEncoder, padded_batches, padding_values
from ...runtime.rules.rules import ExitRule
from ..onnx_file import graph_runs, load_graphs
from .check import judged
from .lowering import emulate, lower

_BATCH = 16


def lowered_graphs(
    engines: EnginesFolder, more: tuple[Sequence[Text], Logits] | None, progress: Progress
) -> dict[str, Any]:
    """The graphs in fp16, after a check that they give the answers of the fp32 model.

    Args:
        engines: the engines folder.
        more: texts to check with besides the reference texts, and their logits in fp32.
        progress: called with (what, done, total).

    Returns:
        Each graph as an `onnx.ModelProto`, by its name.

    Raises:
        CheckError: values overflow, or too many labels or exits change.
        ModelError: a weight does not fit into fp16.
    """
    manifest = engines.manifest
    protos = load_graphs(engines, manifest.graphs)
    texts, expected = read_reference(engines)
    if more is not None:
        texts = [*texts, *more[0]]
        expected = np.concatenate([expected, more[1]], axis=1)
    rows = TextEncoder(engines.path, manifest.tokenizer).encode(texts)

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
    emulated = np.stack([np.concatenate(part) for part in logits.values()])
    # Without exit 0, which no precision changes.
    exact = expected[-len(emulated) :]
    rule = ExitRule.from_dict(manifest.default_rule)
    judged(emulated, exact, manifest, rule, "fp16")
    return {name: lower(proto) for name, proto in protos.items()}
