"""The chain: groups that are joined keep what belongs to each row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fpabee.runtime import Budget, Engine
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.rules.measures import Outputs
from fpabee.runtime.rules.runner import PatienceState


def test_joined_rows_keep_their_lengths_and_their_state(engines: Mapping[str, Path]) -> None:
    texts = ["rain", "the film is good", "not the plot", "sun and rain", "bad"]
    with Engine.load(engines["bert"], rule=Budget(exit=3)) as engine:
        encoded, depth = engine.encode(texts), engine.trace(texts).logits
        logits = np.arange(20.0).reshape(5, 4)  # those of each row tell it apart
        with engine.model.chain() as chain:
            groups = []
            for rows in (np.arange(3), np.arange(3, 5)):
                earlier = Outputs(logits[rows], ProblemType.SINGLE_LABEL)
                state = PatienceState(10 + rows, earlier)
                groups.append(chain.begin([encoded[row] for row in rows], rows, state))
                chain.execution.enqueue(0, groups[-1].hidden)
            groups[0].keep = np.array([0, 2])
            joined = chain.join(groups)
            found = chain.execution.enqueue(1, joined.hidden).result()["logits"]
    going = [0, 2, 3, 4]
    assert joined.rows.tolist() == going
    assert joined.lengths.tolist() == [len(encoded[row]) for row in going]
    assert joined.state.streak.tolist() == [10 + row for row in going]
    assert joined.state.earlier is not None
    np.testing.assert_array_equal(joined.state.earlier.logits, logits[going])
    np.testing.assert_allclose(found, depth[1, going], atol=1e-4)
