"""Check on real texts that a model still gives the same labels and exits in a precision.

This happens before the graphs are written. The chain runs with every rounding in place, see
`lowering.emulate`. This needs neither torch nor a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ...runtime.agreement import REQUIREMENTS, Agreement, Logits, compare, must_pass
from ...runtime.artifact.manifest import LOGITS, Manifest
from ...runtime.artifact.reference import read_reference
from ...runtime.backends.onnxruntime_session import cpu_session, session_options
from ...runtime.backends.stepping import steps
from ...runtime.encoding import EncodedRow, Text, TextEncoder, padded_batches, padding_values
from ...runtime.errors import VerificationError
from ...runtime.exit_0 import ExitZero
from ...runtime.progress import Progress
from ...runtime.rules.rules import ExitRule
from ..exact import exact_logits
from .lowering import emulate

_BATCH = 16


def check_emulated(
    folder: Path,
    manifest: Manifest,
    precision: str,
    protos: Mapping[str, Any],
    texts: Sequence[Text],
    hint: str,
    progress: Progress,
) -> Agreement:
    """Run texts through graphs as if they were lowered, and compare with the fp32 model.

    Args:
        folder: the engines folder.
        manifest: its manifest. Exits are those of the default rule.
        precision: the precision that is checked.
        protos: the graphs that will be lowered, by name, each an `onnx.ModelProto`.
        texts: more texts than those of `reference.npz`, of which 2,000 are used.
        hint: what to do if they differ.
        progress: called with (what, done, total).

    Raises:
        VerificationError: values overflow, or too many labels or exits change.
        ModelError: a weight does not fit into fp16.
    """
    known, expected = read_reference(folder, manifest)
    # The reference may hold the same texts already, from the export's own verification.
    new = [text for text in dict.fromkeys(texts) if text not in known]
    if new:
        new, logits = exact_logits(folder, manifest, new)
        expected = np.concatenate([expected, logits], axis=1)
    rows = TextEncoder(folder, manifest.tokenizer).encode([*known, *new])
    found = _run(manifest, precision, protos, rows, hint, progress)
    exit_0 = ExitZero.load(folder, manifest)
    if exit_0 is not None:  # it runs as always, because no precision changes it
        found.insert(0, exit_0(rows))
    agreement = compare(
        np.stack(found),
        expected,
        ExitRule.from_dict(manifest.default_rule),
        manifest.task,
        REQUIREMENTS[precision],
        manifest.exits.start,
    )
    must_pass(agreement, f"{precision} changes answers", hint)
    return agreement


def _run(
    manifest: Manifest,
    precision: str,
    protos: Mapping[str, Any],
    rows: Sequence[EncodedRow],
    hint: str,
    progress: Progress,
) -> list[Logits]:
    """The logits `[rows, labels]` of each exit from exit 1 on, with every rounding in place."""

    def open_session(name: str) -> Any:
        options = session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return cpu_session(emulate(protos[name]).SerializeToString(), options)

    calls = sum(len(segment.calls) for segment in manifest.segments)
    batches = padded_batches(rows, padding_values(manifest.tokenizer), _BATCH)
    logits: dict[int, list[Logits]] = {}
    for step in steps(manifest, batches, open_session):
        if step.batch == 0:
            progress("emulate the chain", step.call, calls)
        if not all(np.isfinite(value).all() for value in step.outputs.values()):
            raise VerificationError(
                f"in {precision}, {step.graph} gives values that are not finite numbers", hint
            )
        if LOGITS in step.outputs:
            logits.setdefault(step.call, []).append(step.outputs[LOGITS])
    return [np.concatenate(part) for part in logits.values()]
