"""The kinds of outputs."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from fpabee.runtime import Outputs
from fpabee.runtime.artifact.manifest import ProblemType

LOGITS = np.array([[0.0, 2.0], [3.0, 1.0]], np.float32)


@pytest.mark.parametrize("problem_type", ProblemType)
def test_outputs_that_are_copied_or_taken_or_joined_are_of_the_same_kind(
    problem_type: ProblemType,
) -> None:
    outputs = Outputs(LOGITS, problem_type, (0.9, 0.8))
    parts = [outputs.take(np.array([row])) for row in range(2)]
    for same in (copy.deepcopy(outputs), Outputs.join(parts)):
        assert type(same) is type(outputs)
        np.testing.assert_array_equal(same.answers, outputs.answers)
