"""What passes verification, what does not, and what is too close to call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from fpabee.exporter.parity import Parity, check_chain
from fpabee.runtime.artifact.manifest import ProblemType, Task
from fpabee.runtime.encoding import Text
from fpabee.runtime.engine import Engine
from fpabee.runtime.errors import VerificationError
from fpabee.runtime.rules.rules import Confidence, ExitRule, FPabee, Pabee

Logits = NDArray[np.float32]
SINGLE, MULTI = ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL
TOLERANCE = 1e-4


@dataclass
class FakeEngine:
    """Gives prepared logits: those of all texts, and those of a text run alone."""

    together: Logits
    alone: Logits
    rule: ExitRule = field(default_factory=lambda: FPabee(threshold=0.1))
    problem_type: ProblemType = SINGLE

    @property
    def manifest(self) -> Any:
        labels = tuple(map(str, range(self.together.shape[-1])))
        return SimpleNamespace(task=Task(problem_type=self.problem_type, labels=labels))

    def trace(self, texts: Sequence[Text]) -> Any:
        if len(texts) == self.together.shape[1] > 1:
            return SimpleNamespace(logits=self.together)
        row = int(str(texts[0]))
        return SimpleNamespace(logits=self.alone[:, row : row + 1])


def check(expected: Logits, found: Logits, alone: Logits | None = None, **settings: Any) -> Parity:
    engine = FakeEngine(found, found if alone is None else alone, **settings)
    texts = [str(number) for number in range(expected.shape[1])]
    return check_chain(cast(Engine, engine), texts, expected, {"segment_01": 1e-6}, TOLERANCE)


def logits(*exits: Sequence[Sequence[float]]) -> Logits:
    return np.array(exits, np.float32)


@pytest.fixture
def sure() -> Logits:
    """Three exits, four rows, three labels: no tie, and no score near a threshold."""
    return np.random.default_rng(0).normal(0, 3, (3, 4, 3)).astype(np.float32)


def changed(values: Logits, exit_number: int, amount: float) -> Logits:
    result = values.copy()
    result[exit_number - 1, 1, 2] += amount
    return result


def test_equal_logits_pass(sure: Logits) -> None:
    parity = check(sure, sure.copy())
    assert parity == Parity(
        rows=4,
        graphs={"segment_01": 1e-6},
        max_logit_difference=0.0,
        label_agreement=1.0,
        exit_agreement=1.0,
        near_ties=0,
        passed=True,
    )
    assert json.loads(json.dumps(parity.to_dict()))["graphs"] == {"segment_01": 1e-6}


def test_difference_within_the_bar_passes_and_is_recorded(sure: Logits) -> None:
    parity = check(sure, changed(sure, 2, 5e-5))
    assert parity.max_logit_difference == pytest.approx(5e-5, rel=0.02)
    assert parity.passed


@pytest.mark.parametrize("exit_number", [1, 2, 3])
def test_difference_beyond_the_bar_names_the_first_bad_exit(exit_number: int, sure: Logits) -> None:
    found = changed(changed(sure, exit_number, 1e-3), 3, 1e-3)
    with pytest.raises(VerificationError, match=f"from exit {exit_number} on"):
        check(sure, found)


@pytest.mark.parametrize("exit_number", [1, 2, 3])
def test_text_that_differs_only_when_run_alone_fails(exit_number: int, sure: Logits) -> None:
    with pytest.raises(VerificationError, match=f"from exit {exit_number} on"):
        check(sure, sure, alone=changed(sure, exit_number, 1e-3))


@pytest.mark.parametrize("amount", [np.nan, np.inf])
def test_what_is_not_a_number_fails(amount: float, sure: Logits) -> None:
    with pytest.raises(VerificationError, match="from exit 2 on"):
        check(sure, changed(sure, 2, amount))


@pytest.mark.parametrize("amount", [np.nan, np.inf])
def test_what_is_not_a_number_when_run_alone_fails(amount: float, sure: Logits) -> None:
    with pytest.raises(VerificationError):
        check(sure, sure, alone=changed(sure, 2, amount))


@pytest.mark.parametrize(
    ("problem_type", "expected", "found"),
    [
        (SINGLE, [1.0, 1.00005, -3.0], [1.00005, 1.0, -3.0]),
        (MULTI, [4.0, -4.0, 0.00003], [4.0, -4.0, -0.00003]),
    ],
)
def test_labels_that_flip_at_a_tie_are_left_out_and_counted(
    problem_type: ProblemType, expected: list[float], found: list[float]
) -> None:
    clear = [3.0, -3.0, -3.0]
    parity = check(
        logits([clear, expected, clear]),
        logits([clear, found, clear]),
        problem_type=problem_type,
        rule=FPabee(threshold=-1.0),
    )
    assert parity.label_agreement == 1.0
    assert parity.near_ties == 1
    assert parity.passed


def test_labels_are_compared_where_there_is_no_tie() -> None:
    expected = logits([[1.0, 1.01], [1.0, 1.01], [9.0, 0.0], [9.0, 0.0]])
    found = expected.copy()
    found[0, 0] = [1.01, 1.0]
    with pytest.raises(VerificationError, match=r"labels agree for 75\.00%"):
        check(expected, found, rule=FPabee(threshold=-1.0))


def test_exit_that_flips_at_the_threshold_is_left_out_and_counted() -> None:
    expected = logits([[1.0, 0.0], [5.0, 0.0], [0.2, 0.0]], [[9.0, 0.0]] * 3)
    score = 1 / (1 + np.exp(-1.0))
    found = expected.copy()
    found[0, 0, 0] -= 4e-5
    parity = check(expected, found, rule=Confidence(threshold=score - 1e-6))
    assert parity.exit_agreement == 1.0
    assert parity.near_ties == 1
    assert parity.passed


def test_exit_that_flips_away_from_the_threshold_fails() -> None:
    expected = logits([[1.0, 0.0], [5.0, 0.0]], [[9.0, 0.0]] * 2)
    found = expected.copy()
    found[0, 0, 0] = 2.0
    with pytest.raises(VerificationError, match=r"exits for 50\.00%"):
        check(expected, found, rule=Confidence(threshold=0.8))


def test_exit_of_a_rule_about_labels_is_unsure_at_a_tie() -> None:
    expected = logits([[9.0, 0.0]] * 2, [[1.00005, 1.0], [9.0, 0.0]], [[9.0, 0.0]] * 2)
    found = expected.copy()
    found[1, 0] = [1.0, 1.00005]
    parity = check(expected, found, rule=Pabee(patience=1))
    assert parity.exit_agreement == 1.0
    assert parity.near_ties == 1
    assert parity.passed
