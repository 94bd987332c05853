"""How long rows take on a target: measured times of the segments, and measured speed-ups.

Times are kept beside the trace, so that the same rows and folder always give the same answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.folder import BAD_JSON, read_regular
from ..runtime.encoding import EncodedRow
from ..runtime.engine import Engine
from ..runtime.environment import environment
from ..runtime.errors import ArtifactError
from ..runtime.rules.base import ExitRule
from ..runtime.rules.measures import Array
from ..runtime.rules.rules import Budget
from ..runtime.rules.runner import RuleRunner
from .trace import artifact_sha256, replace_file

_QUANTILES = (0.1, 0.5, 0.9)
_REPEATS = 5
# The rows that a speed-up is measured on, one by one or in windows, as far as the time allows.
_SINGLE_ROWS = 48
_WINDOW_ROWS = 128
_WINDOWS = 2
_WINDOW_REPEATS = 2
_MOST_SECONDS = 10.0
_MOST_BYTES = 2**20
# As times are stored: JSON has no NaN and no infinity.
_Positive = Annotated[float, msgspec.Meta(gt=0)]


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
    lengths: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]
    seconds: tuple[tuple[_Positive, ...], ...]

    def row_costs(self, lengths: NDArray[np.intp]) -> Array:
        """Seconds until each exit, `[exits, rows]`.

        Args:
            lengths: `[rows]` tokens; times are interpolated between the measured lengths.
        """
        each = [np.interp(lengths, self.lengths, seconds) for seconds in self.seconds]
        return np.cumsum(np.array(each), axis=0)


class Timings(msgspec.Struct):
    """The times that were measured on a machine, as they are stored.

    Attributes:
        measured_on: the target's files, the machine, the installed versions, the number of threads
            and the label thresholds.
        models: times of the exits, by batch size.
        speedups: measured speed-ups, by batch size and by the settings of the rule as JSON.
    """

    measured_on: dict[str, str]
    models: dict[int, CostModel] = {}
    speedups: dict[int, dict[str, _Positive]] = {}


class TimedEngine:
    """Measures times once, and reads them from a file afterwards.

    Args:
        engine: the engine.
        path: the file.
        threads: number of threads that was asked for.
        again: whether times in the file are ignored.
        thresholds: the label thresholds that rules see; empty means 0.5.
    """

    def __init__(
        self,
        engine: Engine,
        path: Path,
        threads: int | None,
        again: bool,
        thresholds: tuple[float, ...],
    ) -> None:
        self._engine = engine
        self._path = path
        self._thresholds = thresholds
        artifact = artifact_sha256(engine.manifest, engine.target)
        where = {"artifact": artifact, "threads": str(threads), "thresholds": str(thresholds)}
        self._timings = Timings(environment() | where)
        if not again:
            kept = _read(path, len(engine.manifest.exits))
            if kept is not None and kept.measured_on == self._timings.measured_on:
                self._timings = kept

    def costs(self, lengths: NDArray[np.intp], batch: int) -> CostModel:
        """The times of the exits, see `measure_costs`."""
        models = self._timings.models
        if batch not in models:
            models[batch] = measure_costs(self._engine, lengths, batch)
        return models[batch]

    def speedup(self, rows: Sequence[EncodedRow], rule: ExitRule, batch: int) -> float:
        """The measured speed-up of a rule, see `measure_speedup`; 1 for full depth."""
        if rule == Budget(exit=self._engine.manifest.exits[-1]):
            return 1.0
        speedups = self._timings.speedups.setdefault(batch, {})
        key = json.dumps(rule.to_dict())
        if key not in speedups:
            found = measure_speedup(self._engine, rows, rule, batch, self._thresholds)
            speedups[key] = round(found, 3)
        return speedups[key]

    def store(self) -> None:
        """Write the file.

        Raises:
            ArtifactError: it cannot be written.
        """
        replace_file(self._path, msgspec.json.encode(self._timings))


def _read(path: Path, exits: int) -> Timings | None:
    """Stored times; None if there are none, or if the file is damaged."""
    try:
        kept = msgspec.json.decode(read_regular(path, _MOST_BYTES), type=Timings)
    except (OSError, ArtifactError, *BAD_JSON):
        return None
    fits = all(
        len(model.seconds) == exits
        and all(len(seconds) == len(model.lengths) for seconds in model.seconds)
        for model in kept.models.values()
    )
    return kept if fits else None


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
    engine: Engine,
    rows: Sequence[EncodedRow],
    rule: ExitRule,
    batch: int,
    thresholds: tuple[float, ...],
) -> float:
    """The time at full depth divided by the time with a rule, measured in turns on the target.

    Args:
        engine: the engine.
        rows: tokenized rows.
        rule: the rule.
        batch: 1: rows run one by one; any larger number: windows of 128 rows, as in files.
        thresholds: the label thresholds that the rule sees; empty means 0.5.
    """
    task, exits = engine.manifest.task, engine.manifest.exits
    full_depth, with_rule = (
        RuleRunner(each, task.problem_type, exits, thresholds)
        for each in (Budget(exit=exits[-1]), rule)
    )
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
            times.append(tuple(_seconds(engine, window, each) for each in (full_depth, with_rule)))
        totals += np.median(times[1:], axis=0)  # the first run warms up
        if time.perf_counter() - begun > _MOST_SECONDS:
            break
    return float(totals[0] / totals[1])


def _seconds(engine: Engine, rows: Sequence[EncodedRow], runner: RuleRunner) -> float:
    started = time.perf_counter()
    engine.model.run(rows, runner)
    return time.perf_counter() - started
