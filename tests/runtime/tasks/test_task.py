"""Each kind of model says itself what counts as the same answer, and everyone asks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.calibration.scoring import LabelledLogits, Scorer
from fpabee.runtime import Budget, Confidence, ProblemType, read_manifest
from fpabee.runtime.check import EXPORT_REQUIREMENTS, compare
from fpabee.runtime.rules.measures import Integers, Mask
from fpabee.runtime.tasks import SingleLabel, unnamed_task
from fpabee.runtime.watch import Watch

from ..watching import promising

# Two exits, two rows: the second row changes its class between the exits.
LOGITS = np.array([[[0, 9], [9, 0]], [[0, 9], [0, 9]]], np.float32)


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """All classes count as the same answer."""

    def same(self: SingleLabel, some: Integers, others: Integers) -> Mask:
        return np.ones(np.broadcast_shapes(np.shape(some), np.shape(others)), np.bool_)

    monkeypatch.setattr(SingleLabel, "same", same)


@pytest.mark.usefixtures("lenient")
def test_the_check_of_a_target_asks_the_task() -> None:
    task = unnamed_task(ProblemType.SINGLE_LABEL, 2)
    others = np.flip(LOGITS, axis=-1)
    agreement = compare(LOGITS, others, Budget(exit=2), task, EXPORT_REQUIREMENTS)
    assert agreement.label_agreement == 1


@pytest.mark.usefixtures("lenient")
def test_calibration_asks_the_task_unless_thresholds_decide() -> None:
    rows = LabelledLogits(LOGITS, np.ones(2, np.intp), None, ProblemType.SINGLE_LABEL)
    scorer = Scorer(rows, "agreement")
    assert not scorer.changed.any()
    assert not scorer.relabelled.any()
    rows = replace(rows, decision_thresholds=(1.0, 0.5))
    by_thresholds = Scorer(rows, "agreement")
    assert by_thresholds.changed.tolist() == [[False, True], [False, False]]
    assert not by_thresholds.relabelled.any()


@pytest.mark.usefixtures("lenient")
def test_watching_asks_the_task(
    engine_copy: Callable[..., Path], set_points: Callable[..., None]
) -> None:
    manifest = read_manifest(promising(engine_copy(), set_points, early=Confidence(threshold=0.3)))
    watch = Watch(manifest, manifest.default_target, 100.0, "early")
    row: Any = watch.choose("early", 1)[0]
    first, second = np.eye(4, dtype=np.float32)[:2]
    assert row.stopped(1, first)
    assert not row.stopped(3, second)
    watched = watch.watched("early")
    assert watched is not None
    assert (watched.rows, watched.changed_answers) == (1, 0)
