"""Synthetic traces: deeper exits are surer and more often right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fpabee.calibration.choose import Selector
from fpabee.calibration.scoring import LabelledLogits
from fpabee.calibration.stopping_costs import StoppingCosts
from fpabee.calibration.sweep import StopScores
from fpabee.runtime import RULES, Measure, ProblemType


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., LabelledLogits]:
    """Makes a trace whose rows are easy or hard, with their labels."""

    def make(
        count: int = 600,
        exits: int = 6,
        labels: int = 3,
        problem_type: ProblemType = ProblemType.SINGLE_LABEL,
        seed: int = 0,
    ) -> LabelledLogits:
        generator = np.random.default_rng(seed)
        ease = generator.uniform(0.3, 2.0, size=count)
        noise = generator.normal(size=(exits, count, labels)).cumsum(axis=0)
        noise /= np.sqrt(np.arange(1, exits + 1))[:, None, None]
        depth = np.linspace(0.5, 3.0, exits)[:, None, None] * ease[:, None]
        towards: NDArray[np.floating[Any]]
        if problem_type is ProblemType.SINGLE_LABEL:
            truth = generator.integers(0, labels, count)
            towards = 2 * np.eye(labels)[truth]
        else:
            truth = generator.integers(0, 2, (count, labels))
            towards = np.asarray(2.0 * truth - 1)
        logits = (towards * depth + noise).astype(np.float32)
        lengths = generator.integers(5, 40, count)
        return LabelledLogits(logits, lengths.astype(np.intp), truth, problem_type)

    return make


def layer_costs(rows: LabelledLogits) -> NDArray[np.float64]:
    """One second for each exit."""
    return np.repeat(np.arange(1.0, rows.exits + 1)[:, None], len(rows), axis=1)


def make_selector(
    rows: LabelledLogits, metric: str = "accuracy", names: tuple[str, ...] = ()
) -> Selector:
    """Settings of some rules, by default all, and two rules with a threshold for each exit."""
    stop = StopScores(rows)
    swept = stop.families(names or list(RULES), [Measure.JSKD, Measure.REKD])
    fitted = stop.families(["entropy", "fpabee"], [Measure.JSKD], patiences=[1])
    costs = StoppingCosts(rows, metric, layer_costs(rows))
    return Selector(costs, list(swept), list(fitted))
