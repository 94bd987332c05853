"""Simulate rules over many settings on one trace: no model runs again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.decider import simulate
from ..runtime.errors import RuleError
from ..runtime.exit_rules import ExitRule
from ..runtime.manifest import ProblemType

_CANDIDATES = 200


def threshold_for_depth(
    logits: NDArray[np.floating[Any]],
    rule: ExitRule,
    problem_type: ProblemType,
    exit_layers: Sequence[int],
    depth: float,
    cuts: Sequence[float] = (),
) -> ExitRule:
    """The rule with the threshold whose mean depth is closest to a wish.

    Args:
        logits: `[exits, rows, labels]`, a trace at full depth.
        rule: the rule; its threshold is replaced.
        problem_type: the task.
        exit_layers: the layer of each exit.
        depth: the mean depth wanted, in layers.
        cuts: multi-label decision cuts, see `Task.cuts`.

    Raises:
        RuleError: the rule has no threshold.
    """
    if not hasattr(rule, "threshold"):
        raise RuleError(f"rule {rule.name} has no threshold", "choose a rule that has one")
    scores = simulate(logits, rule, problem_type, cuts).scores
    quantiles = np.linspace(0.0, 1.0, _CANDIDATES)
    layers = np.asarray(exit_layers)

    def miss(candidate: ExitRule) -> float:
        exits = simulate(logits, candidate, problem_type, cuts).exits
        return abs(float(layers[exits - 1].mean()) - depth)

    candidates = [
        dataclasses.replace(rule, threshold=float(f"{value:.4g}"))  # type: ignore[call-arg]
        for value in np.unique(np.nanquantile(scores, quantiles))
    ]
    return min(candidates, key=miss)
