"""Check that an exported model gives what the PyTorch model gives.

Every export checks each graph against its PyTorch module, on the inputs that the PyTorch model
feeds it. Then it checks the chain of graphs, in the runtime that users run, against the whole
model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from ..runtime.agreement import EXPORT_REQUIREMENTS, Agreement, Logits, compare, must_pass
from ..runtime.artifact.folder import sha256_of
from ..runtime.artifact.manifest import (
    ATTENTION_BIAS,
    HIDDEN_STATES,
    NEXT,
    VERIFICATION_NAME,
    Manifest,
)
from ..runtime.backends.onnxruntime_session import cpu_session
from ..runtime.backends.stepping import steps
from ..runtime.encoding import EncodedRow, Text, padded_batches, padding_values
from ..runtime.engine import Engine
from ..runtime.errors import VerificationError
from .model import MultiExitModel
from .segments import Cut

# The smallest tolerance that is recorded: in fp32, logits differ by up to 1e-5 between batches.
LEAST_TOLERANCE = 1e-5

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

_BATCH = 8
_ALONE = 8
_REPORT = "nothing was written; please report this with your model's config.json"


def reference_logits(
    model: MultiExitModel, rows: Sequence[EncodedRow], padding: Mapping[str, float]
) -> Logits:
    """Logits `[exits, rows, labels]` float32 of the PyTorch model, in padded batches.

    Args:
        model: the model.
        rows: tokenized rows.
        padding: see `padding_values`.
    """
    batches = []
    for batch in padded_batches(rows, padding, _BATCH):
        ids, types, bias = (torch.from_numpy(array) for array in batch.values())
        mask = (bias[:, 0, 0] == 0).long()
        with torch.no_grad():
            batches.append(model(ids, mask, types if model.backbone.token_types else None).numpy())
    return np.concatenate(batches, axis=1).astype(np.float32)


def check_graphs(
    cut: Cut, manifest: Manifest, folder: Path, rows: Sequence[EncodedRow]
) -> dict[str, float]:
    """The largest difference between each graph and its module, on inputs from the PyTorch model.

    Raises:
        VerificationError: a graph differs too much; the first one is named.
    """
    batches = list(padded_batches(rows, padding_values(manifest.tokenizer), _BATCH))
    worst = dict.fromkeys(cut.modules, 0.0)
    for step in steps(
        manifest, batches, lambda name: cpu_session(folder / manifest.graphs[name].file)
    ):
        with torch.no_grad():
            outputs = cut.modules[step.graph](
                {key: torch.from_numpy(value) for key, value in step.inputs.items()}
            )
        expected = {key: value.numpy() for key, value in outputs.items()}
        is_real = batches[step.batch][ATTENTION_BIAS][:, 0, 0] == 0
        for key, value in step.outputs.items():
            difference = np.abs(value - expected[key])
            if key == NEXT + HIDDEN_STATES:  # those of padding are never read
                difference = difference[is_real]
            # Unlike max(), this keeps NaN, which must fail.
            worst[step.graph] = float(np.maximum(worst[step.graph], difference.max()))
        if not worst[step.graph] <= EXPORT_REQUIREMENTS.logits:
            raise VerificationError(
                f"{step.graph} differs from its PyTorch module by {worst[step.graph]:.2e}; "
                f"at most {EXPORT_REQUIREMENTS.logits:.0e} is allowed",
                _REPORT,
            )
        step.outputs.update(expected)
    return worst


def check_chain(
    engine: Engine, texts: Sequence[Text], expected: Logits, graphs: dict[str, float]
) -> Agreement:
    """Compare the chain with the PyTorch model.

    Args:
        engine: the export, loaded.
        texts: the texts to compare.
        expected: `[exits, rows, labels]` of the PyTorch model.
        graphs: what `check_graphs` returned, for the record.

    Raises:
        VerificationError: logits, labels or exits differ too much.
    """
    together = engine.trace(texts).logits
    alone = np.concatenate([engine.trace([text]).logits for text in texts[:_ALONE]], axis=1)
    rule, task = engine.rule, engine.manifest.task
    first_exit = engine.manifest.exits[0]
    first, second = (
        compare(found, expected[:, : found.shape[1]], rule, task, EXPORT_REQUIREMENTS, first_exit)
        for found in (together, alone)
    )
    for agreement in (first, second):
        must_pass(agreement, "the chain differs from the PyTorch model", _REPORT)
    difference = max(first.max_logit_difference, second.max_logit_difference)
    return dataclasses.replace(first, max_logit_difference=difference, graphs=graphs)


def with_verification(
    folder: Path, manifest: Manifest, target: str, agreement: Agreement
) -> Manifest:
    """Write `verification.json`, and return the manifest that records the result.

    Args:
        folder: the engines folder.
        manifest: its manifest; the new one is returned, not written.
        target: the target that was compared.
        agreement: how closely it agrees with the PyTorch model.
    """
    path = folder / VERIFICATION_NAME
    path.write_text(json.dumps(agreement.to_dict(), indent=2) + "\n", encoding="utf-8")
    tolerance = max(LEAST_TOLERANCE, agreement.max_logit_difference)
    checked = msgspec.structs.replace(manifest.targets[target], tolerance=tolerance)
    return msgspec.structs.replace(
        manifest,
        targets={**manifest.targets, target: checked},
        files={**manifest.files, VERIFICATION_NAME: sha256_of(path)},
    )
