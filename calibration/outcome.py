"""What rows that stop at given exits give: the metric, its drop with an interval, the savings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.rules.measures import Array, Integers
from ..runtime.rules.rules import ExitRule
from ..runtime.rules.runner import simulate
from .scoring import AGREEMENT, LabelledLogits, Scorer

_RESAMPLES = 2000
# Rows that are drawn at once, over all samples, to bound the memory.
_BLOCK = 2_000_000


@dataclass(frozen=True)
class Outcome:
    """What a rule gave on some rows.

    Attributes:
        metric: name of the metric, which goes from 0 to 1 (Matthews correlation from -1).
        score: the metric with the rule.
        full_depth_score: the metric at the last exit.
        drop: `full_depth_score` minus `score`, in points.
        interval: of the drop in points, see `drop_interval`: at 95 %, or for guaranteed settings at
            `level_of` their confidence, so that its upper end is a one-sided bound like their
            promise.
        mean_depth: mean number of layers that ran for a row.
        exits: how many rows stopped at each exit, from the first exit on.
        estimated: speed-up over full depth in measured times of the segments.
        rows: how many rows there were.
        exit_0_changed: how many rows stopped at exit 0 with another answer than that of full depth;
            None if the model has no exit 0.
    """

    metric: str
    score: float
    full_depth_score: float
    drop: float
    interval: tuple[float, float]
    mean_depth: float
    exits: tuple[int, ...]
    estimated: float
    rows: int
    exit_0_changed: int | None = None


def outcome(
    scorer: Scorer, exits: Integers, costs: Array, layers: Sequence[int], level: float = 0.95
) -> Outcome:
    """What rows that stop at given exits give.

    Args:
        scorer: the metric of the rows.
        exits: `[rows]` the exit of each row.
        costs: `[exits, rows]` seconds until an exit.
        layers: the layer of each exit.
        level: of the interval.
    """
    places = scorer.rows.at(exits)
    ran = np.asarray(layers)[places[0]]
    score, full = scorer.score(exits), scorer.full_depth
    return Outcome(
        metric=scorer.metric,
        score=score,
        full_depth_score=full,
        drop=100 * (full - score),
        interval=drop_interval(scorer, exits, level),
        mean_depth=float(ran.mean()),
        exits=tuple(int(n) for n in np.bincount(places[0], minlength=len(layers))),
        estimated=float(costs[-1].sum() / costs[places].sum()),
        rows=len(exits),
        exit_0_changed=(
            int(np.count_nonzero(scorer.changed[0] & (exits == 0)))
            if scorer.rows.first_exit == 0
            else None
        ),
    )


def drop_interval(
    scorer: Scorer, exits: Integers, level: float = 0.95, resamples: int = _RESAMPLES
) -> tuple[float, float]:
    """Interval of the drop in points: a bootstrap over rows, each with both of its answers.

    A bootstrap cannot show a kind of change that the rows do not hold. So where some row stopped
    early, neither end is closer to the drop than the exact binomial bound on the share of rows
    with a change that none of n rows shows: 1 - (alpha / 2)^(1/n), about 3.7/n at 95 % (Clopper &
    Pearson 1934; the "rule of three", Hanley & Lippman-Hand 1983). This is exact for means over
    rows, and a rule of thumb for other metrics.

    Args:
        scorer: the metric of the rows.
        exits: `[rows]` the exit of each row.
        level: the confidence level.
        resamples: of the bootstrap.
    """
    rows = len(exits)
    generator = np.random.default_rng(0)
    full, early = scorer.sums[-1], scorer.at(exits)
    if scorer.is_row_mean:
        kinds, counts = np.unique(full[:, 0] - early[:, 0], return_counts=True)
        drawn = generator.multinomial(rows, counts / rows, resamples)
        drops = drawn @ kinds / rows
    else:
        drops = np.zeros(resamples)
        step = max(1, _BLOCK // rows)
        for start in range(0, resamples, step):
            part = drops[start : start + step]
            weights = resampled(rows, len(part), generator, rows)
            part[:] = scorer.value(weights @ full, rows) - scorer.value(weights @ early, rows)
    low, high = np.quantile(drops, [(1 - level) / 2, (1 + level) / 2])
    if (exits < scorer.rows.exits[-1]).any():
        drop = scorer.full_depth - scorer.score(exits)
        unseen = 1 - ((1 - level) / 2) ** (1 / rows)
        low, high = min(low, drop - unseen), max(high, drop + unseen)
        # No rule agrees with full depth more often than full depth itself.
        low = max(low, 0.0) if scorer.metric == AGREEMENT else low
    return float(100 * low), float(100 * high)


def resampled(rows: int, samples: int, generator: np.random.Generator, size: int) -> Array:
    """How often each row is in each sample of a bootstrap: `[samples, rows]`.

    Args:
        rows: how many rows there are.
        samples: how many samples are drawn.
        generator: draws them.
        size: how many rows each sample has, counting a row as often as it was drawn.
    """
    drawn = generator.integers(0, rows, (samples, size)) + rows * np.arange(samples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=samples * rows)
    return counts.reshape(samples, rows).astype(np.float64)


def level_of(confidence: float) -> float:
    """The level of a two-sided interval whose upper end is a one-sided bound at a confidence."""
    return 2 * confidence - 1


def exits_of(rule: ExitRule, rows: LabelledLogits) -> Integers:
    """The exits `[rows]` of a rule, the same as in a live run with these logits."""
    thresholds, first = rows.label_thresholds, rows.first_exit
    return simulate(rows.logits, rule, rows.problem_type, thresholds, first).exits
