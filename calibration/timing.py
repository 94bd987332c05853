"""Times, always in turns: a machine whose speed drifts treats alike whatever is compared."""

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
from ..runtime.files.queries import Query
from ..runtime.rules.measures import TINY, Array
from ..runtime.rules.rules import Budget, ExitRule
from .progress import Progress, silent

_QUANTILES = (0.1, 0.5, 0.9)
_REPEATS = 5
# Speed-ups are measured on so many rows at a time, so many rows in all as far as the time allows,
# and in so many turns. Of single rows, there are enough for a 99th percentile.
_SINGLE = (1, 100, 5)
_WINDOWS = (128, 256, 3)
_MOST_SECONDS = 10.0
# How often turns are repeated while a speed-up is above what the layers explain.
_MOST_PASSES = 4
# So many queries are timed, in so many turns.
_QUERIES = 5
_TURNS_OF_QUERIES = 5

Unit = TypeVar("Unit")
Measured = TypeVar("Measured")


def in_turns(
    units: Sequence[Unit],
    measures: Sequence[Callable[[Unit], Measured]],
    turns: int,
    progress: Progress = silent,
    what: str = "",
) -> list[list[list[Measured]]]:
    """What is measured of units, `[turns, units, measures]`.

    The ways to measure a unit follow each other in each turn, so a machine whose speed drifts
    treats them alike. Who goes first changes with the turn.

    Args:
        units: what is measured at once.
        measures: the ways to measure one.
        turns: how often each is measured.
        progress: called with (what, turn, turns).
        what: what it is called with.
    """
    turns_done = []
    for turn in range(turns):
        progress(what, turn, turns)
        order = [(turn + place) % len(measures) for place in range(len(measures))]
        of_turn = []
        for unit in units:
            measured = {number: measures[number](unit) for number in order}
            of_turn.append([measured[number] for number in sorted(measured)])
        turns_done.append(of_turn)
    return turns_done


def time_in_turns(
    units: Sequence[Unit],
    runs: Sequence[Callable[[Unit], Any]],
    turns: int,
    progress: Progress = silent,
    what: str = "",
) -> Array:
    """Seconds `[turns, units, runs]` of ways to run a unit; the arguments are as in `in_turns`."""
    measures = [partial(_seconds, run) for run in runs]
    return np.array(in_turns(units, measures, turns, progress, what))


def _seconds(run: Callable[[Unit], Any], unit: Unit) -> float:
    started = time.perf_counter()
    run(unit)
    return time.perf_counter() - started


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


@dataclass(frozen=True)
class QueryTimes:
    """How long queries take.

    Attributes:
        documents: how many documents the queries have.
        milliseconds: of a query with the rule.
        full_depth_milliseconds: of the same query with all layers.
    """

    documents: int
    milliseconds: float
    full_depth_milliseconds: float

    @property
    def times_faster(self) -> float:
        """Full depth over the rule."""
        return self.full_depth_milliseconds / self.milliseconds


def measure_costs(
    engines: Sequence[Engine],
    lengths: NDArray[np.intp],
    batch: int,
    progress: Progress = silent,
) -> list[CostModel]:
    """Time every exit of engines, in turns, at the typical lengths of some rows.

    Args:
        engines: their targets are timed.
        lengths: `[rows]` tokens.
        batch: rows at a time; fewer are run where a target splits such a group.
        progress: called with (what, done, total).
    """
    sizes = sorted({max(1, int(size)) for size in np.quantile(lengths, _QUANTILES)})
    columns: list[list[Array]] = [[] for _ in engines]
    measures = [partial(_seconds_of_row, engine, batch) for engine in engines]
    for number, tokens in enumerate(sizes):
        progress(f"time segments, batch {batch}", number, len(sizes))
        turns = in_turns([tokens], measures, 1 + _REPEATS)
        measured = [of_engines for (of_engines,) in turns[1:]]  # the first prepares the shape
        for column, of_engine in zip(columns, zip(*measured, strict=True), strict=True):
            column.append(np.median(of_engine, axis=0))
    return [CostModel(tuple(sizes), tuple(zip(*column, strict=True))) for column in columns]


def _seconds_of_row(engine: Engine, batch: int, tokens: int) -> Array:
    """Seconds from each exit to the next for one row of a batch, `[exits]`."""
    limits = engine.core.limits
    rows = min(batch, limits.max_batch, max(1, limits.group_tokens // tokens))
    return np.array(engine.core.time_exits(rows, tokens)) / rows


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
    runs = _at_full_depth_and_with(rule, engine, core.trace)
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


def time_queries(
    engine: Engine, queries: Sequence[Query], rule: ExitRule, progress: Progress = silent
) -> QueryTimes:
    """The time of some queries with the most documents, with a rule and at full depth in turns.

    Args:
        engine: the engine, whose route in use has the passes.
        queries: the queries.
        rule: the rule.
        progress: called with (what, done, total).

    Raises:
        InputError: no query can be ranked.
    """
    core = engine.core
    units: list[Sequence[EncodedRow]] = []
    for query in sorted(queries, key=lambda query: len(query.documents), reverse=True):
        rows = core.encode(query.pairs)
        if core.is_query_possible(rows):
            units.append(core.with_scores(rows, query.scores))
        if len(units) == _QUERIES:
            break
    if not units:
        core.check_query(rows)
    runs = _at_full_depth_and_with(rule, engine, core.rank)
    time_in_turns(units, runs, 1)  # prepares the shapes
    seconds = time_in_turns(units, runs, _TURNS_OF_QUERIES, progress, "time queries")
    at_full_depth, with_rule = 1000 * np.median(seconds, axis=(0, 1))
    return QueryTimes(len(units[0]), float(with_rule), float(at_full_depth))


def _at_full_depth_and_with(
    rule: ExitRule, engine: Engine, run: Callable[..., Any]
) -> list[Callable[[Sequence[EncodedRow]], Any]]:
    """Two ways to run rows, which take a route as well."""
    core = engine.core
    return [partial(run, route=route) for route in (core.full_depth, core.in_use.by(rule))]
