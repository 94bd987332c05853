"""What every threshold of a rule would do on a trace, all at once: no model runs again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.manifest import ProblemType
from ..runtime.errors import RuleError
from ..runtime.rules.measures import Answers, Array
from ..runtime.rules.rules import ExitRule
from .scoring import Rows
from .stop_scores import Family, StopScores


class Sweep:
    """Sums over rows at every threshold of a family.

    As a threshold rises, a row moves from the last exit to earlier ones, each time at a known
    threshold. So a sum over rows, at all thresholds, is a cumulative histogram of what the
    moves change.

    Args:
        family: the rule.
        grid: thresholds of its stop scores, ascending.
    """

    def __init__(self, family: Family, grid: Array) -> None:
        self.family = family
        self.grid = grid
        # The first threshold of the grid at which a row stops at an exit or before.
        self._reached = np.minimum.accumulate(
            np.searchsorted(grid, family.scores, side="right"), axis=0
        )

    def sums(self, values: Array, parts: NDArray[np.intp] | None = None) -> Array:
        """Sums over rows, for each part of them.

        Args:
            values: `[exits, rows, terms]`, of a row that stops at an exit.
            parts: `[rows]` the part of each row, from 0; None: all are one.

        Returns:
            `[parts, thresholds, terms]`.
        """
        change = values.copy()
        change[:-1] -= values[1:]
        count = 1 if parts is None else int(parts.max()) + 1
        size = len(self.grid) + 1
        where = self._reached if parts is None else self._reached + parts * size
        columns = [
            np.bincount(where.ravel(), change[..., term].ravel(), minlength=count * size)
            for term in range(values.shape[2])
        ]
        moves = np.stack(columns, axis=-1).reshape(count, size, -1)
        return np.asarray(np.cumsum(moves, axis=1)[:, :-1])

    def exits(self, threshold: int) -> Answers:
        """The exit `[rows]` of each row at a threshold of the grid, by its number."""
        return np.asarray((self._reached <= threshold).argmax(axis=0) + 1)


def threshold_for_depth(
    logits: NDArray[np.floating[Any]],
    rule: ExitRule,
    problem_type: ProblemType,
    exit_layers: Sequence[int],
    depth: float,
    label_thresholds: Sequence[float] = (),
) -> ExitRule:
    """The rule with the threshold whose mean depth is closest to a wish.

    About 200 thresholds are tried, at quantiles of the rule's scores.

    Args:
        logits: `[exits, rows, labels]` of any floating-point type, at full depth: such as
            `Trace.logits`.
        rule: the rule; its threshold is replaced by one for all exits.
        problem_type: the task.
        exit_layers: the layer of each exit, such as `Manifest.exit_layers`.
        depth: the mean depth wanted, in layers; each row counts alike, whatever its length.
        label_thresholds: multi-label decision cuts, see `Task.label_thresholds`; none means 0.5.

    Returns:
        The rule, with that threshold.

    Raises:
        RuleError: the rule has no threshold.

    Example:
        ```python
        from fpabee.calibration import threshold_for_depth
        from fpabee.runtime import Engine, FPabee

        with Engine.load("engines/") as engine:
            trace = engine.trace(["turn on the lights", "play jazz", "is it going to rain"])
            task, layers = engine.manifest.task, engine.manifest.exit_layers
            half = layers[-1] / 2
            rule = FPabee(threshold=0.0)
            rule = threshold_for_depth(trace.logits, rule, task.problem_type, layers, half)
            engine.predict(["play jazz"], rule=rule)
        ```
    """
    if not hasattr(rule, "threshold"):
        raise RuleError(f"rule {rule.name} has no threshold", "choose a rule that has one")
    lengths = np.ones(logits.shape[1], np.intp)
    rows = Rows(logits.astype(np.float32), lengths, None, problem_type, tuple(label_thresholds))
    family = StopScores(rows).family(dataclasses.replace(rule, threshold=0.0))  # type: ignore[call-arg]
    sweep = Sweep(family, family.grid)
    layers = np.repeat(np.asarray(exit_layers, np.float64)[:, None], len(rows), axis=1)
    misses = np.abs(sweep.sums(layers[..., None])[0, :, 0] / len(rows) - depth)
    return family.with_threshold(float(sweep.grid[misses.argmin()]))
