"""What stopping early saves and loses.

A target is timed, and speed-ups are measured on it. What is lost is harder to tell: a drop of half
a point on 900 rows is four or five rows, and the best of many settings is the one that was lucky
with those rows. But the last exit knows more than whether its answer was right: where an early exit
gives another answer, the calibrated probabilities of the last exit say how likely each of the two
is right. Their difference is the *expected loss*. It varies far less than the *observed loss*, so a
setting that is chosen by it keeps its promise on new rows. Where the two differ by more than
chance, the labels count, see `estimated`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..runtime.encoding import EncodedRow
from ..runtime.engine import Engine
from ..runtime.rules.measures import TINY, Array, Mask
from ..runtime.rules.rules import Budget, ExitRule
from .progress import Progress, silent
from .scoring import AGREEMENT, LabelledLogits, Scorer, exits_of_rows, task_of_rows

_QUANTILES = (0.1, 0.5, 0.9)
_REPEATS = 5
# Speed-ups are measured on so many rows at a time, so many rows in all as far as the time allows,
# and in so many turns. Of single rows, there are enough for a 99th percentile.
_SINGLE = (1, 100, 5)
_WINDOWS = (128, 256, 3)
_MOST_SECONDS = 10.0
# How often turns are repeated while a speed-up is above what the layers explain.
_MOST_PASSES = 4
_TEMPERATURES = np.geomspace(0.25, 8.0, 101)
_PRIOR_ROWS = 2.0

Unit = TypeVar("Unit")


class Speed(NamedTuple):
    """The time with a rule compared with that at full depth.

    Attributes:
        speedup: the time at full depth divided by the time with the rule.
        p99_share: the 99th percentile of the times with the rule, divided by that at full depth.
    """

    speedup: float
    p99_share: float


@dataclass(frozen=True)
class CostModel:
    """Seconds from each exit to the next for a row, by the length of the row.

    Attributes:
        lengths: the row lengths that were measured, in tokens, ascending.
        seconds: `[exits, lengths]` seconds for one row, which is the time of a batch divided by
            its rows, in the order of `Manifest.exits`: of exit 0 if there is one, then of the
            segments with their heads.
    """

    lengths: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def row_costs(self, lengths: NDArray[np.intp]) -> Array:
        """Seconds until each exit, `[exits, rows]`.

        Args:
            lengths: `[rows]` tokens; times are interpolated between the measured lengths.
        """
        each = [np.interp(lengths, self.lengths, seconds) for seconds in self.seconds]
        return np.cumsum(np.array(each), axis=0)


def measure_costs(
    engines: Sequence[Engine],
    lengths: NDArray[np.intp],
    batch: int,
    progress: Progress = silent,
) -> list[CostModel]:
    """Time every exit of engines at the typical lengths of some rows.

    The engines take turns, so a machine whose speed drifts treats them alike.

    Args:
        engines: their targets are timed.
        lengths: `[rows]` tokens.
        batch: rows at a time; fewer are run where a target splits such a group.
        progress: called with (what, done, total).
    """
    sizes = sorted({max(1, int(size)) for size in np.quantile(lengths, _QUANTILES)})
    columns: list[list[Array]] = [[] for _ in engines]
    for number, tokens in enumerate(sizes):
        progress(f"time segments, batch {batch}", number, len(sizes))
        runs: list[list[Array]] = [[] for _ in engines]
        for _ in range(_REPEATS + 1):
            for engine, of_engine in zip(engines, runs, strict=True):
                limits = engine.core.limits
                rows = min(batch, limits.max_batch, max(1, limits.group_tokens // tokens))
                of_engine.append(np.array(engine.core.time_exits(rows, tokens)) / rows)
        for column, of_engine in zip(columns, runs, strict=True):
            column.append(np.median(of_engine[1:], axis=0))  # the first run prepares the shape
    return [CostModel(tuple(sizes), tuple(zip(*column, strict=True))) for column in columns]


def relative_costs(
    engines: Sequence[Engine],
    lengths: NDArray[np.intp],
    batch: int,
    progress: Progress = silent,
) -> list[Array]:
    """What a row costs that stops at each exit, `[exits]` for each engine.

    1 is full depth in the target of the first engine. The arguments are those of `measure_costs`.
    """
    models = measure_costs(engines, lengths, batch, progress)
    costs = [model.row_costs(lengths).mean(axis=1) for model in models]
    # The exits before the last pass are not on the way of a row that runs all layers at once.
    exits = engines[0].core.exits
    before = len(exits) - len(exits.passes[-1].layers)
    full_depth = costs[0][-1] - (costs[0][before - 1] if before else 0.0)
    return [each / full_depth for each in costs]


def measure_speedup(
    engine: Engine,
    rows: Sequence[EncodedRow],
    rule: ExitRule,
    layers: NDArray[np.integer[Any]],
    batch: int,
) -> Speed:
    """The time with a rule compared with that at full depth, measured in turns on the target.

    What comes out above the ratio of the layers is measured again with more turns: chance made it,
    unless padding falls as rows leave.

    Args:
        engine: the engine, whose route in use has the passes.
        rows: tokenized rows. Those that are timed have every depth as often as all of them.
        rule: the rule.
        layers: `[rows]` how many layers the rule runs for each row.
        batch: 1: rows run one by one; any larger number: windows of 128 rows, as in files.
    """
    core = engine.core
    if rule == Budget(exit=core.exits.last):
        return Speed(1.0, 1.0)
    size, most, turns = _SINGLE if batch == 1 else _WINDOWS
    by_depth = np.lexsort(np.array([[len(row) for row in rows], layers]))
    places = np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)
    numbers = np.sort(by_depth[places])
    windows = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    routes = (core.full_depth, core.in_use.by(rule))
    runs = [partial(core.trace, route=each) for each in routes]
    units: list[list[EncodedRow]] = []
    begun = time.perf_counter()
    for window in windows:
        units.append([rows[number] for number in window])
        for run in runs:  # prepares the shapes
            run(units[-1])
        if time.perf_counter() - begun > _MOST_SECONDS / turns:
            break
    timed = layers[np.concatenate(windows[: len(units)])]
    most_by_layers = engine.manifest.exit_layers[-1] / max(TINY, timed.mean())
    if core.exits.quick:  # layers explain little where they run in two targets
        most_by_layers = math.inf
    seconds = np.empty((0, len(units), len(runs)))
    for _ in range(_MOST_PASSES):
        seconds = np.concatenate([seconds, time_in_turns(units, runs, turns)])
        of_each = np.median(seconds, axis=0)
        at_full_depth, with_rule = of_each.sum(axis=0)
        if at_full_depth / with_rule <= most_by_layers:
            break
    slow_at_full_depth, slow_with_rule = np.quantile(of_each, 0.99, axis=0)
    return Speed(
        speedup=round(float(at_full_depth / with_rule), 3),
        p99_share=round(float(slow_with_rule / slow_at_full_depth), 3),
    )


def time_in_turns(
    units: Sequence[Unit], runs: Sequence[Callable[[Unit], Any]], turns: int
) -> Array:
    """Seconds `[turns, units, runs]`, where the ways to run a unit follow each other in each turn.

    So a machine whose speed drifts treats them alike. Who goes first changes with the turn.

    Args:
        units: what is run at once.
        runs: the ways to run one.
        turns: how often each is run.
    """
    seconds = np.empty((turns, len(units), len(runs)))
    for turn in range(turns):
        for unit, content in enumerate(units):
            for place in range(len(runs)):
                number = (turn + place) % len(runs)
                started = time.perf_counter()
                runs[number](content)
                seconds[turn, unit, number] = time.perf_counter() - started
    return seconds


class StoppingCosts:
    """What each row costs and loses if it stops at an exit.

    Args:
        rows: the rows.
        metric: the metric, see `scoring.METRICS`.
        costs: `[exits, rows]` seconds until an exit.

    Attributes:
        rows: the rows.
        scorer: the metric of these rows.
        costs: `[exits, rows]` as given.
        observed: `[exits, rows]` observed losses, see `observed_losses`.
        losses: `[exits, rows]` expected losses, or for agreement the observed ones.
    """

    def __init__(self, rows: LabelledLogits, metric: str, costs: Array) -> None:
        self.rows = rows
        self.scorer = Scorer(rows, metric)
        self.costs = costs
        self.observed = self.losses = observed_losses(self.scorer)
        if metric != AGREEMENT:
            self.losses = expected_losses(self.scorer)

    def drop(self, exits: NDArray[np.integer[Any]]) -> float:
        """The estimated drop of the metric as a share.

        If the metric is not a mean over rows, it is the drop on these rows, or that of the share of
        right answers if that is larger: it varies less.

        Args:
            exits: `[rows]` the exit of each row.
        """
        at = self.rows.at(exits)
        drop = float(estimated(self.observed[at], self.losses[at]))
        if self.scorer.is_row_mean:
            return drop
        return max(drop, self.scorer.full_depth - self.scorer.score(exits))

    def mean_cost(self, exits: NDArray[np.integer[Any]]) -> float:
        """Mean seconds of a row; the argument is that of `drop`."""
        return float(self.costs[self.rows.at(exits)].mean())

    def take(self, numbers: NDArray[np.intp]) -> StoppingCosts:
        """The same for some of the rows, whose probabilities are calibrated again."""
        rows = self.rows.take(numbers)
        return StoppingCosts(rows, self.scorer.metric, self.costs[:, numbers])


def observed_losses(scorer: Scorer) -> Array:
    """1 where only full depth is right, -1 where only the exit is right: `[exits, rows]`."""
    right = scorer.right().astype(np.float64)
    return np.asarray(right[-1] - right)


def expected_losses(scorer: Scorer) -> Array:
    """How much more likely the answer of full depth is than the exit's answer: `[exits, rows]`.

    Both probabilities come from the last exit, at the temperature that fits the labels best. The
    same answer loses nothing. Where the answers differ, these probabilities may still be over- or
    under-confident, which `recalibrated` corrects. Exit 0 is not part of the encoder, so the
    probabilities that it gives to both answers are used as well.
    """
    rows = scorer.rows
    task = task_of_rows(rows)
    differs = ~task.same(scorer.answers, scorer.answers[-1])
    last = rows.logits[-1] / np.float32(fit_temperature(rows))
    likely = np.exp(task.log_likelihoods(last, scorer.answers))
    expected = likely[-1] - likely
    observed = observed_losses(scorer)
    exits = exits_of_rows(rows)
    parts = []
    for place in range(len(exits.before_layers)):
        own = slice(place, place + 1)
        both = np.exp(task.log_likelihoods(rows.logits[place], scorer.answers[[-1, place]]))
        estimates = [expected[own], both[:1] - both[1:]]
        parts.append(recalibrated(estimates, observed[own], differs[own]))
    later = slice(len(exits.before_layers), None)
    parts.append(recalibrated([expected[later]], observed[later], differs[later]))
    return np.concatenate(parts)


def recalibrated(estimates: Sequence[Array], observed: Array, differs: Mask) -> Array:
    """Expected losses that fit the observed ones where answers differ: a linear combination.

    This is a ridge regression towards the first estimate alone. The answers of one row at several
    exits count as one observation together, and the prior counts as two.

    Args:
        estimates: each `[exits, rows]` expected losses.
        observed: `[exits, rows]` observed losses.
        differs: `[exits, rows]` whether the exit's answer differs from that of full depth.
    """
    weights = (differs / np.maximum(differs.sum(axis=0), 1))[differs]
    columns = [np.ones_like(observed), *estimates]
    inputs = np.stack([column[differs] for column in columns], axis=-1)
    error = observed[differs] - estimates[0][differs]
    squares = (inputs.T * weights) @ inputs + _PRIOR_ROWS * np.eye(len(columns))
    factors = np.linalg.solve(squares, (inputs.T * weights) @ error)
    mended = estimates[0] + sum(f * column for f, column in zip(factors, columns, strict=True))
    return np.where(differs, mended, 0.0)


def fit_temperature(rows: LabelledLogits) -> float:
    """The temperature of the last exit with the largest likelihood (Guo et al., 1706.04599)."""
    assert rows.expected is not None
    last = rows.logits[-1]
    fits = [
        task_of_rows(rows).log_likelihoods(last / np.float32(temperature), rows.expected).mean()
        for temperature in _TEMPERATURES
    ]
    return float(_TEMPERATURES[int(np.argmax(fits))])


def estimated(observed: Array, expected: Array) -> Array:
    """The mean loss `[...]`: the expected one, plus the part of its error that is more than chance.

    The error (observed minus expected) is moved towards 0 by its standard error (soft
    thresholding, Donoho 1995).

    Args:
        observed: `[..., rows]` observed losses.
        expected: `[..., rows]` expected losses.
    """
    errors = observed - expected
    error = errors.mean(axis=-1)
    chance = errors.std(axis=-1) / np.sqrt(errors.shape[-1])
    more = np.sign(error) * np.maximum(np.abs(error) - chance, 0.0)
    return np.asarray(expected.mean(axis=-1) + more)
