"""Synthetic traces: deeper exits are surer and more often right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fpabee.calibration.scoring import Rows
from fpabee.runtime import ProblemType


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., Rows]:
    """Makes a trace whose rows are easy or hard, with their labels."""

    def make(
        count: int = 600,
        exits: int = 6,
        labels: int = 3,
        problem_type: ProblemType = ProblemType.SINGLE_LABEL,
        seed: int = 0,
    ) -> Rows:
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
        return Rows(logits, lengths.astype(np.intp), truth, problem_type)

    return make
