"""How long rows take on a target: measured times of the segments, and measured speed-ups."""

from __future__ import annotations

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
# The rows that a speed-up is measured on, one by one or in windows, as far as the time allows.
_SINGLE_ROWS = 48
_WINDOW_ROWS = 128
_WINDOWS = 2
_WINDOW_REPEATS = 2
_MOST_SECONDS = 10.0


@dataclass(frozen=True)
class CostModel:
    """Seconds from each exit to the next for a row, by the length of the row.

    Attributes:
        batch: rows at a time; fewer were run where the target splits such a group.
        lengths: the row lengths that were measured, in tokens, ascending.
        seconds: `[exits, lengths]` seconds for one row, which is the time of a batch divided by
            its rows, in the order of `Manifest.exits`: of exit 0 if there is one, then of the
            segments with their heads.
    """

    batch: int
    lengths: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def row_costs(self, lengths: NDArray[np.intp]) -> Array:
        """Seconds until each exit, `[exits, rows]`.

        Args:
            lengths: `[rows]` tokens; times are interpolated between the measured lengths.
        """
        each = [np.interp(lengths, self.lengths, seconds) for seconds in self.seconds]
        return np.cumsum(np.array(each), axis=0)


def measure_costs(engine: Engine, lengths: NDArray[np.intp], batch: int) -> CostModel:
    """Time every exit at the typical lengths of some rows.

    Args:
        engine: the engine; its target is timed.
        lengths: `[rows]` tokens.
        batch: rows at a time; fewer are run where the target splits such a group.
    """
    sizes = sorted({max(1, int(size)) for size in np.quantile(lengths, _QUANTILES)})
    columns = []
    for tokens in sizes:
        rows = min(batch, engine.limits.max_batch, max(1, engine.limits.group_tokens // tokens))
        runs = [engine.time_exits(rows, tokens) for _ in range(_REPEATS + 1)][1:]
        columns.append(np.median(np.array(runs), axis=0) / rows)
    seconds = np.stack(columns, axis=1)
    return CostModel(batch, tuple(sizes), tuple(tuple(row) for row in seconds.tolist()))


def measure_speedup(
    engine: Engine, rows: Sequence[EncodedRow], rule: ExitRule, batch: int
) -> float:
    """The time at full depth divided by the time with a rule, measured in turns on the target.

    Args:
        engine: the engine.
        rows: tokenized rows.
        rule: the rule.
        batch: 1: rows run one by one; any larger number: windows of 128 rows, as in files.
    """
    full_depth = Budget(exit=engine.manifest.exits[-1])
    if rule == full_depth:
        return 1.0
    rules = full_depth, rule
    size, most, repeats = 1, _SINGLE_ROWS, _REPEATS
    if batch > 1:
        size, most, repeats = _WINDOW_ROWS, _WINDOW_ROWS * _WINDOWS, _WINDOW_REPEATS
    chosen = list(rows)
    if most < len(rows):
        chosen = [rows[number * len(rows) // most] for number in range(most)]
    totals = np.zeros(2)
    begun = time.perf_counter()
    for start in range(0, len(chosen), size):
        times: list[tuple[float, ...]] = []
        for _ in range(1 + repeats):
            window = chosen[start : start + size]
            times.append(tuple(_seconds(engine, window, each) for each in rules))
        totals += np.median(times[1:], axis=0)  # the first run warms up
        if time.perf_counter() - begun > _MOST_SECONDS:
            break
    return round(float(totals[0] / totals[1]), 3)


def _seconds(engine: Engine, rows: Sequence[EncodedRow], rule: ExitRule) -> float:
    started = time.perf_counter()
    engine.run_encoded(rows, rule)
    return time.perf_counter() - started
