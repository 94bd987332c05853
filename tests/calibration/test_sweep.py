from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fpabee.calibration import threshold_for_depth
from fpabee.runtime import Entropy, FPabee, Pabee, ProblemType, RuleError, simulate

LAYERS = (2, 4, 6, 8)


def _logits() -> NDArray[np.float64]:
    sharpness = np.array([0.5, 1.0, 2.0, 4.0])[:, None, None]
    return np.asarray(np.random.default_rng(3).normal(size=(4, 300, 3)) * sharpness)


@pytest.mark.parametrize("depth", [3.0, 5.0, 7.0])
def test_mean_depth_is_the_wish(depth: float) -> None:
    logits = _logits()

    rule = threshold_for_depth(
        logits, Entropy(threshold=0.0), ProblemType.SINGLE_LABEL, LAYERS, depth
    )

    exits = simulate(logits, rule, ProblemType.SINGLE_LABEL).exits
    assert np.array(LAYERS)[exits - 1].mean() == pytest.approx(depth, abs=0.1)


def test_other_settings_are_kept() -> None:
    rule = FPabee(threshold=0.0, patience=2, min_exit=3)

    found = threshold_for_depth(_logits(), rule, ProblemType.SINGLE_LABEL, LAYERS, 7.0)

    assert isinstance(found, FPabee)
    assert (found.patience, found.min_exit) == (2, 3)
    assert found.threshold_at(1) > 0


def test_a_rule_without_threshold_is_refused() -> None:
    with pytest.raises(RuleError, match="has no threshold"):
        threshold_for_depth(_logits(), Pabee(patience=1), ProblemType.SINGLE_LABEL, LAYERS, 5.0)
