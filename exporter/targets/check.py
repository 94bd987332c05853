"""Run a built target on the texts of `reference.npz` and hold it against the PyTorch model."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ...runtime.artifact.manifest import Manifest, Target
from ...runtime.backends.cuda_probe import cuda_device
from ...runtime.engine import Engine
from ...runtime.errors import VerificationError


def can_run(target: Target) -> bool:
    """Whether a built target can run on this machine."""
    device = cuda_device()
    return not device.error and device.compute_capability in target.compute_capabilities


def check_target(folder: Path, manifest: Manifest, name: str) -> Manifest:
    """The manifest with the target's tolerance, measured here.

    Args:
        folder: the engines folder.
        manifest: its manifest, as it is written there.
        name: the target.

    Raises:
        VerificationError: labels or exits differ by more than the bar.
    """
    with Engine.load(folder, target=name) as engine:
        try:
            agreement = engine.check()
        except VerificationError as error:
            raise VerificationError(
                error.message,
                "it was taken out of the manifest; build it from fp32 graphs, or report this",
            ) from error
    target = manifest.targets[name]
    targets = {
        **manifest.targets,
        name: msgspec.structs.replace(target, tolerance=agreement.max_logit_difference),
    }
    return msgspec.structs.replace(manifest, targets=targets)
