"""`reference.npz`: texts and what the PyTorch model says to them, for any later check."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.encoding import Text
from ..runtime.errors import ArtifactError
from ..runtime.manifest import REFERENCE_NAME, Manifest, verified

_MAX_ROWS = 256


def write_reference(folder: Path, texts: Sequence[Text], logits: NDArray[np.float32]) -> None:
    """Write the first texts and their logits `[exits, rows, labels]`."""
    kept = min(len(texts), _MAX_ROWS)
    # Texts as UTF-8 JSON bytes: an object array would have to be unpickled.
    content = json.dumps(list(texts[:kept]), ensure_ascii=False).encode()
    np.savez(
        folder / REFERENCE_NAME,
        texts=np.frombuffer(content, np.uint8),
        logits=logits[:, :kept],
    )


def read_reference(folder: Path, manifest: Manifest) -> tuple[list[Text], NDArray[np.float32]]:
    """Texts, and the fp32 logits `[exits, rows, labels]` of the PyTorch model.

    Raises:
        ArtifactError: missing or damaged.
    """
    path = verified(folder, REFERENCE_NAME, manifest.files.get(REFERENCE_NAME, ""))
    try:
        with np.load(path, allow_pickle=False) as content:
            texts = json.loads(content["texts"].tobytes())
            logits = np.asarray(content["logits"], np.float32)
    except (ValueError, KeyError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", "export the model again") from error
    return [tuple(t) if isinstance(t, list) else t for t in texts], logits
