"""Time the chain against one graph of the whole model.

A *unit* is what is timed at once: a batch of one shape, one text, or a window of texts. For each
unit the variants run one after another, so that a machine whose speed drifts treats them alike. The
time of a unit is the median of its repeats, and a speed-up is a ratio of sums over units.
Tokenization is never included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..runtime.artifact.folder import read_manifest
from ..runtime.encoding import EncodedRow, Text
from ..runtime.engine import Engine
from ..runtime.groups import split
from ..runtime.machine import environment, usable_cores
from ..runtime.progress import Progress, silent
from ..runtime.rules.rules import Budget, ExitRule
from ..runtime.targets import open_backend
from .merge import write_one_graph
from .targets.check import FP32_TARGET

FULL_GRAPH = "full graph"
FULL_DEPTH = "chain, full depth"
WITH_RULE = "chain, rule"
PADDED_32 = "full graph, padded 32"

_WINDOW = 256
_MOST_SINGLE = 100
_FILE_BATCH = 32
# Rows and tokens of the synthetic batches.
_SHAPES = ((1, 32), (1, 128), (32, 32), (32, 128))
# How often each unit is run, and the seconds of a workload after which its units run only once.
_REPEATS, _SECONDS = 5, 120.0


@dataclass(frozen=True)
class Workload:
    """Results of one workload.

    Attributes:
        name: what was run.
        seconds: by variant, for each unit the median of its repeats.
        mean_depth: layers that ran for a row under the rule, on average.
        theoretical: speed-up of the rule in layers, weighted by tokens.
    """

    name: str
    seconds: dict[str, list[float]]
    mean_depth: float
    theoretical: float

    def speedup(self, variant: str, baseline: str = FULL_GRAPH) -> float:
        """The time of the baseline over the time of the variant."""
        return sum(self.seconds[baseline]) / sum(self.seconds[variant])


@dataclass(frozen=True)
class BenchReport:
    """All workloads, the targets of the chain and of the full graph, and the machine."""

    target: str
    full_target: str
    rule: dict[str, Any]
    layers: int
    machine: str
    workloads: list[Workload]


Units = Sequence[Sequence[EncodedRow]]
Run = Callable[[Sequence[EncodedRow]], Any]


class _Graph:
    """A full graph, run over prepared buffers like the segments of a chain.

    Args:
        folder: an engines folder with one exit.
        target: the target.
        threads: CPU threads.
    """

    def __init__(self, folder: Path, target: str, threads: int | None) -> None:
        self._backend = open_backend(folder, read_manifest(folder), target, threads)
        self._execution = self._backend.check_out()
        self._limits = self._backend.limits()

    def grouped(self, rows: Sequence[EncodedRow]) -> None:
        """Run the groups that the chain starts with."""
        lengths = np.array([len(row) for row in rows], np.intp)
        for numbers in split(lengths, self._limits):
            self._run([rows[number] for number in numbers])

    def padded(self, rows: Sequence[EncodedRow]) -> None:
        """Run batches of 32 rows in file order."""
        for start in range(0, len(rows), _FILE_BATCH):
            self._run(rows[start : start + _FILE_BATCH])

    def _run(self, rows: Sequence[EncodedRow]) -> None:
        bucket = self._limits.bucket(len(rows), max(map(len, rows)), alone=len(rows) == 1)
        hidden = self._execution.begin(rows, bucket)
        self._execution.enqueue(hidden)()
        self._execution.release(hidden)

    def close(self) -> None:
        """Free what is loaded."""
        self._backend.give_back(self._execution)
        self._backend.close()


def run_bench(
    folder: Path,
    engine: Engine,
    rule: ExitRule,
    texts: Sequence[Text],
    threads: int | None = None,
    progress: Progress = silent,
) -> BenchReport:
    """Measure an engines folder on texts.

    Args:
        folder: the engines folder.
        engine: runs its chain. The full graph runs in the same target; for targets on GPUs, it runs
            in ONNX Runtime in fp32.
        rule: the exit rule.
        texts: the texts of the file workloads, whose tokens also fill the synthetic batches.
            Batches that are longer than the target takes are left out.
        threads: CPU threads of the full graph; those of the engine.
        progress: called with (workload, units done, units in total).
    """
    progress("load", 0, 1)
    target, manifest = engine.manifest.targets[engine.target], engine.manifest
    with ExitStack() as stack:
        one = Path(stack.enter_context(TemporaryDirectory()))
        has_target = engine.target in write_one_graph(folder, one).targets
        full_target = engine.target if has_target and not target.on_gpu else FP32_TARGET
        full = stack.enter_context(closing(_Graph(one, full_target, threads)))
        variants: dict[str, Run] = {
            FULL_GRAPH: full.grouped,
            FULL_DEPTH: partial(engine.run_encoded, rule=Budget(exit=manifest.exits[-1])),
            WITH_RULE: partial(engine.run_encoded, rule=rule),
        }
        rows = engine.encode(texts)
        work: dict[str, Units] = {
            f"{batch} x {tokens} tokens": exact_batches(
                rows, batch, tokens, units=16 if batch == 1 else 2
            )
            for batch, tokens in _SHAPES
            if tokens <= engine.limits.max_sequence
        }
        single = [[row] for row in _spread(rows, min(_MOST_SINGLE, len(rows)))]
        work[f"file, batch 1 ({len(single)} texts)"] = single
        whole = f"file, all {len(rows)} texts"
        work[whole] = [rows[start : start + _WINDOW] for start in range(0, len(rows), _WINDOW)]
        workloads = []
        for name, units in work.items():
            padded = {PADDED_32: full.padded} if name == whole else {}
            workloads.append(_measure(name, units, engine, variants | padded, progress))
    used = threads or usable_cores()
    return BenchReport(
        target=engine.target,
        full_target=full_target,
        rule=rule.to_dict(),
        layers=manifest.model.layers,
        machine=f"{used} threads; {', '.join(map(' '.join, environment().items()))}",
        workloads=workloads,
    )


def _measure(
    name: str,
    units: Units,
    engine: Engine,
    variants: dict[str, Run],
    progress: Progress,
) -> Workload:
    progress(name, 0, len(units))
    for run in variants.values():  # the first run loads segments and prepares bindings
        run(units[0])
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    exits = []
    begun = time.perf_counter()
    for number, unit in enumerate(units, start=1):
        repeats: dict[str, list[float]] = {variant: [] for variant in variants}
        until = begun + _SECONDS * number / len(units)
        for repeat in range(_REPEATS):
            if repeat and time.perf_counter() > until:
                break
            results = {}
            for variant, run in variants.items():
                started = time.perf_counter()
                results[variant] = run(unit)
                repeats[variant].append(time.perf_counter() - started)
        for variant, seconds in repeats.items():
            times[variant].append(statistics.median(seconds))
        exits.append(results[WITH_RULE].exits)
        progress(name, number, len(units))
    layers = np.array(engine.manifest.exit_layers)
    ran = layers[np.concatenate(exits) - engine.manifest.exits[0]]
    tokens = np.array([len(row) for unit in units for row in unit])
    return Workload(
        name=name,
        seconds=times,
        mean_depth=float(ran.mean()),
        theoretical=float(layers[-1] * tokens.sum() / max((ran * tokens).sum(), 1)),
    )


def exact_batches(rows: Sequence[EncodedRow], batch: int, tokens: int, units: int) -> Units:
    """Batches of one exact length, of real token ids: a row is repeated or cut to fit.

    Args:
        rows: tokenized rows, at least one.
        batch: rows of a batch.
        tokens: tokens in each row.
        units: how many batches.
    """
    resized = [
        EncodedRow(np.resize(row.input_ids, tokens), np.resize(row.token_type_ids, tokens), False)
        for row in _spread(rows, batch * units)
    ]
    return [resized[start : start + batch] for start in range(0, len(resized), batch)]


def _spread(rows: Sequence[EncodedRow], count: int) -> list[EncodedRow]:
    """`count` rows, evenly spread over all of them (repeated if there are fewer)."""
    return [rows[number * len(rows) // count] for number in range(count)]
