"""Time the chain against one graph of the whole model.

A *unit* is what is timed at once: one text, or one of the windows into which `Engine` divides a
file. For each unit the variants run one after another, so that a machine whose speed drifts treats
them alike. The time of a unit is the median of its repeats, and a speed-up is a ratio of sums over
units. Tokenization is never included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..runtime.chain import Chain
from ..runtime.encoding import EncodedRow, Text
from ..runtime.engine import Engine
from ..runtime.groups import split
from ..runtime.progress import Progress, silent
from ..runtime.rules.rules import Budget, ExitRule
from .merge import write_one_graph
from .targets.check import FP32_TARGET

FULL_GRAPH, FULL_DEPTH, WITH_RULE = "full graph", "chain, full depth", "chain + rule"
_MOST_SINGLE, _REPEATS = 100, 5


@dataclass(frozen=True)
class Workload:
    """Results of one workload.

    Attributes:
        name: what was run.
        texts: how many texts it has.
        seconds: by variant, for each unit the median of its repeats.
        mean_depth: layers that ran for a row under the rule, on average.
        theoretical: speed-up of the rule in layers, weighted by tokens.
    """

    name: str
    texts: int
    seconds: dict[str, list[float]]
    mean_depth: float
    theoretical: float

    def speedup(self, variant: str) -> float:
        """The time of the full graph over the time of the variant."""
        return sum(self.seconds[FULL_GRAPH]) / sum(self.seconds[variant])


Units = Sequence[Sequence[EncodedRow]]
Run = Callable[[Sequence[EncodedRow]], Any]


def run_bench(
    folder: Path,
    engine: Engine,
    rule: ExitRule,
    texts: Sequence[Text],
    progress: Progress = silent,
) -> tuple[str, list[Workload]]:
    """Measure an engines folder on texts: up to 100 of them one by one, and all of them.

    Args:
        folder: the engines folder.
        engine: runs its chain.
        rule: the exit rule.
        texts: the texts.
        progress: called with (workload, units done, units in total).

    Returns:
        The target of the full graph, which is that of the engine if it runs ONNX graphs, else
        ONNX Runtime in fp32; and the workloads.
    """
    progress("load", 0, 1)
    windows = list(engine.windows(texts))
    rows = [row for window in windows for row in window]
    single = [[row] for row in rows[:: -(-len(rows) // _MOST_SINGLE)]]
    last = Budget(exit=engine.manifest.exits[-1])
    with TemporaryDirectory() as one:
        targets = write_one_graph(folder, Path(one)).targets
        target = engine.target if engine.target in targets else FP32_TARGET
        with Engine.load(one, target) as full, full.chain() as graph:
            variants: dict[str, Run] = {
                FULL_GRAPH: partial(_run_graph, graph),
                FULL_DEPTH: partial(engine.run_encoded, rule=last),
                WITH_RULE: partial(engine.run_encoded, rule=rule),
            }
            work = {"texts one by one": single, f"file of {len(rows)} texts": windows}
            found = [_measure(*each, engine, variants, progress) for each in work.items()]
    return target, found


def _run_graph(graph: Chain, rows: Sequence[EncodedRow]) -> None:
    """Run the groups that a chain starts with, but nothing else of an engine."""
    lengths = np.array([len(row) for row in rows], np.intp)
    for numbers in split(lengths, graph.limits):
        group = [rows[number] for number in numbers]
        bucket = graph.limits.bucket(len(group), int(lengths[numbers].max()), len(group) == 1)
        hidden = graph.execution.begin(group, bucket)
        graph.execution.enqueue(hidden)()
        graph.execution.release(hidden)


def _measure(
    name: str, units: Units, engine: Engine, variants: dict[str, Run], progress: Progress
) -> Workload:
    progress(name, 0, len(units))
    for run in variants.values():  # the first run loads segments and prepares bindings
        run(units[0])
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    exits = []
    for number, unit in enumerate(units, start=1):
        repeats: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(_REPEATS):
            for variant, run in variants.items():
                started = time.perf_counter()
                result = run(unit)
                repeats[variant].append(time.perf_counter() - started)
        for variant, times in repeats.items():
            seconds[variant].append(statistics.median(times))
        exits.append(result.exits)  # of the last variant, with the rule
        progress(name, number, len(units))
    layers = np.array(engine.manifest.exit_layers)
    ran = layers[np.concatenate(exits) - engine.manifest.exits[0]]
    tokens = np.array([len(row) for unit in units for row in unit])
    theoretical = float(layers[-1] * tokens.sum() / max((ran * tokens).sum(), 1))
    return Workload(name, len(tokens), seconds, float(ran.mean()), theoretical)
