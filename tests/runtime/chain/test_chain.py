"""The chain: groups that are joined keep what belongs to each row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from fpabee.runtime import Budget, Engine
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.backends.host import HostBackend
from fpabee.runtime.chain.groups import Group
from fpabee.runtime.rules.measures import Outputs

from ...closeness import assert_close


def test_joined_rows_keep_what_belongs_to_them(
    engines: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostBackend, "joins", True)
    texts = ["rain", "the film is good", "not the plot", "sun and rain", "bad"]
    with Engine.load(engines["bert"], rule=Budget(exit=3)) as engine, engine.core.chain() as chain:
        encoded, depth = engine.core.encode(texts), engine.trace(texts).logits
        logits = np.arange(20.0).reshape(5, 4)  # those of each row tell it apart
        groups = []
        for rows in (np.arange(3), np.arange(3, 5)):
            part = [encoded[row] for row in rows]
            group = Group.of(rows, part, engine.core.runner(), math.inf, engine.core.limits)
            chain.enqueue(group)
            chain.finish()
            group.state.streak = 10 + rows
            group.state.earlier = Outputs(logits[rows], ProblemType.SINGLE_LABEL)
            group.deadlines = np.array([100.0 + row for row in rows])
            groups.append(group)
        joined, other = groups
        chain.keep(joined, np.array([True, False, True]))
        chain.join(joined, [other])
        assert len(other) == 0
        going = [0, 2, 3, 4]
        assert joined.rows.tolist() == going
        assert joined.lengths.tolist() == [len(encoded[row]) for row in going]
        assert joined.deadlines.tolist() == [100.0 + row for row in going]
        assert joined.state.streak.tolist() == [10 + row for row in going]
        assert joined.state.earlier is not None
        np.testing.assert_array_equal(joined.state.earlier.logits, logits[going])
        chain.enqueue(joined)
        assert_close(chain.finish().logits, depth[1, going])
        assert len(chain.execution._taken) == 1, "the hidden states of both groups were released"
