"""Check that an exported model gives what the PyTorch model gives.

Every export checks the chain of graphs, in the runtime that users run, against the whole model, at
all exits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ..runtime.check import EXPORT_REQUIREMENTS, Agreement, Logits, compare, must_pass
from ..runtime.encoding import Text
from ..runtime.engine import Engine

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

_ALONE = 8
_REPORT = "nothing was written; please report this with your model's config.json"


def check_chain(engine: Engine, texts: Sequence[Text], expected: Logits) -> Agreement:
    """Compare the chain with the PyTorch model, on all texts together, and on some alone.

    Args:
        engine: the export, loaded.
        texts: the texts to compare.
        expected: `[exits, rows, labels]` of the PyTorch model.

    Raises:
        CheckError: logits, labels or exits differ too much.
    """
    alone = [engine.trace([text]).logits for text in texts[:_ALONE]]
    found = np.concatenate([engine.trace(texts).logits, *alone], axis=1)
    twice = np.concatenate([expected, expected[:, : len(alone)]], axis=1)
    task = engine.manifest.task
    first_exit = engine.manifest.exits[0]
    agreement = compare(found, twice, engine.rule, task, EXPORT_REQUIREMENTS, first_exit)
    agreement = dataclasses.replace(agreement, rows=len(texts))
    must_pass(agreement, "the chain differs from the PyTorch model", _REPORT)
    return agreement
