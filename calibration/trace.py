"""Run labelled rows to full depth once, and keep their logits.

A trace is kept in `calibration/trace-TARGET-DATA.npz` in the engines folder. It is used again as
long as the texts and everything that determines the logits are the same, see `logits_sha256`.

An engines folder may come from a stranger, who can write a trace with these hashes and any logits.
So some rows, which nobody can foretell, run again and must give the same logits. This finds a trace
that is not of this target, or of which many rows were changed; it may miss a few changed rows.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.folder import read_manifest, write_whole
from ..runtime.artifact.quick import logits_sha256, quick_targets
from ..runtime.artifact.untrusted.arrays import read_arrays
from ..runtime.check import logit_differences, requirements_of
from ..runtime.engine import Engine
from ..runtime.errors import InputError
from ..runtime.files import Row
from ..runtime.files.rows import data_sha256
from ..runtime.quality import Labels
from ..runtime.rules.rules import ExitRule
from ..runtime.tasks import Task
from .progress import Progress, silent
from .scoring import LabelledLogits

CALIBRATION = "calibration"
"""The folder of traces in an engines folder."""
_CHUNK = 256
_SAMPLE = 16  # rows of a kept trace that run again
_Trace = tuple[NDArray[np.float32], NDArray[np.intp]]
"""Logits `[exits, rows, labels]`, and the number of tokens of each row."""


def expected_labels(rows: Sequence[Row], task: Task) -> Labels:
    """The labels of rows as numbers, see `Task.encode`.

    Raises:
        InputError: a row has no label, or a label that the model does not know.
    """
    for row in rows:
        if row.labels is None:
            raise InputError(
                f"{row.where} has no label, and calibration needs labels",
                "label every row, name their column in `label_column`, or set `metric` to "
                "agreement",
            )
    labels = [row.labels or () for row in rows]
    return task.encode(labels, [row.where for row in rows])


@contextmanager
def engines_of(
    folder: Path, target: str | None, quick_target: str = "", threads: int | None = None
) -> Iterator[tuple[Engine, Engine | None]]:
    """An engine of a target, to trace and time rows, and one of its quick pass.

    Rows run to full depth, so the targets need no operating point, not even a valid one.

    Args:
        folder: the engines folder.
        target: the target; None: the default one.
        quick_target: the target of the quick pass, or empty without one.
        threads: CPU threads; None: all.

    Yields:
        The engine, whose route in use goes through the quick pass before its own; and that of the
        quick pass, or None.

    Raises:
        FpabeeError: as in `Engine.load`, or both targets are the same.
    """
    rule = ExitRule.from_dict(read_manifest(folder).default_rule)
    load = partial(Engine.load, folder, threads=threads, rule=rule)
    with load(target) as engine:
        if not quick_target:
            yield engine, None
            return
        if quick_target == engine.target:
            raise InputError(
                f"the quick pass would run in {quick_target}, as the exact pass does",
                "give another `quick_target`, such as one in int8",
            )
        targets = engine.manifest.targets
        chosen = targets[engine.target]
        if quick_target in targets and targets[quick_target].backend != chosen.backend:
            raise InputError(
                f"{quick_target} runs in another library than {engine.target}",
                "give a `quick_target` of the same library",
            )
        if others := quick_targets(engine.manifest, engine.target) - {quick_target}:
            raise InputError(
                f"operating points of {engine.target} have a quick pass in {', '.join(others)}, "
                f"not in {quick_target}, and all of a target have the same",
                "give that as `quick_target`, or make the engines folder again",
            )
        with load(quick_target) as quick:
            core = engine.core
            core.in_use = core.through(quick.core.backend, core.backend)
            yield engine, quick


def trace_rows(
    engine: Engine,
    rows: Sequence[Row],
    folder: Path,
    labels: bool = True,
    progress: Progress = silent,
    quick: Engine | None = None,
) -> LabelledLogits:
    """Run rows to full depth, or use the logits that an earlier run kept, see above.

    Args:
        engine: the engine.
        rows: the rows.
        folder: where traces are kept; it is made if it does not exist.
        labels: whether the labels are used.
        progress: reports how many rows have run.
        quick: an engine of the target of a quick pass. Then the logits are those of its exits, and
            of the last exit of `engine`.

    Raises:
        InputError: a row has no label, or a label that the model does not know.
        BackendError: the target gives logits that are not finite numbers.
        ArtifactError: the folder cannot be written.
    """
    manifest = engine.manifest
    task = engine.manifest.task
    expected = expected_labels(rows, engine.core.task) if labels else None
    texts = data_sha256(rows, labels=False)
    artifact = logits_sha256(manifest, engine.target)
    path = folder / f"trace-{engine.target}-{texts[:12]}.npz"
    shape = len(manifest.exits), len(rows), len(task.labels)
    kept = _read(path, artifact, texts, shape, manifest.tokenizer.max_length)
    if kept is None or not _is_true(kept, engine, rows):
        parts = []
        file = io.BytesIO()
        for start in range(0, len(rows), _CHUNK):
            progress("trace", start, len(rows))
            texts_of_chunk = [row.content for row in rows[start : start + _CHUNK]]
            parts.append(engine.trace(texts_of_chunk, rule=engine.core.full_depth.rule))
        progress("trace", len(rows), len(rows))
        logits = np.concatenate([part.logits for part in parts], axis=1)
        kept = logits, np.concatenate([part.lengths for part in parts])
        np.savez(file, logits=logits, lengths=kept[1], texts=texts, artifact=artifact)
        write_whole(path, file.getvalue())
    thresholds = task.label_thresholds
    first = manifest.exits[0]
    logits, lengths = kept
    if quick is not None:
        before = trace_rows(quick, rows, folder, labels, progress)
        both = np.concatenate([before.logits, logits[-1:]])
        return replace(before, logits=both, has_quick_pass=True)
    return LabelledLogits(logits, lengths, expected, task.problem_type, thresholds, first)


def _is_true(kept: _Trace, engine: Engine, rows: Sequence[Row]) -> bool:
    """Whether rows that are drawn at random give the logits of a kept trace, except for rounding.

    Raises:
        BackendError: the target gives logits that are not finite numbers.
    """
    logits, lengths = kept
    # Without a seed, or a forger could draw them, too.
    drawn = np.random.default_rng().choice(len(rows), min(len(rows), _SAMPLE), replace=False)
    again = [rows[number].content for number in drawn]
    fresh = engine.trace(again, rule=engine.core.full_depth.rule)
    rounding = requirements_of(engine.target, engine.manifest).tie
    differences = logit_differences(fresh.logits, logits[:, drawn])
    same_lengths = np.array_equal(fresh.lengths, lengths[drawn])
    return same_lengths and bool(differences.max(initial=0.0) <= rounding)


def _read(
    path: Path, artifact: str, texts: str, shape: tuple[int, int, int], longest: int
) -> _Trace | None:
    """A kept trace; None if the file is damaged, or belongs to another artifact or other texts."""
    try:
        content = read_arrays(path, ("texts", "artifact", "logits", "lengths"))
    except ValueError:
        return None
    logits = content["logits"]
    lengths = content["lengths"]
    fits = (
        str(content["artifact"]) == artifact
        and str(content["texts"]) == texts
        and logits.dtype == np.float32
        and lengths.dtype.kind == "i"
        and (logits.shape, lengths.shape) == (shape, shape[1:2])
        and np.isfinite(logits).all()
        and lengths.min(initial=1) >= 1
        and lengths.max(initial=0) <= longest
    )
    return (logits, lengths.astype(np.intp)) if fits else None
