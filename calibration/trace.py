"""The trace of labelled rows: every exit of every row, run once and kept.

A trace is stored beside the artifact, `calibration/trace-TARGET-DATA.npz`, and used again as
long as the texts, the target's files and the tokenizer are the same.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.engine import Engine
from ..runtime.errors import ArtifactError, InputError
from ..runtime.manifest import Manifest
from ..runtime.metrics import encode_labels
from ..runtime.text_io import Row
from .scoring import Rows

_CHUNK = 256

Progress = Callable[[str, int, int], None]


def data_sha256(rows: Sequence[Row], labels: bool = True) -> str:
    """Hash of what rows say: their texts and, unless left out, their labels."""
    digest = hashlib.sha256()
    for row in rows:
        content = [row.text, row.text_pair, list(row.labels or ()) if labels else None]
        digest.update(json.dumps(content, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def artifact_sha256(manifest: Manifest, target: str) -> str:
    """Hash of what makes a target's logits: its files, libraries and tokenizer."""
    chosen = manifest.targets[target]
    graphs = manifest.graphs_in(chosen.precision)
    content = [
        sorted((name, graph.sha256) for name, graph in graphs.items()),
        sorted((name, file.sha256) for name, file in chosen.files.items()),
        [list(segment.calls) for segment in manifest.segments],
        [manifest.tokenizer.sha256, manifest.tokenizer.max_length],
        sorted(chosen.versions.items()),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def trace_rows(
    engine: Engine,
    rows: Sequence[Row],
    folder: Path,
    labels: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> Rows:
    """Run rows to full depth, or take what an earlier run kept.

    Args:
        engine: the engine.
        rows: the rows.
        folder: where traces are kept; it is made if it is not there.
        labels: whether the labels are read.
        progress: called with (what, done, total).

    Raises:
        InputError: a row has no label, or one that the model does not know; or the model
            gives logits that are not numbers.
        ArtifactError: the folder cannot be written.
    """
    manifest, task = engine.manifest, engine.manifest.task
    expected = None
    if labels:
        for row in rows:
            if row.labels is None:
                raise InputError(
                    f"line {row.line} has no label, and calibration needs one",
                    'add "label" or "labels" to every row, or give --unlabelled',
                )
        expected = encode_labels([row.labels or () for row in rows], task.labels, task.problem_type)
    texts = data_sha256(rows, labels=False)
    artifact = artifact_sha256(manifest, engine.target)
    path = folder / f"trace-{engine.target}-{texts[:12]}.npz"
    kept = _read(path, texts, artifact)
    if kept is None:
        kept = _run(engine, rows, progress)
        _write(path, texts, artifact, *kept)
    logits, lengths = kept
    return Rows(logits, lengths, expected, task.problem_type, task.cuts)


def _run(
    engine: Engine, rows: Sequence[Row], progress: Progress
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    parts = []
    for start in range(0, len(rows), _CHUNK):
        progress("trace", start, len(rows))
        parts.append(engine.trace([row.content for row in rows[start : start + _CHUNK]]))
    progress("trace", len(rows), len(rows))
    logits = np.concatenate([part.logits for part in parts], axis=1)
    bad = ~np.isfinite(logits).all(axis=(0, 2))
    if bad.any():
        raise InputError(
            f"the model gives logits that are not numbers for line {rows[int(bad.argmax())].line}",
            "check the target with fpabee-inspect, or choose another --target",
        )
    return logits, np.concatenate([part.lengths for part in parts])


def _read(
    path: Path, texts: str, artifact: str
) -> tuple[NDArray[np.float32], NDArray[np.intp]] | None:
    """A kept trace; None if there is none, or if it is of other rows or another artifact."""
    try:
        with np.load(path, allow_pickle=False) as content:
            if str(content["texts"]) != texts or str(content["artifact"]) != artifact:
                return None
            return content["logits"], content["lengths"]
    # Damaged, or of an older format: it is made anew.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write(
    path: Path,
    texts: str,
    artifact: str,
    logits: NDArray[np.float32],
    lengths: NDArray[np.intp],
) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, logits=logits, lengths=lengths, texts=texts, artifact=artifact)
        partial.replace(path)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror}",
            "give a folder that can be written with --output",
        ) from error
