"""Targets of OpenVINO in an engines folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fpabee.runtime.artifact.folder import EnginesFolder, read_manifest
from fpabee.runtime.artifact.manifest import Target
from fpabee.runtime.backends.openvino import has_bf16


def add_openvino(folder: Path, *precisions: str, **changes: Any) -> None:
    """Add targets, unverified; skips the test if OpenVINO or the precision cannot run here.

    Args:
        folder: the engines folder.
        precisions: default: those that run here, except int8.
        changes: of the targets' records.
    """
    pytest.importorskip("openvino")
    precisions = precisions or ("fp32", *["bf16"] * has_bf16())
    manifest = read_manifest(folder)
    targets = {
        f"openvino-{precision}": Target(
            backend="openvino",
            precision=precision,
            graph_precision="fp32",
            tolerance=None,
            **changes,
        )
        for precision in precisions
    }
    EnginesFolder(folder, manifest).with_manifest(targets={**manifest.targets, **targets}).write()
