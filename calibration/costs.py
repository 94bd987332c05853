"""Measured time of every segment on a target, and what a row costs that stops at an exit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.encoding import EncodedRow
from ..runtime.engine import Engine
from ..runtime.rules.measures import Array
from ..runtime.rules.rules import Budget, ExitRule

_QUANTILES = (0.1, 0.5, 0.9)
_REPEATS = 5
# Rows that a speed-up is measured on, one by one or in windows, as far as the seconds go.
_SINGLE_ROWS = 48
_WINDOW_ROWS = 128
_WINDOWS = 2
_MOST_SECONDS = 10.0


@dataclass(frozen=True)
class CostModel:
    """Seconds of each segment for a row, by the length of the row.

    Attributes:
        batch: rows at a time; fewer ran where a group of so many would be split.
        lengths: tokens a row, ascending, that were measured.
        seconds: `[segments, lengths]` seconds for one row: those of the batch over its rows. The
            head is part of its segment.
    """

    batch: int
    lengths: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def row_costs(self, lengths: NDArray[np.intp]) -> Array:
        """`[exits, rows]` seconds until each exit, for rows of some lengths.

        Args:
            lengths: `[rows]` tokens; between those measured times are interpolated.
        """
        each = [np.interp(lengths, self.lengths, seconds) for seconds in self.seconds]
        return np.cumsum(np.array(each), axis=0)


def measure_costs(engine: Engine, lengths: NDArray[np.intp], batch: int) -> CostModel:
    """Time every segment at the lengths of some rows.

    Args:
        engine: the engine; its target is what is timed.
        lengths: `[rows]` tokens of the rows in question.
        batch: rows at a time; less where a group of so many would be split.
    """
    sizes = sorted({max(1, int(size)) for size in np.quantile(lengths, _QUANTILES)})
    columns = []
    for tokens in sizes:
        rows = min(batch, engine.limits.max_batch, max(1, engine.limits.group_tokens // tokens))
        runs = [engine.time_segments(rows, tokens) for _ in range(_REPEATS + 1)][1:]
        columns.append(np.median(np.array(runs), axis=0) / rows)
    seconds = np.stack(columns, axis=1)
    return CostModel(batch, tuple(sizes), tuple(tuple(map(float, row)) for row in seconds))


def measure_speedup(
    engine: Engine, rows: Sequence[EncodedRow], rule: ExitRule, batch: int
) -> float:
    """Run time at full depth over run time with a rule, interleaved on the target.

    Args:
        engine: the engine.
        rows: tokenized rows.
        rule: the rule.
        batch: rows at a time; above 1 they run in windows, as files do.
    """
    rules = (Budget(exit=len(engine.manifest.segments)), rule)
    size, most = (1, _SINGLE_ROWS) if batch == 1 else (_WINDOW_ROWS, _WINDOW_ROWS * _WINDOWS)
    chosen = [rows[number * len(rows) // most] for number in range(most)]
    chosen = chosen if most < len(rows) else list(rows)
    totals = [0.0, 0.0]
    begun = time.perf_counter()
    for start in range(0, len(chosen), size):
        unit = chosen[start : start + size]
        times: tuple[list[float], list[float]] = ([], [])
        for repeat in range(1 + (_REPEATS if size == 1 else 2)):
            for number, run in enumerate(rules):
                started = time.perf_counter()
                engine.run_encoded(unit, run)
                if repeat:
                    times[number].append(time.perf_counter() - started)
        for number, values in enumerate(times):
            totals[number] += statistics.median(values)
        if time.perf_counter() - begun > _MOST_SECONDS:
            break
    return totals[0] / totals[1]
