"""Hold a chain of segments, in the runtime that users run, against the PyTorch model's logits.

Torch-free: the logits are made by an export, and stand in `reference.npz` afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..runtime.agreement import answers, exit_agreement, largest, near_ties
from ..runtime.artifact.folder import sha256_of
from ..runtime.artifact.manifest import VERIFICATION_NAME, Manifest, Verification
from ..runtime.encoding import Text
from ..runtime.engine import Engine
from ..runtime.errors import VerificationError

FP32_TARGET = "onnxruntime-fp32"
FP32_TOLERANCE = 1e-4

# What the logits of one row may differ by between batches, at least (fp32: 1e-5).
LEAST_TOLERANCE = 1e-5

_ALONE = 8


@dataclass(frozen=True)
class Parity:
    """How close one export is to its PyTorch model, both in fp32.

    Attributes:
        rows: texts compared.
        graphs: largest absolute difference of any output of each graph, by the graph's name.
        max_logit_difference: largest absolute difference of a logit of the chain.
        label_agreement: share of (row, exit) with the same predicted labels, among those
            whose logits are not within tolerance of a tie.
        exit_agreement: share of rows with the same exit, among those whose scores are not
            within tolerance of a threshold.
        near_ties: rows left out of either share.
        passed: whether logits are within 1e-4 and both shares are 1.
    """

    rows: int
    graphs: dict[str, float]
    max_logit_difference: float
    label_agreement: float
    exit_agreement: float
    near_ties: int
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `verification.json`."""
        return asdict(self)


def check_chain(
    engine: Engine,
    texts: Sequence[Text],
    expected: NDArray[np.float32],
    graphs: dict[str, float],
    tolerance: float = FP32_TOLERANCE,
) -> Parity:
    """Compare the chain with the PyTorch model's logits.

    Args:
        engine: the export, loaded.
        texts: the texts compared.
        expected: `[exits, rows, labels]` of the PyTorch model.
        graphs: what `check_graphs` gave, for the record.
        tolerance: the bar for the largest logit difference.

    Raises:
        VerificationError: the chain misses the bar.
    """
    # Once in groups of the engine's own making, once a text at a time: both must agree.
    together = engine.trace(texts).logits
    alone = np.concatenate([engine.trace([text]).logits for text in texts[:_ALONE]], axis=1)
    differences = largest(together, expected)
    differences = np.maximum(differences, largest(alone, expected[:, : alone.shape[1]]))
    difference = float(differences.max())
    if not np.isfinite(difference):
        bad = int(np.argmax(~np.isfinite(differences))) + 1
        raise VerificationError(
            f"the chain gives NaN or infinity from exit {bad} on, the PyTorch model does not",
            "nothing was written; please report this with your model's config.json",
        )
    task = engine.manifest.task
    ties = near_ties(expected, task, tolerance)
    same = answers(together, task) == answers(expected, task)
    same = same if same.ndim == 2 else same.all(axis=-1)
    exits_same, unsure = exit_agreement(together, expected, engine.rule, task, tolerance)
    sure_labels, sure_exits = same[~ties], exits_same[~unsure]
    parity = Parity(
        rows=len(texts),
        graphs=graphs,
        max_logit_difference=difference,
        label_agreement=float(sure_labels.mean()) if sure_labels.size else 1.0,
        exit_agreement=float(sure_exits.mean()) if sure_exits.size else 1.0,
        near_ties=int((ties.any(axis=0) | unsure).sum()),
        passed=bool(difference <= tolerance and sure_labels.all() and sure_exits.all()),
    )
    if not parity.passed:
        bad = int(np.argmax(~(differences <= tolerance))) + 1
        raise VerificationError(
            f"the chain differs from the PyTorch model from exit {bad} on: logits by "
            f"{difference:.2e} (bar {tolerance:.0e}), labels agree for "
            f"{parity.label_agreement:.2%}, exits for {parity.exit_agreement:.2%}",
            "nothing was written; please report this with your model's config.json",
        )
    return parity


def with_parity(folder: Path, manifest: Manifest, target: str, parity: Parity) -> Manifest:
    """Write `verification.json`, and give the manifest that says what was found.

    Args:
        folder: the engines folder.
        manifest: its manifest; the new one is returned, not written.
        target: the target that was compared.
        parity: how close it is.
    """
    path = folder / VERIFICATION_NAME
    path.write_text(json.dumps(parity.to_dict(), indent=2) + "\n", encoding="utf-8")
    checked = msgspec.structs.replace(
        manifest.targets[target], tolerance=max(LEAST_TOLERANCE, parity.max_logit_difference)
    )
    return msgspec.structs.replace(
        manifest,
        targets={**manifest.targets, target: checked},
        verification=Verification(
            rows=parity.rows,
            max_logit_difference=parity.max_logit_difference,
            label_agreement=parity.label_agreement,
            exit_agreement=parity.exit_agreement,
        ),
        files={**manifest.files, VERIFICATION_NAME: sha256_of(path)},
    )
