"""`decide` against `simulate`, compiled as C, and its PTX against its source."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fpabee.runtime import (
    RULES,
    Budget,
    Confidence,
    Either,
    Energy,
    Entropy,
    Epee,
    ExitRule,
    FPabee,
    Learned,
    Measure,
    Pabee,
    Pcee,
    ProblemType,
    simulate,
)
from fpabee.runtime.backends.decide import settings_of
from fpabee.runtime.rules.learned import FEATURES

from ...doubles.decide import exits_of

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden" / "exit_rules.json").read_text(encoding="utf-8")
)
SINGLE, MULTI = ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL
TOO_CLOSE = 1e-6
EXITS = 6


def test_golden_vectors() -> None:
    for vector in GOLDEN:
        logits = np.asarray(vector["logits"], np.float32)[:, None]
        count, _, labels = logits.shape
        rule, task = ExitRule.from_dict(vector["rule"]), ProblemType(vector["task"])
        settings = settings_of(rule, task, range(1, count + 1), labels)
        assert exits_of(logits, settings).tolist() == [vector["exit"]], vector["rule"]


def rules_of(random: np.random.Generator, labels: int) -> list[ExitRule]:
    """Every rule and measure, with settings that stop some rows at most exits."""

    def thresholds(top: float) -> Any:
        if random.random() < 0.5:
            return float(random.uniform(0, top))
        return tuple(random.uniform(0, top, EXITS).tolist())

    def others() -> dict[str, Any]:
        least = int(random.integers(0, 4))
        most = [None, int(random.integers(least, EXITS + 1))][int(random.integers(2))]
        return {"min_exit": least, "max_exit": None if most == 0 else most}

    def patience() -> int:
        return int(random.integers(1, 4))

    top = float(np.log(labels + 1))
    weights = random.normal(size=(EXITS - 1) * len(FEATURES)).tolist()
    of_labels = random.normal(size=labels).tolist()
    return [
        *(
            FPabee(threshold=thresholds(top), measure=m, patience=patience(), **others())
            for m in Measure
        ),
        Pabee(patience=patience(), **others()),
        Entropy(threshold=thresholds(top), **others()),
        Confidence(threshold=thresholds(1.0), **others()),
        Energy(threshold=thresholds(0.5), **others()),
        Pcee(threshold=thresholds(1.0), patience=patience(), **others()),
        Epee(threshold=thresholds(0.5), patience=patience(), **others()),
        Either(threshold=thresholds(top / 2), agreement=top / 2, patience=patience(), **others()),
        Learned(threshold=thresholds(1.0), weights=weights, label_weights=of_labels, **others()),
        Budget(exit=int(random.integers(1, EXITS + 1)), **others()),
    ]


def test_a_million_random_rows(record_property: Any) -> None:
    """All exits are those of `simulate`, except for scores within 1e-6 of a threshold."""
    random = np.random.default_rng(17)
    total = close = different = 0
    found_exits: dict[str, Counter[int]] = {name: Counter() for name in RULES}
    while total < 1_000_000:
        task = (SINGLE, MULTI)[int(random.integers(2))]
        labels = int(random.integers(1, 8))
        first = int(random.integers(0, 2))
        scale = (0.1, 1.0, 4.0, 30.0)[int(random.integers(4))]
        # Each exit moves the logits less than the one before.
        steps = random.normal(size=(EXITS + 1 - first, 2000, labels))
        logits = np.cumsum(steps / np.arange(1, len(steps) + 1)[:, None, None], axis=0) * scale
        if random.random() < 0.3:
            logits = np.round(logits)  # many ties
        logits = logits.astype(np.float32)
        cuts = tuple(random.uniform(0.2, 0.8, labels).tolist()) if random.random() < 0.5 else ()
        cuts = cuts if task is MULTI else ()
        exits = range(first, EXITS + 1)
        for rule in rules_of(random, labels):
            settings = settings_of(rule, task, exits, labels, cuts)
            assert settings is not None
            found = exits_of(logits, settings, first)
            expected, lower, upper = (
                simulate(logits, each, task, cuts, first).exits
                for each in (rule, rule.shifted(-TOO_CLOSE), rule.shifted(TOO_CLOSE))
            )
            is_close = lower != upper
            np.testing.assert_array_equal(found[~is_close], expected[~is_close], str(rule))
            total += len(found)
            close += int(np.count_nonzero(is_close))
            different += int(np.count_nonzero(found != expected))
            found_exits[rule.name].update(found.tolist())
    record_property("rows", total)
    record_property("rows within 1e-6 of a threshold", close)
    record_property("of these, rows with another exit", different)
    print(f"{total} rows, {close} within 1e-6 of a threshold, {different} of these differ")
    assert close < total / 1000
    assert all(len(exits) == EXITS for exits in found_exits.values()), found_exits
