"""Rules in a few words, and the digits of their thresholds."""

from __future__ import annotations

import pytest

from fpabee.runtime import Budget, Confidence, Entropy, ExitRule, FPabee
from fpabee.runtime.rules.words import rounded, rule_in_words


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (FPabee(threshold=0.123456, patience=2), "fpabee jskd 0.1235, patience 2"),
        (Entropy(threshold=1.0, min_exit=3), "entropy 1, min exit 3"),
        (Entropy(threshold=(0.1, 0.2)), "entropy threshold per exit"),
        (Confidence(threshold=0.1 + 0.2), "confidence 0.3"),
        (Confidence(threshold=0.99998765432), "confidence 0.99998765"),
        (
            Confidence(threshold=0.9, label_thresholds=(1.0, 0.7, 0.7)),
            "confidence 0.9, label thresholds 0.7",
        ),
        (
            Entropy(threshold=0.5, exit_0_threshold=0.9999912344),
            "entropy 0.5, exit 0 threshold 0.999991234",
        ),
        (Budget(exit=3, exit_0_threshold=0.99999), "cascade: exit 0 above 0.99999, else exit 3"),
    ],
)
def test_words(rule: ExitRule, words: str) -> None:
    assert rule_in_words(rule) == words


def test_digits_close_to_1_are_those_of_the_distance() -> None:
    # The last one is the largest number below 1.
    values = [0.00012344, 0.543214, 0.912344, 0.99991234444, 1 - 1.2344e-9, 1 - 2**-53, -0.9999123]
    expected = [0.0001234, 0.5432, 0.91234, 0.99991234, 1 - 1.234e-9, 1 - 2**-53, -0.9999]
    assert list(map(rounded, values)) == expected
