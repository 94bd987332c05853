"""Check that exported segments give what the PyTorch model gives.

Every export runs this: each graph against its module, on the inputs that the PyTorch model
feeds it; then `parity` holds the chain, in the runtime that users run, against the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..runtime.artifact.manifest import (
    ATTENTION_BIAS,
    HIDDEN_STATES,
    NEXT,
    Manifest,
)
from ..runtime.encoding import EncodedRow, Text
from ..runtime.errors import VerificationError
from .backbones import attention_bias
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
    for batch in _batches(rows, model):
        ids, mask, types = batch
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
    import onnxruntime as ort

    from ..runtime.backends.onnxruntime_session import session_options

    sessions: dict[str, Any] = {}
    worst = dict.fromkeys(cut.modules, 0.0)
    for ids, mask, types in _batches(rows, model):
        state = {
            "input_ids": ids,
            "token_type_ids": types,
            ATTENTION_BIAS: attention_bias(mask),
        }
        for name in [name for segment in cut.segments for name in segment.calls]:
            graph = manifest.graphs[name]
            if name not in sessions:
                path = str(folder / graph.file)
                sessions[name] = ort.InferenceSession(
                    path, session_options(), providers=["CPUExecutionProvider"]
                )
            inputs = {spec.name: state[spec.name] for spec in graph.inputs}
            with torch.no_grad():
                expected = cut.modules[name](inputs)
            names = [spec.name for spec in graph.outputs]
            found = sessions[name].run(names, {key: v.numpy() for key, v in inputs.items()})
            for key, value in zip(names, found, strict=True):
                # Hidden states of padding are never read: compare the real tokens.
                real = mask.numpy().astype(bool) if key == NEXT + HIDDEN_STATES else slice(None)
                difference = float(np.abs(value - expected[key].numpy())[real].max())
                # Unlike max(), keeps NaN: it must fail.
                worst[name] = float(np.maximum(worst[name], difference))
            if not worst[name] <= FP32_TOLERANCE:
                raise VerificationError(
                    f"{name} differs from its PyTorch module by {worst[name]:.2e}; "
                    f"the bar is {FP32_TOLERANCE:.0e}",
                    "nothing was written; please report this with your model's config.json",
                )
            state |= {key.removeprefix(NEXT): value for key, value in expected.items()}
    return worst


def _batches(
    rows: Sequence[EncodedRow], model: MultiExitModel
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        shape = (len(part), max(len(row) for row in part))
        ids = np.full(shape, model.backbone.config.pad_token_id or 0, np.int64)
        mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for number, row in enumerate(part):
            ids[number, : len(row)] = row.input_ids
            types[number, : len(row)] = row.token_type_ids
            mask[number, : len(row)] = 1
        yield torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(types)
