"""`decide` against `simulate`, compiled as C, and its PTX against its source."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpabee.runtime import (
    RULES,
    Budget,
    Confidence,
    Energy,
    Entropy,
    Epee,
    ExitRule,
    FPabee,
    Measure,
    Pabee,
    Pcee,
    ProblemType,
    simulate,
)
from fpabee.runtime.backends.decide import board_type, settings_of

from ...doubles.decide import ALONE, COUNTED, IN_LANES, compiled, decide, exits_of

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden" / "exit_rules.json").read_text(encoding="utf-8")
)
SINGLE, MULTI = ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL
TOO_CLOSE = 1e-6
EXITS = 6


@pytest.mark.parametrize(("source", "step"), [(ALONE, 1), (IN_LANES, 4)])
def test_golden_vectors(source: Path, step: int) -> None:
    """The lanes of a warp share the labels of a row; threads that stand for them are slow."""
    for vector in GOLDEN[::step]:
        logits = np.asarray(vector["logits"], np.float32)[:, None]
        count, _, labels = logits.shape
        rule, task = ExitRule.from_dict(vector["rule"]), ProblemType(vector["task"])
        settings = settings_of(rule, task, range(1, count + 1), labels)
        found = exits_of(logits, settings, source=source)
        assert found.tolist() == [vector["exit"]], vector["rule"]


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
        Budget(exit=int(random.integers(1, EXITS + 1)), **others()),
    ]


def differing(
    random: np.random.Generator, rows: int, source: Path = ALONE
) -> Iterator[tuple[ExitRule, Any, Any]]:
    """Compare `decide` with `simulate` for random logits and every rule.

    Yields:
        The rule, the exits that `decide` found `[rows]`, and whether they differ from those of
        `simulate` `[rows]`: 1 if they do, 0 if they do not, and 2 or 3 if a score is within 1e-6
        of a threshold.
    """
    task = (SINGLE, MULTI)[int(random.integers(2))]
    labels, first = int(random.integers(1, 8)), int(random.integers(2))
    scale = (0.1, 1.0, 4.0, 30.0)[int(random.integers(4))]
    # Each exit moves the logits less than the one before.
    steps = random.normal(size=(EXITS + 1 - first, rows, labels))
    logits = np.cumsum(steps / np.arange(1, len(steps) + 1)[:, None, None], axis=0) * scale
    if random.random() < 0.3:
        logits = np.round(logits)  # many ties
    logits = logits.astype(np.float32)
    has_thresholds = task is MULTI and random.random() < 0.5
    label_thresholds = tuple(random.uniform(0.2, 0.8, labels).tolist()) if has_thresholds else ()
    for rule in rules_of(random, labels):
        settings = settings_of(rule, task, range(first, EXITS + 1), labels, label_thresholds)
        assert settings is not None
        found = exits_of(logits, settings, first, source)
        expected, lower, upper = (
            simulate(logits, each, task, label_thresholds, first).exits
            for each in (rule, rule.shifted(-TOO_CLOSE), rule.shifted(TOO_CLOSE))
        )
        yield rule, found, (found != expected) + 2 * (lower != upper)


def test_a_million_random_rows(record_property: Callable[[str, object], None]) -> None:
    """All exits are those of `simulate`, except for scores within 1e-6 of a threshold."""
    random = np.random.default_rng(17)
    counts = np.zeros(4, np.int64)
    exits: dict[str, set[int]] = {name: set() for name in RULES}
    while counts.sum() < 1_000_000:
        for rule, found, kinds in differing(random, 2000):
            counts += np.bincount(kinds, minlength=4)
            assert counts[1] == 0, rule
            exits[rule.name] |= set(found.tolist())
    record_property("rows", int(counts.sum()))
    record_property("rows within 1e-6 of a threshold", int(counts[2:].sum()))
    record_property("of these, rows with another exit", int(counts[3]))
    print(f"{counts.sum()} rows; {counts[2:].sum()} are close to a threshold, {counts[3]} differ")
    assert counts[2:].sum() < counts.sum() / 1000
    assert all(found == set(range(1, EXITS + 1)) for found in exits.values())


def test_lanes_that_share_a_row() -> None:
    random = np.random.default_rng(3)
    for _ in range(4):
        for rule, _, kinds in differing(random, 4, IN_LANES):
            assert 1 not in kinds, rule


@pytest.mark.parametrize(
    ("rule", "task", "counts"),
    [
        (Budget(exit=3), SINGLE, [(0, 0)] * 3),
        (Budget(exit=3), MULTI, [(0, 0)] * 3),
        # Two exits, each the largest logit and its label.
        (Pabee(patience=2), SINGLE, [(0, 0), (0, 4), (0, 0)]),
        (Pabee(patience=2), MULTI, [(0, 0), (6, 1), (0, 0)]),
        (Confidence(threshold=0.99), SINGLE, [(3, 2), (3, 2), (0, 0)]),
        (Entropy(threshold=0.1), SINGLE, [(9, 3), (9, 3), (0, 0)]),
        (Entropy(threshold=0.1), MULTI, [(9, 1), (9, 1), (0, 0)]),
        (Energy(threshold=0.1), MULTI, [(4, 2), (4, 2), (0, 0)]),
        # Two distributions of two exponentials for each label, and its logarithms.
        (FPabee(threshold=0.1, measure=Measure.KD), SINGLE, [(0, 0), (15, 5), (0, 0)]),
        (FPabee(threshold=0.1, measure=Measure.JSKD), SINGLE, [(0, 0), (15, 6), (0, 0)]),
        (FPabee(threshold=0.1, measure=Measure.JSD), SINGLE, [(0, 0), (21, 8), (0, 0)]),
        (FPabee(threshold=0.1, measure=Measure.JSKD), MULTI, [(0, 0), (12, 1), (0, 0)]),
        (Epee(threshold=0.1, patience=2), SINGLE, [(9, 3), (9, 6), (0, 0)]),
    ],
)
def test_only_what_the_rule_reads_is_computed(
    rule: ExitRule, task: ProblemType, counts: list[tuple[int, int]]
) -> None:
    """Calls of exp, log and tanh, and reductions over labels, for a row of three labels."""
    library = compiled(COUNTED)
    counters = [ctypes.c_int.in_dll(library, name) for name in ("functions", "reductions")]
    settings = settings_of(rule, task, range(1, 4), 3)
    assert settings is not None
    board, found = np.zeros(1, board_type(3, 3, 1)), []
    board.view(np.uint8)[: len(settings)] = settings
    for number in (1, 2, 3):
        for counter in counters:
            counter.value = 0
        logits = np.array([[0.3, 0.2 * number, -number]], np.float32)
        decide(board.ctypes.data, logits.ctypes.data, number, 1, COUNTED)
        found.append(tuple(counter.value for counter in counters))
    assert found == counts


def test_a_rule_of_another_package_is_unknown() -> None:
    class Other(Budget):
        pass

    assert settings_of(Other(exit=1), SINGLE, range(1, 4), 2) is None
