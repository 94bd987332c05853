"""What a rule gives on some rows: score, drop with its interval, depth, speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.rules.measures import Answers, Array
from ..runtime.rules.rules import ExitRule
from ..runtime.rules.runner import simulate
from .scoring import AGREEMENT, Rows, Scorer

_RESAMPLES = 2000


@dataclass(frozen=True)
class Outcome:
    """What a rule gave on some rows.

    Attributes:
        metric: name of the score, which goes from 0 to 1 (Matthews correlation from -1).
        score: with the rule.
        full_depth_score: at the last exit.
        drop: `full_depth_score` minus `score`, in points.
        interval: 95 % interval of the drop in points, see `drop_interval`.
        mean_depth: layers that ran for a row, on average.
        exits: rows that stopped at each exit.
        theoretical: speed-up: full depth over this, in layers weighted by tokens.
        estimated: the same in measured times of the segments.
        rows: how many rows.
    """

    metric: str
    score: float
    full_depth_score: float
    drop: float
    interval: tuple[float, float]
    mean_depth: float
    exits: tuple[int, ...]
    theoretical: float
    estimated: float
    rows: int


def outcome(
    scorer: Scorer, exits: Answers, lengths: NDArray[np.intp], costs: Array, layers: Sequence[int]
) -> Outcome:
    """What rows that stop at given exits give.

    Args:
        scorer: the metric of the rows.
        exits: `[rows]`, counted from 1.
        lengths: `[rows]` tokens.
        costs: `[exits, rows]` time until an exit.
        layers: the layer of each exit.
    """
    ran = np.asarray(layers)[exits - 1]
    score, full = scorer.score(exits), scorer.full_depth
    return Outcome(
        metric=scorer.metric,
        score=score,
        full_depth_score=full,
        drop=100 * (full - score),
        interval=drop_interval(scorer, exits),
        mean_depth=float(ran.mean()),
        exits=tuple(int(n) for n in np.bincount(exits - 1, minlength=len(layers))),
        theoretical=float(layers[-1] * lengths.sum() / (ran * lengths).sum()),
        estimated=float(costs[-1].sum() / costs[exits - 1, np.arange(len(exits))].sum()),
        rows=len(exits),
    )


def drop_interval(
    scorer: Scorer, exits: Answers, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of the drop in points: rows are drawn again, with both of their answers.

    Drawing again shows no change that the rows do not hold. So where the metric is a mean over rows
    and some row stopped early, neither end is closer to the drop than the exact binomial bound on
    the share of rows with a change of which n rows show none: 1 - (alpha / 2)^(1/n), which is about
    3.7/n at 95 % (Clopper & Pearson 1934; the "rule of three", Hanley & Lippman-Hand 1983).
    """
    rows = len(exits)
    generator = np.random.default_rng(seed)
    full, early = scorer.sums[-1], scorer.at(exits)
    if scorer.is_row_mean:
        kinds, counts = np.unique(full[:, 0] - early[:, 0], return_counts=True)
        drawn = generator.multinomial(rows, counts / rows, _RESAMPLES)
        drops = drawn @ kinds / rows
    else:
        weights = generator.multinomial(rows, np.full(rows, 1 / rows), _RESAMPLES)
        drops = scorer.value(weights @ full, rows) - scorer.value(weights @ early, rows)
    low, high = np.quantile(drops, [(1 - level) / 2, (1 + level) / 2])
    if scorer.is_row_mean and (exits < len(scorer.sums)).any():
        drop = scorer.full_depth - scorer.score(exits)
        unseen = 1 - ((1 - level) / 2) ** (1 / rows)
        low, high = min(low, drop - unseen), max(high, drop + unseen)
        # Agreement with full depth cannot be better than that of full depth.
        low = max(low, 0.0) if scorer.metric == AGREEMENT else low
    return float(100 * low), float(100 * high)


def exits_of(rule: ExitRule, rows: Rows) -> Answers:
    """The exits `[rows]` of rows under a rule: those of a live run with the same logits."""
    return simulate(rows.logits, rule, rows.problem_type, rows.label_thresholds).exits
