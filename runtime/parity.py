"""Whether a target is the model that was exported: its logits against `reference.npz`.

Hashes find damage. A segment of another model whose hash is right is found here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .agreement import TIES, Agreement, agree
from .artifact.reference import read_reference
from .encoding import TextEncoder
from .errors import ArtifactError, VerificationError
from .rules.rules import Budget

if TYPE_CHECKING:
    from .engine import Engine

_WINDOW_ROWS = 32
# Another CPU or driver rounds otherwise than the one that the tolerance was measured on.
_SLACK = 10


def measure_parity(folder: Path, engine: Engine) -> Agreement:
    """Run the reference texts and compare.

    Args:
        folder: the engines folder.
        engine: one of its targets, loaded.

    Raises:
        ArtifactError: the reference is missing or damaged, or no text of it fits the target.
    """
    manifest = engine.manifest
    precision = manifest.targets[engine.target].precision
    if precision not in TIES:
        raise ArtifactError(
            f"target {engine.target} is in {precision!r}, which this fpabee does not know",
            "pip install -U fpabee",
        )
    texts, expected = read_reference(folder, manifest)
    # Not the engine's own encoder: it may truncate to fewer tokens than the reference.
    rows = TextEncoder(folder, manifest.tokenizer).encode(texts)
    fits = [n for n, row in enumerate(rows) if len(row) <= engine.limits.max_sequence]
    if not fits:
        raise ArtifactError(
            f"no text of the reference fits the {engine.limits.max_sequence} tokens of "
            f"{engine.target}",
            "export the model again with more --verify-data",
        )
    last = Budget(exit=len(manifest.segments))
    found = [
        engine.run_encoded([rows[n] for n in fits[start : start + _WINDOW_ROWS]], last).logits
        for start in range(0, len(fits), _WINDOW_ROWS)
    ]
    logits = np.concatenate(found, axis=1)
    return agree(logits, expected[:, fits], engine.rule, manifest.task, precision)


def check_parity(folder: Path, engine: Engine) -> Agreement:
    """Run the reference texts; logits, labels and exits must be those of the PyTorch model.

    Logits may differ by ten times what was measured when the target was made.

    Raises:
        ArtifactError: as `measure_parity`.
        VerificationError: they are not.
    """
    found = measure_parity(folder, engine)
    target = engine.manifest.targets[engine.target]
    most = np.inf
    if target.tolerance is not None:
        most = max(_SLACK * target.tolerance, TIES[target.precision])
    if not found.passed or found.difference > most:
        hint = "its files are of another model: copy the engines folder again, or export again"
        if engine.manifest.task.label_thresholds and found.difference <= most:
            hint = (
                "its logits are close enough, but not its labels by the tuned cuts: choose another "
                "target, or calibrate without --tune-label-thresholds"
            )
        raise VerificationError(
            f"target {engine.target} is not the model that was exported: {found}", hint
        )
    return found
