"""Does a target give what the model gives?

An export compares `onnxruntime-fp32`, in the runtime that users run, with the PyTorch model. Each
target that is built runs the texts of `reference.npz`, and perhaps more texts, whose logits are
those of `onnxruntime-fp32`. If there are any, they judge the answers of int8. Graphs in fp16 are
checked before they are written, see `fp16`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import msgspec
import numpy as np

from ...calibration.progress import Progress, silent
from ...runtime.artifact.folder import EnginesFolder
from ...runtime.artifact.manifest import Manifest
from ...runtime.check import (
    EXPORT_REQUIREMENTS,
    REQUIREMENTS,
    Agreement,
    Logits,
    compare,
    must_pass,
)
from ...runtime.encoding import Text
from ...runtime.engine import Engine
from ...runtime.errors import CheckError
from ...runtime.rules.rules import ExitRule
from ...runtime.targets import open_backend, rule_alone, target_of
from ...runtime.tasks import task_of

FP32_TARGET = "onnxruntime-fp32"
_OTHER_TARGET = f"use another target, such as {FP32_TARGET}, or for int8 give more texts as `texts`"

_MOST_TEXTS = 2000
# How many texts of an export run alone, too.
_ALONE = 8


def check_chain(engine: Engine, texts: Sequence[Text], expected: Logits) -> Agreement:
    """Compare an export with the PyTorch model, on all texts together, and on some alone.

    Args:
        engine: the export, loaded.
        texts: the texts to compare.
        expected: `[exits, rows, labels]` of the PyTorch model.

    Raises:
        CheckError: logits, labels or exits differ too much.
    """
    alone = [engine.trace([text]).logits for text in texts[:_ALONE]]
    logits = np.concatenate([engine.trace(texts).logits, *alone], axis=1)
    expected = np.concatenate([expected, expected[:, : len(alone)]], axis=1)
    agreement = compare(
        logits,
        expected,
        engine.rule,
        engine.core.task,
        EXPORT_REQUIREMENTS,
        engine.manifest.exits[0],
    )
    agreement = dataclasses.replace(agreement, rows=len(texts))
    hint = "nothing was written; please report this with your model's config.json"
    must_pass(agreement, "the chain differs from the PyTorch model", hint)
    return agreement


def exact_logits(
    engines: EnginesFolder, texts: Sequence[Text], progress: Progress = silent
) -> tuple[list[Text], Logits]:
    """The first 2,000 texts, and their logits in `onnxruntime-fp32`.

    Raises:
        BackendError: the folder does not have that target.
    """
    texts = list(texts[:_MOST_TEXTS])
    rule = ExitRule.from_dict(engines.manifest.default_rule)
    with engine_of(engines, target_of(engines, FP32_TARGET), rule) as engine:
        return texts, _logits(engine, texts, "run the exact target", progress)


def _logits(engine: Engine, texts: Sequence[Text], what: str, progress: Progress) -> Logits:
    """The logits of texts at full depth, as `Engine.trace` gives them, with a count."""
    parts = [np.zeros((len(engine.manifest.exits), 0, len(engine.labels)), np.float32)]
    done = 0
    for rows in engine.core.windows(texts):
        progress(what, done, len(texts))
        parts.append(engine.core.trace(rows, engine.core.full_depth).logits)
        done += len(rows)
    return np.concatenate(parts, axis=1)


def check_logits(
    logits: Logits, expected: Logits, manifest: Manifest, rule: ExitRule, precision: str
) -> Agreement:
    """How closely logits of a precision agree with those in fp32.

    Args:
        logits: `[exits, rows, labels]` of the precision, up to the last exit.
        expected: the same in fp32.
        manifest: says which exits and labels there are.
        rule: the rule that decides the exits.
        precision: a name of `REQUIREMENTS`.

    Raises:
        CheckError: too many labels or exits differ.
    """
    first_exit = manifest.exits.stop - len(logits)
    required = REQUIREMENTS[precision]
    agreement = compare(logits, expected, rule, task_of(manifest.task), required, first_exit)
    _must_keep_answers(agreement, precision)
    return agreement


def _must_keep_answers(agreement: Agreement, precision: str) -> None:
    must_pass(agreement, f"{precision} changes answers", _OTHER_TARGET)


def checked_target(
    engines: EnginesFolder,
    name: str,
    more: tuple[Sequence[Text], Logits] | None,
    progress: Progress,
) -> tuple[EnginesFolder, Agreement]:
    """Check that a target of a folder gives what the model gives, and measure how closely.

    Args:
        engines: the folder, which need not be written.
        name: the target, which must run on this machine.
        more: texts besides the reference texts, and their logits in fp32.
        progress: called with (what, done, total).

    Returns:
        The folder with what was measured, which is not written; and how the target agrees, on the
        other texts if there are any.

    Raises:
        FpabeeError: it does not run, or does not give what the model gives.
    """
    target = engines.manifest.targets[name]
    progress(f"check {name}", 0, 1)
    with engine_of(engines, name) as engine:
        try:
            agreement = engine.check()
        except CheckError as error:  # nothing is damaged: the precision costs too much
            raise CheckError(error.message, _OTHER_TARGET) from error
        tolerance = agreement.max_logit_difference
        if more is None:
            required = REQUIREMENTS[target.precision]
            agreement = dataclasses.replace(agreement, required=required)
            _must_keep_answers(agreement, target.precision)
        else:
            texts, expected = more
            logits = _logits(engine, texts, f"check {name}", progress)
            agreement = check_logits(
                logits, expected, engines.manifest, engine.rule, target.precision
            )
            tolerance = max(tolerance, agreement.max_logit_difference)
        kind = engine.core.backend.kind_of_machine
    measured = msgspec.structs.replace(target, tolerance=tolerance, checked_on=kind)
    return engines.with_target(name, measured), agreement


def engine_of(engines: EnginesFolder, name: str, rule: ExitRule | None = None) -> Engine:
    """An engine of a folder whose manifest may not be written yet, without any warning."""
    if rule is None:
        _, rule = rule_alone(engines.manifest, name, None)
    backend = open_backend(engines, name, None)
    try:
        return Engine(engines, backend, rule)
    except BaseException:
        backend.close()
        raise
