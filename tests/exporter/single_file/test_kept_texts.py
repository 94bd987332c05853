"""The texts that check a packed file elsewhere stop at different exits, if any do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from fpabee.exporter.single_file.cases import Cases
from fpabee.exporter.single_file.check import texts_to_keep
from fpabee.runtime import Confidence, Engine, read_manifest

RULE = Confidence(threshold=0.9)
SURE = 5.0
CLOSE = float(np.log(27))  # 3 of 4 labels have 0: the largest probability is 0.9


@pytest.fixture
def cases(engines: Mapping[str, Path]) -> Cases:
    """2000 texts that are sure of nothing, of which two are sure at exit 1, but one just so."""
    texts = ["rain fell", *["sun"] * 1999]
    with Engine.load(engines["bert"]) as engine:
        rows = engine.core.encode(texts)
    logits = np.zeros((3, 2000, 4), np.float32)
    logits[0, 0, 0] = CLOSE
    logits[0, 1000, 0] = SURE
    return Cases(manifest=read_manifest(engines["bert"]), texts=texts, rows=rows, expected=logits)


def kept_exits(cases: Cases) -> list[int]:
    model = Mock()
    model.graph.inputs = []
    exits: list[int] = texts_to_keep(model, RULE, cases, "fp32")["exits"]
    return sorted(exits)


def test_a_rare_early_exit_is_checked(cases: Cases) -> None:
    assert kept_exits(cases) == [1, 3, 3, 3]


def test_an_exit_that_rounding_decides_is_not(cases: Cases) -> None:
    logits = cases.expected
    logits[0, 1000, 0] = 0
    assert kept_exits(cases) == [3, 3, 3, 3]


def test_texts_that_all_stop_early_are_taken_as_they_are(cases: Cases) -> None:
    logits = cases.expected
    logits[0, :, 0] = SURE
    assert kept_exits(cases) == [1, 1, 1, 1]
