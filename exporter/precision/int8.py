"""int8 for TensorRT: explicit, symmetric Q/DQ nodes around the matrix products with weights.

The ranges come from the user's own texts. What is not quantized is in fp16, as TensorRT runs it.
ONNX Runtime needs unsigned activations on the CPU, so these graphs are not for its CPU target.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...calibration.activations import graph_inputs
from ...runtime.artifact.folder import verified_graph
from ...runtime.artifact.manifest import Manifest
from ...runtime.artifact.reference import read_reference
from ...runtime.encoding import Arrays, Text, TextEncoder
from ...runtime.errors import InputError, Remedy, VerificationError
from ...runtime.exit_0 import ExitZero
from ...runtime.progress import Progress, silent
from ...runtime.rules.base import ExitRule
from ..onnx_file import load_graphs
from .emulation import PrecisionReport, report_on, run_emulated
from .float16 import with_lowered
from .formats import INT8, Half
from .lowering import LoweredGraphs, choose_lowering

_FOLDER = "onnx/int8-qdq"
_LEAST_TEXTS = 32
_MOST_TEXTS = 256


def add_int8(
    folder: Path,
    manifest: Manifest,
    rule: ExitRule,
    texts: Sequence[Text],
    progress: Progress = silent,
) -> tuple[Manifest, PrecisionReport]:
    """Quantize the graphs to `onnx/int8-qdq/`, if enough labels and exits stay the same.

    Args:
        folder: the engines folder.
        manifest: its manifest. The one with the new graphs is returned, not written.
        rule: the rule whose exits must stay the same.
        texts: at least 32 texts like those that will be classified, of which the first 512 are
            used. Every other text gives the ranges. The agreement is measured on the rest, and on
            the texts of `reference.npz`.
        progress: called with (what, done, total).

    Returns:
        The manifest with the new graphs, and what was found.

    Raises:
        InputError: too few texts.
        VerificationError: too many labels or exits change.
    """
    if len(texts) < _LEAST_TEXTS:
        raise InputError(
            f"int8 ranges need at least {_LEAST_TEXTS} texts, but there are {len(texts)}",
            Remedy("give a few hundred texts like those to classify as {calibration_data}"),
        )
    encoder = TextEncoder(folder, manifest.tokenizer)
    rows = encoder.encode(texts[: 2 * _MOST_TEXTS])
    ranges, judged = rows[::2], rows[1::2]
    progress("int8 ranges", 0, len(manifest.graphs))
    inputs = graph_inputs(folder, manifest, ranges)
    quantized: dict[str, Any] = {}
    for number, (name, graph) in enumerate(manifest.graphs.items()):
        progress(f"int8 {name}", number, len(manifest.graphs))
        path = verified_graph(folder, graph.file, graph.sha256)
        quantized[name] = _quantize(name, path, inputs.pop(name))
    lowerings = {name: choose_lowering(proto) for name, proto in quantized.items()}
    graphs = LoweredGraphs(quantized, Half.FP16, lowerings)
    exact = LoweredGraphs(load_graphs(folder, manifest.graphs), Half.FP16)
    fp32 = run_emulated(manifest, exact, judged, progress)
    known, logits = read_reference(folder, manifest)
    exit_0 = ExitZero.load(folder, manifest)
    first = [] if exit_0 is None else [exit_0(judged)]
    expected = np.concatenate([logits, np.stack([*first, *fp32.logits])], axis=1)
    rows = [*encoder.encode(known), *judged]
    found = run_emulated(manifest, graphs, rows, progress)
    report = report_on(found, expected, manifest, INT8, rule, graphs)
    report.check(Remedy("give more texts as {calibration_data}, or stay with fp16"))
    return with_lowered(folder, manifest, INT8, _FOLDER, graphs), report


def _quantize(name: str, path: Path, inputs: Sequence[Arrays]) -> Any:
    """The graph with Q/DQ nodes, made in a separate process, see `int8_worker`."""
    import onnx

    with tempfile.TemporaryDirectory() as temporary:
        stored, target = Path(temporary) / "inputs.npz", Path(temporary) / "quantized.onnx"
        arrays = {f"{n}/{key}": v for n, batch in enumerate(inputs) for key, v in batch.items()}
        np.savez(stored, **arrays)  # type: ignore[arg-type]
        worker = [sys.executable, "-m", "fpabee.exporter.precision.int8_worker"]
        command = [*worker, str(path), str(stored), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise VerificationError(
                f"{name} could not be quantized: {lines[-1]}",
                "stay with fp16, and please report this with your model's config.json",
            )
        return onnx.load(target)
