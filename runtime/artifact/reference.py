"""`reference.npz`: texts and the PyTorch model's logits for them, to check any later target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import COPY_AGAIN, EXPORT_AGAIN, ArtifactError
from .folder import EnginesFolder
from .manifest import REFERENCE_NAME
from .untrusted.arrays import read_arrays

Text = str | tuple[str, str]
"""A text to classify, or a text and its pair."""

_MAX_ROWS = 256
# Far beyond the logits of any model; the scores of rules square them in float32.
_LARGEST = 1e15


def write_reference(folder: Path, texts: Sequence[Text], logits: NDArray[np.float32]) -> None:
    """Write the first 256 texts and their logits `[exits, rows, labels]`."""
    # As UTF-8 bytes of JSON, since an array of objects would have to be unpickled.
    content = json.dumps(list(texts[:_MAX_ROWS]), ensure_ascii=False).encode()
    np.savez(
        folder / REFERENCE_NAME,
        texts=np.frombuffer(content, np.uint8),
        logits=logits[:, :_MAX_ROWS],
    )


def read_reference(engines: EnginesFolder) -> tuple[list[Text], NDArray[np.float32]]:
    """At most 256 texts, and the fp32 logits `[exits, rows, labels]` of the PyTorch model.

    Raises:
        ArtifactError: the file is missing, damaged, of another model, or larger than an export
            writes it.
    """
    manifest = engines.manifest
    if REFERENCE_NAME not in manifest.files:
        raise ArtifactError(
            f"{engines.path} has no {REFERENCE_NAME} to check it with", EXPORT_AGAIN
        )
    path = engines.file(REFERENCE_NAME, manifest.files[REFERENCE_NAME])
    try:
        content = read_arrays(path, ("texts", "logits"))
        texts = json.loads(content["texts"].tobytes())
        logits = content["logits"]
        rows = [tuple(text) if isinstance(text, list) else text for text in texts]
    except (AttributeError, ValueError, TypeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ArtifactError(f"{path} cannot be read: {reason}", COPY_AGAIN) from error
    if len(rows) > _MAX_ROWS:
        raise ArtifactError(
            f"{path} holds {len(rows):,} texts; expected at most {_MAX_ROWS}", EXPORT_AGAIN
        )
    expected = (len(manifest.exits), len(rows), len(manifest.task.labels))
    if logits.dtype != np.float32 or logits.shape != expected:
        raise ArtifactError(
            f"{path} holds {logits.dtype} logits of shape {list(logits.shape)}; expected "
            f"float32 of shape {list(expected)}",
            EXPORT_AGAIN,
        )
    if not np.abs(logits).max(initial=0.0) <= _LARGEST:  # as NaN is not, either
        raise ArtifactError(
            f"{path} holds logits that are NaN, infinite or beyond {_LARGEST:g}", EXPORT_AGAIN
        )
    return rows, logits
