"""The study of two passes: what draws certify, which promises are broken, and what tables say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import two_passes
from two_passes import (
    PEER,
    broken_promises,
    certified_draws,
    convert_table,
    promise_table,
    speed_table,
)

from fpabee.calibration import Bound
from fpabee.calibration.scoring import LabelledLogits
from fpabee.runtime import ProblemType

LABELS = ("no", "yes")
ROWS = 1000
BOUND = Bound(changed_answers=0.01)


def world(*, early_agrees: bool, last_agrees: bool = True) -> LabelledLogits:
    """Rows of two exits, which agree with the reference or answer the opposite."""
    said = np.where(np.arange(ROWS) % 2, 9, -9)
    reference = np.stack([said, -said], axis=1).astype(np.float32)
    exits = [reference if agrees else -reference for agrees in (early_agrees, last_agrees)]
    lengths = np.full(ROWS, 5)
    return LabelledLogits(
        np.stack(exits), lengths, None, ProblemType.SINGLE_LABEL, reference=reference
    )


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_passes, "PROMISES", 3)
    monkeypatch.setattr(two_passes, "DRAWS", 3)


@pytest.mark.parametrize(("early_agrees", "in_doubt"), [(True, 0.0), (False, 1.0)])
def test_promises_are_judged_on_all_rows(early_agrees: bool, in_doubt: float) -> None:
    judged = broken_promises(world(early_agrees=early_agrees), LABELS, BOUND, 600)
    kept = {"certified": 3, "broken": 0, "changed": 0.0, "in_doubt": in_doubt}
    assert judged == {"rows": ROWS, "certifying": 600} | kept


def test_what_certifies_nothing_breaks_nothing() -> None:
    never = world(early_agrees=False, last_agrees=False)
    judged = broken_promises(never, LABELS, BOUND, 600)
    assert (judged["certified"], judged["broken"], judged["changed"]) == (0, 0, None)


def test_draws_that_certify_one_pass_or_two_are_counted() -> None:
    good = world(early_agrees=True)
    never = world(early_agrees=False, last_agrees=False)
    for one, two, counts in ((good, good, (3, 3, 3)), (good, never, (3, 0, 0))):
        drawn = certified_draws(one, two, LABELS, BOUND, 600)
        assert drawn == dict(zip(("one_pass", "two_passes", "both"), counts, strict=True))


def test_the_tables_say_what_was_found() -> None:
    judged = {"rows": 1234, "certifying": 600, "certified": 180, "broken": 9}
    shares = {"changed": 0.0061, "in_doubt": None}
    drawn = {"one_pass": 30, "two_passes": 28, "both": 27}
    promises = promise_table({"mini-trec": {"openvino-bf16 1": judged | shares | drawn}})
    times = {"mean_ms": 2.0, "median_ms": 1.5, "p99_ms": 4.0, "memory_mib": 200.0}
    before = {"rows": 500, "layers": 2.0, "in_doubt": 0, "changed": 3, "rows_per_s": 1000} | times
    today = before | {"in_doubt": 50, "rows_per_s": 1500, "mean_ms": 1.0}
    rounds: dict[str, Any] = {
        "1 before openvino-bf16": before,
        "1 two passes openvino-bf16": today,
        f"1 {PEER.name}": before | {"layers": None, "rows_per_s": 500},
        "2 two passes openvino-bf16": today | {"rows_per_s": 1700},
    }
    lines = [
        *promises,
        *speed_table("mini-trec", rounds),
        *convert_table({"1 today": 60.2, "2 today": 70.2}),
    ]
    for line in (
        "| mini-trec | `openvino-bf16` | 1 % | 1,234 | 600 | 180 | 9 (5.0%) | 0.61% |  | 30 | 28 "
        "| 27 |",
        "\n### mini-trec: 500 texts, 2 rounds",
        # Ratios are of the rounds that both have.
        "| two passes openvino-bf16 | 2.00 | 10.0% | 3 | 1,600 | 1.50 | 3.00 | 1.00 | 1.50 | 4.00 "
        "| 0.50 | 1.00 | 200 |",
        "| openvino-int8 |  |  | 3 | 500 |  | 1.00 | 2.00 | 1.50 | 4.00 |  |  | 200 |",
        "| today | 65 | 60, 70 |",
    ):
        assert line in lines
