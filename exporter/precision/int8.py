"""int8 for TensorRT: explicit, symmetric Q/DQ around the matrix products with weights.

Ranges come from the user's own texts. What is not quantized is in fp16, as TensorRT runs
it. ONNX Runtime's CPU wants unsigned activations, so these graphs are not for it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ...calibration.activations import graph_inputs
from ...runtime.artifact.folder import verified_graph
from ...runtime.artifact.manifest import Manifest
from ...runtime.artifact.reference import read_reference
from ...runtime.encoding import Arrays, Text, TextEncoder
from ...runtime.errors import InputError, VerificationError
from ...runtime.progress import Progress, silent
from ...runtime.rules.rules import ExitRule
from ..staging import replacing
from .float16 import Emulation, PrecisionReport, record_of, report_of
from .formats import INT8, Half
from .rounding import choose_lowering, lower

FOLDER = "int8-qdq"

_LEAST_TEXTS = 32
_MOST_TEXTS = 256


def add_int8(
    folder: Path,
    manifest: Manifest,
    rule: ExitRule,
    texts: Sequence[Text],
    progress: Progress = silent,
) -> tuple[Manifest, PrecisionReport]:
    """Quantize the graphs to `onnx/int8-qdq/`, if labels and exits stay.

    Args:
        folder: the engines folder.
        manifest: its manifest; the one with the new graphs is returned, not written.
        rule: whose exits must stay.
        texts: from the same source as what will be classified; a part of them gives the
            ranges, and the rest is what agreement is measured on.
        progress: called with (what, done, total).

    Raises:
        InputError: too few texts.
        VerificationError: labels or exits change by more than the bar.
    """
    if len(texts) < _LEAST_TEXTS:
        raise InputError(
            f"--calibration-data holds {len(texts)} texts; int8 ranges need at least "
            f"{_LEAST_TEXTS}",
            "give a few hundred texts like those that will be classified",
        )
    rows = TextEncoder(folder, manifest.tokenizer).encode(texts[: 2 * _MOST_TEXTS])
    ranges, judged = rows[::2], rows[1::2]
    progress("int8 ranges", 0, len(manifest.graphs))
    feeds = graph_inputs(folder, manifest, ranges)
    quantized: dict[str, Any] = {}
    for number, (name, graph) in enumerate(manifest.graphs.items()):
        progress(f"int8 {name}", number, len(manifest.graphs))
        path = verified_graph(folder, graph.file, graph.sha256)
        quantized[name] = _quantize(name, path, feeds.pop(name))
    plans = {name: choose_lowering(proto) for name, proto in quantized.items()}
    chain = Emulation(folder, manifest, quantized, Half.FP16, progress)
    fp32 = _fp32_chain(folder, manifest, progress)
    known, logits = read_reference(folder, manifest)
    reference = TextEncoder(folder, manifest.tokenizer).encode(known)
    everything = [*reference, *judged]
    expected = np.concatenate([logits, fp32.run(judged, fp32.exact).logits], axis=1)
    found = chain.run(everything, plans)
    report = report_of(manifest, INT8, rule, found, expected, plans, Half.FP16)
    if not report.passed:
        raise VerificationError(
            f"int8 changes answers from segment {report.agreement.first_bad_exit} on: "
            f"{report.agreement} of {report.rows} texts",
            "give more calibration texts, or stay with --fp16",
        )
    place = folder / "onnx" / FOLDER
    with replacing(place) as temporary:
        for name, proto in quantized.items():
            lowered = lower(proto, Half.FP16, plans[name]).SerializeToString(deterministic=True)
            (temporary / f"{name}.onnx").write_bytes(lowered)
    graphs = {
        name: record_of(
            folder, place / f"{name}.onnx", manifest.graphs[name], Half.FP16, plans[name]
        )
        for name in quantized
    }
    precisions = {**manifest.precisions, INT8: graphs}
    return msgspec.structs.replace(manifest, precisions=precisions), report


def _fp32_chain(folder: Path, manifest: Manifest, progress: Progress) -> Emulation:
    import onnx

    protos = {
        name: onnx.load(verified_graph(folder, graph.file, graph.sha256))
        for name, graph in manifest.graphs.items()
    }
    return Emulation(folder, manifest, protos, Half.FP16, progress)


def _quantize(name: str, path: Path, feeds: list[Arrays]) -> Any:
    """The graph with Q/DQ, made by a process of its own, see `int8_worker`."""
    import onnx

    with tempfile.TemporaryDirectory() as temporary:
        stored, target = Path(temporary) / "feeds.npz", Path(temporary) / "quantized.onnx"
        arrays = {f"{n}/{key}": v for n, feed in enumerate(feeds) for key, v in feed.items()}
        np.savez(stored, **arrays)  # type: ignore[arg-type]
        worker = [sys.executable, "-m", "fpabee.exporter.precision.int8_worker"]
        command = [*worker, str(path), str(stored), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            raise VerificationError(
                f"{name} could not be quantized: {lines[-1]}",
                "stay with --fp16, and please report this with your model's config.json",
            )
        return onnx.load(target)
