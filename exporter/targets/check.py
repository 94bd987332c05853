"""Does a target give what the model gives?

Each target runs the texts of `reference.npz`, and perhaps more texts, whose logits are those of
`onnxruntime-fp32`. Precisions are asked the same before their graphs are written, see `fp16`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...runtime.agreement import REQUIREMENTS, Agreement, Logits, compare, must_pass
from ...runtime.artifact.manifest import (
    Manifest,
    Target,
    keep_targets,
    with_operating_points,
    with_target,
)
from ...runtime.encoding import Text
from ...runtime.engine import Engine
from ...runtime.errors import FpabeeError
from ...runtime.progress import Progress
from ...runtime.rules.rules import ExitRule
from ...runtime.targets import open_backend, rule_of

FP32_TARGET = "onnxruntime-fp32"

_MOST_TEXTS = 2000


@dataclass(frozen=True)
class Checked:
    """What became of a target, or of a precision.

    Attributes:
        name: the target, or the precision.
        agreement: with the PyTorch model; None if it was refused, or cannot run here.
        refused: why the folder does not have it; None if it does.
    """

    name: str
    agreement: Agreement | None = None
    refused: FpabeeError | None = None


def exact_logits(
    folder: Path, manifest: Manifest, texts: Sequence[Text]
) -> tuple[list[Text], Logits]:
    """The first 2,000 texts, and their logits in `onnxruntime-fp32`.

    Raises:
        BackendError: the folder does not have that target.
    """
    texts, rule = list(texts[:_MOST_TEXTS]), ExitRule.from_dict(manifest.default_rule)
    with Engine.load(folder, FP32_TARGET, rule=rule) as engine:
        return texts, engine.trace(texts).logits


def judged(
    found: Logits, expected: Logits, manifest: Manifest, rule: ExitRule, precision: str
) -> Agreement:
    """How closely logits of a precision agree with those in fp32.

    Raises:
        VerificationError: too many labels or exits differ.
    """
    required, first = REQUIREMENTS[precision], manifest.exits.stop - len(found)
    agreement = compare(found, expected, rule, manifest.task, required, first)
    hint = f"use another target, such as {FP32_TARGET}, or for int8 give more `calibration_data`"
    must_pass(agreement, f"{precision} changes answers", hint)
    return agreement


def check_target(
    folder: Path,
    manifest: Manifest,
    name: str,
    target: Target,
    progress: Progress,
    more: tuple[Sequence[Text], Logits] | None = None,
) -> tuple[Manifest, Checked]:
    """Run the reference texts, and perhaps others, on a target of this machine.

    Args:
        folder: the engines folder.
        manifest: its manifest. The new one is returned, not written.
        name: the target's name. An older target of this name is replaced.
        target: its record, without what is measured.
        progress: called with (what, done, total).
        more: other texts, and their logits in fp32.

    Returns:
        The manifest with the target if it passed, or without it, and what was found.
    """
    progress(f"verify {name}", 0, 1)
    target = with_old_points(manifest, name, target)
    try:
        with engine_of(folder, with_target(manifest, name, target), name) as engine:
            agreement = engine.check()
            tolerance = agreement.max_logit_difference
            if more is not None:
                texts, expected = more
                found = engine.trace(texts).logits
                agreement = judged(found, expected, manifest, engine.rule, target.precision)
                tolerance = max(tolerance, agreement.max_logit_difference)
    except FpabeeError as error:
        rest = keep_targets(manifest, lambda other, _: other != name)
        return rest, Checked(name, refused=error)
    passed = msgspec.structs.replace(target, tolerance=tolerance)
    return with_target(manifest, name, passed), Checked(name, agreement)


def with_old_points(manifest: Manifest, name: str, target: Target) -> Target:
    """A new target with the operating points of the old one, if it gives the same logits."""
    old = manifest.targets.get(name)
    if old is None or _origin(old) != _origin(target):
        return target
    return with_operating_points(target, old.operating_points, old.default_operating_point)


def _origin(target: Target) -> tuple[object, ...]:
    """What the operating points of a target depend on."""
    files = [file.sha256 for file in target.files.values()]
    return target.versions, files, target.rest_precision


def engine_of(folder: Path, manifest: Manifest, name: str, rule: ExitRule | None = None) -> Engine:
    """An engine of a manifest that may not be written yet, without any warning."""
    if rule is None:
        _, rule = rule_of(folder, manifest, name, None)
    backend = open_backend(folder, manifest, name, None)
    try:
        return Engine(folder, manifest, backend, rule)
    except BaseException:
        backend.close()
        raise
