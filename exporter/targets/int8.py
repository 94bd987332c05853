"""int8 for TensorRT: explicit, symmetric Q/DQ nodes around the matrix products with weights.

The ranges come from the user's own texts. What is not quantized is in fp16, as TensorRT runs it.
CPUs need unsigned activations, see `exporter.targets.cpu_int8`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ...runtime.agreement import Agreement
from ...runtime.artifact.folder import verified_graph
from ...runtime.artifact.manifest import Manifest
from ...runtime.backends.onnxruntime import cpu_session, ort_errors
from ...runtime.encoding import (
    Arrays,
    EncodedRow,
    Text,
    TextEncoder,
    padded_batches,
    padding_values,
)
from ...runtime.errors import InputError, VerificationError, first_line
from ...runtime.progress import Progress, silent
from .backends import INT8
from .fp16 import add_lowered
from .stepping import steps

T = TypeVar("T")

_LEAST_TEXTS = 32
_MOST_TEXTS = 256


def add_int8(
    folder: Path, manifest: Manifest, texts: Sequence[Text], progress: Progress = silent
) -> tuple[Manifest, Agreement]:
    """Quantize the graphs to `onnx/int8/`, if enough labels and exits stay the same.

    Args:
        folder: the engines folder.
        manifest: its manifest. The one with the new graphs is returned, not written.
        texts: at least 32 texts like those that will be classified, of which the first 512 are
            used. Every other text gives the ranges. The agreement is measured on the rest, and on
            the texts of `reference.npz`.
        progress: called with (what, done, total).

    Returns:
        The manifest with the new graphs, and how closely they agree with the fp32 model.

    Raises:
        InputError: too few texts.
        VerificationError: too many labels or exits change.
    """
    ranges, others = split_texts(texts)
    rows = TextEncoder(folder, manifest.tokenizer).encode(ranges)
    quantized = quantize(folder, manifest, rows, "symmetric", progress)
    hint = "give more texts as `calibration_data`, or stay with fp16"
    return add_lowered(folder, manifest, INT8, quantized, others, hint, progress)


def split_texts(texts: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """Of the first 512 texts or rows: those that give the ranges, and those that judge the result.

    Raises:
        InputError: too few texts.
    """
    if len(texts) < _LEAST_TEXTS:
        raise InputError(
            f"int8 ranges need at least {_LEAST_TEXTS} texts, but there are {len(texts)}",
            "give a few hundred texts like those to classify as `calibration_data`",
        )
    used = texts[: 2 * _MOST_TEXTS]
    return used[::2], used[1::2]


def graph_inputs(
    folder: Path, manifest: Manifest, rows: Sequence[EncodedRow], batch: int = 16
) -> Iterator[tuple[str, Arrays]]:
    """The inputs of every graph on some rows, from which int8 ranges are taken.

    Runs the fp32 graphs through ONNX Runtime.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        rows: tokenized rows.
        batch: rows in a batch.

    Yields:
        The name of a graph and its inputs, for each call on each batch.
    """

    def open_session(name: str) -> Any:
        graph = manifest.graphs[name]
        return cpu_session(verified_graph(folder, graph.file, graph.sha256))

    batches = padded_batches(rows, padding_values(manifest.tokenizer), batch)
    for step in steps(manifest, batches, open_session):
        yield step.graph, step.inputs


def quantize(
    folder: Path, manifest: Manifest, rows: Sequence[EncodedRow], form: str, progress: Progress
) -> dict[str, Any]:
    """The graphs with Q/DQ nodes, made in a separate process, see `int8_worker`.

    Args:
        folder: the engines folder.
        manifest: its manifest.
        rows: tokenized rows that give the ranges.
        form: one of the forms of `int8_worker`.
        progress: called with (what, done, total).

    Raises:
        VerificationError: a graph could not be quantized, or memory or space is lacking.
    """
    import onnx

    progress("int8 ranges", 0, 1)
    with tempfile.TemporaryDirectory() as temporary:
        arguments: list[str] = []
        targets = {name: Path(temporary) / f"{name}.onnx" for name in manifest.graphs}
        stored = {name: Path(temporary) / name for name in manifest.graphs}
        for name, graph in manifest.graphs.items():
            stored[name].mkdir()
            path = verified_graph(folder, graph.file, graph.sha256)
            arguments += [str(path), str(stored[name]), str(targets[name])]
        # On disk, since the inputs of all graphs may be larger than the memory.
        failures: tuple[type[Exception], ...] = (OSError, *ort_errors())
        try:
            for number, (name, inputs) in enumerate(graph_inputs(folder, manifest, rows)):
                np.savez(stored[name] / f"{number:08d}.npz", **inputs)  # type: ignore[arg-type]
        except failures as error:
            raise VerificationError(
                f"the inputs of the graphs cannot be collected in {temporary}: {first_line(error)}",
                "free some memory, and space there, or give fewer or shorter texts",
            ) from error
        progress("int8 graphs", 0, 1)
        worker = [sys.executable, "-m", "fpabee.exporter.targets.int8_worker"]
        done = subprocess.run(
            [*worker, form, *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            failed = next((name for name in targets if not targets[name].exists()), "a graph")
            lines = done.stderr.strip().splitlines() or ["no reason given"]
            hint = "use another precision, and report this with your model's config.json"
            if done.returncode == -9:  # SIGKILL, which Windows does not have
                lines.append("the system ended the process, probably for lack of memory")
                hint = "free some memory, or give fewer or shorter texts"
            raise VerificationError(f"{failed} could not be quantized: {lines[-1]}", hint)
        return {name: onnx.load(target) for name, target in targets.items()}
