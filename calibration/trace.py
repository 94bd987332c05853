"""Run labelled rows to full depth once, and keep their logits.

A trace is kept in `calibration/trace-TARGET-DATA.npz` in the engines folder. It is used again as
long as the texts and everything that determines the logits are the same, see `artifact_sha256`. It
also holds the rows, so that points can be calibrated again when exits are dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.arrays import read_arrays
from ..runtime.artifact.manifest import Manifest, Task
from ..runtime.engine import Engine
from ..runtime.errors import ArtifactError, InputError, Remedy
from ..runtime.files import Row
from ..runtime.metrics import Labels, encode_labels
from ..runtime.progress import Progress, silent
from .scoring import LabelledLogits

_CHUNK = 256


def data_sha256(rows: Sequence[Row], labels: bool = True) -> str:
    """Hash of the texts of rows and, unless left out, of their labels."""
    digest = hashlib.sha256()
    for row in rows:
        content = [row.text, row.text_pair, list(row.labels or ()) if labels else None]
        digest.update(json.dumps(content, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def artifact_sha256(manifest: Manifest, target: str) -> str:
    """Hash of everything that determines the logits of a target."""
    chosen = manifest.targets[target]
    graphs = manifest.graphs_of(chosen)
    content: list[Any] = [
        sorted((name, graph.sha256) for name, graph in graphs.items()),
        sorted((name, file.sha256) for name, file in chosen.files.items()),
        [list(segment.calls) for segment in manifest.segments],
        [manifest.tokenizer.sha256, manifest.tokenizer.max_length],
        sorted(chosen.versions.items()),
    ]
    if manifest.exit_0 is not None:
        content.append([manifest.exit_0.sha256])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def expected_labels(rows: Sequence[Row], task: Task) -> Labels:
    """The labels of rows as numbers, see `encode_labels`.

    Raises:
        InputError: a row has no label, or a label that the model does not know.
    """
    for row in rows:
        if row.labels is None:
            raise InputError(
                f"{row.place} has no label, and calibration needs labels",
                Remedy("label every row, name their column in {label_column}, or set {unlabelled}"),
            )
    given = [row.labels or () for row in rows]
    return encode_labels(given, task.labels, task.problem_type, [row.place for row in rows])


def trace_rows(
    engine: Engine,
    rows: Sequence[Row],
    folder: Path,
    labels: bool = True,
    progress: Progress = silent,
) -> LabelledLogits:
    """Run rows to full depth, or use the logits that an earlier run kept.

    Args:
        engine: the engine.
        rows: the rows.
        folder: where traces are kept; it is made if it does not exist.
        labels: whether the labels are used.
        progress: reports how many rows have run.

    Raises:
        InputError: a row has no label, or a label that the model does not know.
        BackendError: the target gives logits that are not finite numbers.
        ArtifactError: the folder cannot be written.
    """
    manifest, task = engine.manifest, engine.manifest.task
    expected = expected_labels(rows, task) if labels else None
    texts = data_sha256(rows, labels=False)
    artifact = artifact_sha256(manifest, engine.target)
    path = folder / f"trace-{engine.target}-{texts[:12]}.npz"
    kept = _read(path, artifact, manifest)
    if kept is None or data_sha256(kept.rows, labels=False) != texts:
        kept = _run(engine, rows, progress)
        _write(path, artifact, kept)
    elif data_sha256(kept.rows) != data_sha256(rows):  # other labels
        kept = StoredTrace(list(rows), kept.logits, kept.lengths)
        _write(path, artifact, kept)
    return LabelledLogits(
        kept.logits,
        kept.lengths,
        expected,
        task.problem_type,
        task.label_thresholds,
        manifest.exits[0],
    )


def stored_rows(folder: Path, manifest: Manifest, target: str, data: str) -> list[Row] | None:
    """The rows that an earlier calibration kept.

    Args:
        folder: where traces are kept.
        manifest: of the engines folder.
        target: the target that was calibrated.
        data: hash of the rows, see `data_sha256`.

    Returns:
        The rows; None if their trace does not exist or belongs to another artifact.
    """
    artifact = artifact_sha256(manifest, target)
    for path in sorted(folder.glob(f"trace-{target}-*.npz")):
        kept = _read(path, artifact, manifest)
        if kept is not None and data in (data_sha256(kept.rows), data_sha256(kept.rows, False)):
            return kept.rows
    return None


@dataclass(frozen=True)
class StoredTrace:
    """What a trace file holds.

    Attributes:
        rows: the rows.
        logits: `[exits, rows, labels]`.
        lengths: `[rows]` tokens.
    """

    rows: list[Row]
    logits: NDArray[np.float32]
    lengths: NDArray[np.intp]


def _run(engine: Engine, rows: Sequence[Row], progress: Progress) -> StoredTrace:
    parts = []
    for start in range(0, len(rows), _CHUNK):
        progress("trace", start, len(rows))
        parts.append(engine.trace([row.content for row in rows[start : start + _CHUNK]]))
    progress("trace", len(rows), len(rows))
    logits = np.concatenate([part.logits for part in parts], axis=1)
    return StoredTrace(list(rows), logits, np.concatenate([part.lengths for part in parts]))


_StoredRow = tuple[str, str | None, tuple[str, ...] | None]


def _read(path: Path, artifact: str, manifest: Manifest) -> StoredTrace | None:
    """A kept trace; None if the file is damaged, or belongs to another artifact."""
    try:
        content = read_arrays(path, ("texts", "artifact", "rows", "logits", "lengths"))
        stored = msgspec.json.decode(content["rows"].tobytes(), type=list[_StoredRow])
    except (ValueError, RecursionError):
        return None
    rows = [Row(*row, {}, line) for line, row in enumerate(stored, 1)]
    logits, lengths = content["logits"], content["lengths"]
    shape = len(manifest.exits), len(rows), len(manifest.task.labels)
    fits = (
        str(content["artifact"]) == artifact
        and str(content["texts"]) == data_sha256(rows, labels=False)
        and logits.dtype == np.float32
        and lengths.dtype.kind == "i"
        and (logits.shape, lengths.shape) == (shape, shape[1:2])
        and np.isfinite(logits).all()
        and lengths.min(initial=1) >= 1
        and lengths.max(initial=0) <= manifest.tokenizer.max_length
    )
    return StoredTrace(rows, logits, lengths.astype(np.intp)) if fits else None


def _write(path: Path, artifact: str, trace: StoredTrace) -> None:
    # As UTF-8 JSON bytes: an object array would have to be unpickled.
    rows = msgspec.json.encode([(row.text, row.text_pair, row.labels) for row in trace.rows])
    file = io.BytesIO()
    np.savez(
        file,
        rows=np.frombuffer(rows, np.uint8),
        logits=trace.logits,
        lengths=trace.lengths,
        texts=data_sha256(trace.rows, labels=False),
        artifact=artifact,
    )
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A new file: if the path is a link, the file that it leads to is not ours.
        partial.unlink(missing_ok=True)
        partial.write_bytes(file.getvalue())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ArtifactError(
            f"cannot write {path}: {error.strerror}",
            Remedy("give {output} a folder that can be written"),
        ) from error
