"""The trace of labelled rows: every exit of every row, run once and kept.

A trace is stored beside the artifact, `calibration/trace-TARGET-DATA.npz`, and used again as
long as the texts, the target's files and the tokenizer are the same. It holds the rows too,
so that points can be calibrated again when exits are dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.arrays import read_arrays
from ..runtime.artifact.manifest import Manifest, Task
from ..runtime.engine import Engine
from ..runtime.errors import ArtifactError, InputError
from ..runtime.files import Row
from ..runtime.metrics import Labels, encode_labels
from ..runtime.progress import Progress, silent
from .scoring import Rows

_CHUNK = 256


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


def expected_labels(rows: Sequence[Row], task: Task) -> Labels:
    """The labels of rows, see `encode_labels`.

    Raises:
        InputError: a row has no label, or one that the model does not know.
    """
    for row in rows:
        if row.labels is None:
            raise InputError(
                f"{row.place} has no label, and calibration needs one",
                "give every row one, name its column with --label-column, or give --unlabelled",
            )
    given = [row.labels or () for row in rows]
    return encode_labels(given, task.labels, task.problem_type, [row.place for row in rows])


def trace_rows(
    engine: Engine,
    rows: Sequence[Row],
    folder: Path,
    labels: bool = True,
    progress: Progress = silent,
) -> Rows:
    """Run rows to full depth, or take what an earlier run kept.

    Args:
        engine: the engine.
        rows: the rows.
        folder: where traces are kept; it is made if it is not there.
        labels: whether the labels are read.
        progress: called with (what, done, total).

    Raises:
        InputError: a row has no label, or one that the model does not know.
        BackendError: the target gives logits that are not finite numbers.
        ArtifactError: the folder cannot be written.
    """
    manifest, task = engine.manifest, engine.manifest.task
    expected = expected_labels(rows, task) if labels else None
    key = _Key(data_sha256(rows, labels=False), artifact_sha256(manifest, engine.target))
    path = _path(folder, engine.target, key)
    kept = _read(path, key, manifest)
    if kept is None or data_sha256(kept.rows) != data_sha256(rows):
        logits, lengths = (
            _run(engine, rows, progress) if kept is None else (kept.logits, kept.lengths)
        )
        kept = StoredTrace(list(rows), logits, lengths)
        _write(path, key, kept)
    return Rows(kept.logits, kept.lengths, expected, task.problem_type, task.label_thresholds)


def stored_rows(folder: Path, manifest: Manifest, target: str, data: str) -> list[Row] | None:
    """The rows that a calibration kept.

    Args:
        folder: where traces are kept.
        manifest: of the engines folder.
        target: that was calibrated.
        data: hash of the rows, see `data_sha256`.

    Returns:
        The rows; None if their trace is not there, or is of another artifact.
    """
    artifact = artifact_sha256(manifest, target)
    for path in sorted(folder.glob(f"trace-{target}-*.npz")):
        kept = _read(path, _Key(None, artifact), manifest)
        if kept is not None and data in (data_sha256(kept.rows), data_sha256(kept.rows, False)):
            return kept.rows
    return None


@dataclass(frozen=True)
class StoredTrace:
    """What a trace file holds: the rows, their logits at every exit, their lengths."""

    rows: list[Row]
    logits: NDArray[np.float32]
    lengths: NDArray[np.intp]


@dataclass(frozen=True)
class _Key:
    """Which texts (None: any) and which artifact a trace is of."""

    texts: str | None
    artifact: str


def _path(folder: Path, target: str, key: _Key) -> Path:
    return folder / f"trace-{target}-{(key.texts or '')[:12]}.npz"


def _run(
    engine: Engine, rows: Sequence[Row], progress: Progress
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    parts = []
    for start in range(0, len(rows), _CHUNK):
        progress("trace", start, len(rows))
        parts.append(engine.trace([row.content for row in rows[start : start + _CHUNK]]))
    progress("trace", len(rows), len(rows))
    logits = np.concatenate([part.logits for part in parts], axis=1)
    return logits, np.concatenate([part.lengths for part in parts])


def _read(path: Path, key: _Key, manifest: Manifest) -> StoredTrace | None:
    """A kept trace; None if there is none, or if it is of other texts or another artifact."""
    # Damaged, or of an older format: it is made anew.
    try:
        content = read_arrays(path, ("texts", "artifact", "rows", "logits", "lengths"))
        stored = msgspec.json.decode(content["rows"].tobytes(), type=list[_StoredRow])
    except (ValueError, RecursionError):
        return None
    rows = [Row(*row, {}, line) for line, row in enumerate(stored, 1)]
    texts = data_sha256(rows, labels=False)
    if key.texts not in (None, texts) or texts != str(content["texts"]):
        return None
    logits, lengths = content["logits"], content["lengths"]
    shape = len(manifest.segments), len(rows), len(manifest.task.labels)
    kinds = logits.dtype == np.float32 and lengths.dtype.kind == "i"
    if str(content["artifact"]) != key.artifact or not kinds:
        return None
    if logits.shape != shape or lengths.shape != shape[1:2] or not np.isfinite(logits).all():
        return None
    if not rows or lengths.min() < 1 or lengths.max() > manifest.tokenizer.max_length:
        return None
    return StoredTrace(rows, logits, lengths.astype(np.intp))


_StoredRow = tuple[str, str | None, tuple[str, ...] | None]


def _write(path: Path, key: _Key, trace: StoredTrace) -> None:
    # As UTF-8 JSON bytes: an object array would have to be unpickled.
    rows = msgspec.json.encode([(row.text, row.text_pair, row.labels) for row in trace.rows])
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Anew: if it is a link, the file that it leads to is not ours.
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:
            np.savez(
                file,
                rows=np.frombuffer(rows, np.uint8),
                logits=trace.logits,
                lengths=trace.lengths,
                texts=key.texts or "",
                artifact=key.artifact,
            )
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ArtifactError(
            f"cannot write {path}: {error.strerror}",
            "give a folder that can be written with --output",
        ) from error
