"""Logits in fp32, with which precisions and targets are compared on more texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..runtime.agreement import Logits
from ..runtime.artifact.manifest import Manifest
from ..runtime.encoding import Text
from ..runtime.engine import Engine
from ..runtime.rules.rules import ExitRule

FP32_TARGET = "onnxruntime-fp32"

_MOST_TEXTS = 2000


def exact_logits(
    folder: Path, manifest: Manifest, texts: Sequence[Text]
) -> tuple[list[Text], Logits]:
    """The first 2,000 texts, and their logits in `onnxruntime-fp32`.

    Raises:
        BackendError: the folder does not have that target.
    """
    texts, rule = list(texts[:_MOST_TEXTS]), ExitRule.from_dict(manifest.default_rule)
    with Engine.load(folder, FP32_TARGET, rule=rule) as engine:
        return texts, engine.trace(texts).logits
