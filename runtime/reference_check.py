"""Check that a target is the model that was exported, with the texts of `reference.npz`.

Hashes find damaged files. This also finds intact files of another model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .agreement import REQUIREMENTS, Agreement, Requirements, compare, must_pass
from .artifact.manifest import Target
from .artifact.reference import read_reference
from .encoding import TextEncoder
from .errors import COPY_AGAIN, ArtifactError, Remedy
from .rules.rules import Budget

if TYPE_CHECKING:
    from .engine import Engine

_WINDOW_ROWS = 32
# Another CPU or driver rounds differently from the one on which the tolerance was measured.
_SLACK = 10


def check_reference(engine: Engine, folder: Path) -> Agreement:
    """Run the reference texts, and compare logits, labels and exits with the PyTorch model.

    Args:
        engine: runs the texts, except those that are too long for its target.
        folder: the engines folder.

    Raises:
        ArtifactError: the reference is missing or damaged, or none of its texts fits the target.
        VerificationError: they differ too much, see `Engine.check`.
    """
    name, manifest = engine.target, engine.manifest
    required = _requirements(name, manifest.targets[name])
    texts, expected = read_reference(folder, manifest)
    # Not the engine's own encoder, which may truncate to fewer tokens than the reference.
    rows = TextEncoder(folder, manifest.tokenizer).encode(texts)
    longest = engine.limits.max_sequence
    fits = [number for number, row in enumerate(rows) if len(row) <= longest]
    if not fits:
        raise ArtifactError(
            f"no text of the reference fits the {longest} tokens of {name}",
            Remedy("export the model again with shorter texts as {verify_data}"),
        )
    first, last = manifest.exits[0], Budget(exit=manifest.exits[-1])
    windows = [fits[n : n + _WINDOW_ROWS] for n in range(0, len(fits), _WINDOW_ROWS)]
    found = np.concatenate(
        [engine.run_encoded([rows[n] for n in window], last).logits for window in windows], axis=1
    )
    agreement = compare(found, expected[:, fits], engine.rule, manifest.task, required, first)
    must_pass(agreement, f"target {name} is not the model that was exported,", COPY_AGAIN)
    return agreement


def _requirements(name: str, target: Target) -> Requirements:
    if target.precision not in REQUIREMENTS:
        raise ArtifactError(
            f"target {name} has precision {target.precision!r}, which this fpabee does not know",
            "pip install -U fpabee",
        )
    required = REQUIREMENTS[target.precision]
    if target.tolerance is None:
        return required
    return dataclasses.replace(required, logits=max(_SLACK * target.tolerance, required.tie))
