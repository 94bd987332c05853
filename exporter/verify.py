"""Check that exported segments give what the PyTorch model gives.

Every export runs this: each graph against its module, on the inputs that the PyTorch model
feeds it; then `parity` holds the chain, in the runtime that users run, against the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..runtime.artifact.manifest import ATTENTION_BIAS, HIDDEN_STATES, MASK_FILL, NEXT, Manifest
from ..runtime.encoding import EncodedRow, Text, padded_batches
from ..runtime.errors import VerificationError
from .model import MultiExitModel
from .parity import FP32_TOLERANCE
from .segments import Cut

_BATCH = 8

BUILT_IN_TEXTS: tuple[Text, ...] = (
    "",
    "yes",
    "What a film.",
    "play the latest album by the band and turn the lights down",
    "It is not that the plot is bad, but nobody could call it good either.",
    "Ünïcode — naïve café, 東京 で 会いましょう 😀",
    "12:45, 3.14 % & $99 <html> [UNK] [SEP] user@example.org https://example.org/?q=1",
    ("The cat sat on the mat.", "A cat was sitting."),
    ("", "The first text of this pair is empty."),
    ("He left early, or so they say.", ""),
    "set an alarm for six in the morning and remind me to water the plants " * 4,
    "the quick brown fox jumps over the lazy dog " * 40,
)


def reference_logits(model: MultiExitModel, rows: Sequence[EncodedRow]) -> NDArray[np.float32]:
    """Logits `[exits, rows, labels]` of the PyTorch model, in padded batches."""
    batches = []
    for batch in padded_batches(rows, _padding(model), _BATCH):
        ids, types, bias = (torch.from_numpy(array) for array in batch.values())
        mask = (bias[:, 0, 0] == 0).long()
        with torch.no_grad():
            batches.append(model(ids, mask, types if model.backbone.token_types else None).numpy())
    return np.concatenate(batches, axis=1).astype(np.float32)


def check_graphs(
    model: MultiExitModel, cut: Cut, manifest: Manifest, folder: Path, rows: Sequence[EncodedRow]
) -> dict[str, float]:
    """Largest output difference of each graph against its module, on the model's own inputs.

    Raises:
        VerificationError: a graph misses the bar; the first one is named.
    """
    from ..runtime.backends.onnxruntime_session import cpu_session
    from ..runtime.backends.stepping import steps

    batches = list(padded_batches(rows, _padding(model), _BATCH))
    worst = dict.fromkeys(cut.modules, 0.0)
    for step in steps(
        manifest, batches, lambda name: cpu_session(folder / manifest.graphs[name].file)
    ):
        inputs = {key: torch.from_numpy(value) for key, value in step.inputs.items()}
        with torch.no_grad():
            expected = cut.modules[step.graph](inputs)
        is_real = batches[step.batch][ATTENTION_BIAS][:, 0, 0] == 0
        for key, value in step.outputs.items():
            # Hidden states of padding are never read: compare the real tokens.
            real = is_real if key == NEXT + HIDDEN_STATES else slice(None)
            difference = float(np.abs(value - expected[key].numpy())[real].max())
            # Unlike max(), keeps NaN: it must fail.
            worst[step.graph] = float(np.maximum(worst[step.graph], difference))
        if not worst[step.graph] <= FP32_TOLERANCE:
            raise VerificationError(
                f"{step.graph} differs from its PyTorch module by {worst[step.graph]:.2e}; "
                f"the bar is {FP32_TOLERANCE:.0e}",
                "nothing was written; please report this with your model's config.json",
            )
        step.outputs.update({key: value.numpy() for key, value in expected.items()})
    return worst


def _padding(model: MultiExitModel) -> dict[str, float]:
    """What each model input holds on padding."""
    pad_id = model.backbone.config.pad_token_id or 0
    return {"input_ids": pad_id, "token_type_ids": 0, ATTENTION_BIAS: MASK_FILL}
