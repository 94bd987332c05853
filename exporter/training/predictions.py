"""What a model gives for many rows: batches of similar length, on the GPU if there is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...runtime.artifact.manifest import ProblemType
from ...runtime.progress import Progress, silent

Encoded = dict[str, Any]
Collate = Callable[[list[Encoded]], Any]

_BATCH = 64


@torch.no_grad()
def predict(
    model: nn.Module,
    rows: Sequence[Encoded],
    collate: Collate,
    read: Callable[[Any], Tensor],
    progress: Progress = silent,
    what: str = "predict",
) -> NDArray[np.float32]:
    """What a model gives for rows, without dropout.

    Args:
        model: takes the inputs of a batch by name.
        rows: tokenized rows; their labels are not read.
        collate: makes a padded batch of rows.
        read: the wanted part of an output, with one entry for each row.
        progress: called with (what, rows done, rows).
        what: the name of this step.

    Returns:
        `[rows, ...]`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    # Rows of similar length share a batch, which saves padding.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
    parts = []
    for start in range(0, len(order), _BATCH):
        progress(what, start, len(order))
        chosen = [rows[number] for number in order[start : start + _BATCH]]
        batch = collate([{k: v for k, v in row.items() if k != "labels"} for row in chosen])
        inputs = {name: part.to(device) for name, part in batch.items()}
        parts.append(read(model(**inputs)).float().cpu().numpy())
    found = np.concatenate(parts)
    return np.asarray(found[np.argsort(order)], np.float32)


def probabilities(logits: NDArray[np.float32], problem_type: ProblemType) -> Tensor:
    """The probabilities `[rows, labels]` of logits `[rows, labels]`."""
    values = torch.from_numpy(logits)
    single = problem_type is ProblemType.SINGLE_LABEL
    return values.softmax(dim=-1) if single else values.sigmoid()
