#!/usr/bin/env python
"""Measure how fast an engines folder is with its exits, compared with one full graph.

    python scripts/bench.py engines/ --input texts.txt
    python scripts/bench.py engines/ --input texts.txt --rule entropy --depth 0.5

A *unit* is what is timed at once: one text, or one of the windows into which `Engine` divides a
file. For each unit the variants run one after another, so that a machine whose speed drifts treats
them alike. The time of a unit is the median of its repeats, and a speed-up is a ratio of sums over
units. Tokenization is never included. At most 2,000 texts of the file are run, and up to 100 of
them one by one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from one_graph import write_one_graph

from fpabee.calibration import threshold_for_depth
from fpabee.calibration.progress import Progress
from fpabee.commands.command import exits_with_one_line
from fpabee.commands.console import step_progress
from fpabee.commands.options import chosen_rule
from fpabee.exporter.targets.check import FP32_TARGET
from fpabee.runtime import Budget, EncodedRow, Engine, ExitRule, Text
from fpabee.runtime.backends.base import Backend, Execution
from fpabee.runtime.backends.buffers import Limits
from fpabee.runtime.chain.groups import split
from fpabee.runtime.files import read_rows
from fpabee.runtime.machine import environment, usable_cores
from fpabee.runtime.rules.words import rule_in_words

MOST_TEXTS = 2000
MOST_SINGLE = 100
REPEATS = 5

FULL_GRAPH = "full graph"
FULL_DEPTH = "chain, full depth"
WITH_RULE = "chain + rule"
COLUMNS = ("workload", FULL_GRAPH, FULL_DEPTH, WITH_RULE, "speed-up", "theory", "share")

Units = Sequence[Sequence[EncodedRow]]
Run = Callable[[Sequence[EncodedRow]], Any]


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

    def row(self) -> str:
        """A row of the table, in milliseconds per text."""
        ms = {name: 1e3 * sum(each) / self.texts for name, each in self.seconds.items()}
        speedup = self.speedup(WITH_RULE)
        ratios = f"{speedup:.2f}x | no layers | "
        if self.mean_depth:  # otherwise layers have no ratio
            share = speedup / self.theoretical
            ratios = f"{speedup:.2f}x | {self.theoretical:.2f}x | {share:.3f}"
        slower = 1 / self.speedup(FULL_DEPTH)
        return (
            f"| {self.name} | {ms[FULL_GRAPH]:.3f} | {ms[FULL_DEPTH]:.3f} ({slower:.2f}x) "
            f"| {ms[WITH_RULE]:.3f} | {ratios} |"
        )


def run_bench(
    folder: Path, engine: Engine, rule: ExitRule, texts: Sequence[Text], progress: Progress
) -> tuple[str, list[Workload]]:
    """Measure an engines folder on texts: some of them one by one, and all of them.

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
    windows = list(engine.core.windows(texts))
    rows = [row for window in windows for row in window]
    single = [[row] for row in rows[:: -(-len(rows) // MOST_SINGLE)]]
    last = Budget(exit=engine.manifest.exits[-1])
    with TemporaryDirectory() as one:
        targets = write_one_graph(folder, Path(one)).targets
        target = engine.target if engine.target in targets else FP32_TARGET
        with Engine.load(one, target) as full, lent(full.core.backend) as execution:
            variants: dict[str, Run] = {
                FULL_GRAPH: partial(run_graph, execution, full.core.limits),
                FULL_DEPTH: partial(engine.run_encoded, rule=last),
                WITH_RULE: partial(engine.run_encoded, rule=rule),
            }
            work: dict[str, Units] = {
                "texts one by one": single,
                f"file of {len(rows)} texts": windows,
            }
            workloads = [
                measure(name, units, engine, variants, progress) for name, units in work.items()
            ]
    return target, workloads


@contextmanager
def lent(backend: Backend) -> Iterator[Execution]:
    """An execution, which is given back at the end."""
    execution = backend.check_out()
    try:
        yield execution
    finally:
        backend.give_back(execution)


def run_graph(execution: Execution, limits: Limits, rows: Sequence[EncodedRow]) -> None:
    """Run the groups that a chain starts with, but nothing else of an engine."""
    lengths = np.array([len(row) for row in rows], np.intp)
    for numbers in split(lengths, limits):
        group = [rows[number] for number in numbers]
        bucket = limits.bucket(len(group), int(lengths[numbers].max()), len(group) == 1)
        hidden = execution.begin(group, bucket)
        execution.enqueue(hidden)()
        execution.release(hidden)


def measure(
    name: str, units: Units, engine: Engine, variants: dict[str, Run], progress: Progress
) -> Workload:
    """Time each variant on each unit; the last variant is the one with the rule."""
    progress(name, 0, len(units))
    for run in variants.values():  # the first run loads segments and prepares bindings
        run(units[0])
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    exits = []
    for number, unit in enumerate(units, start=1):
        repeats: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(REPEATS):
            for variant, run in variants.items():
                started = time.perf_counter()
                result = run(unit)
                repeats[variant].append(time.perf_counter() - started)
        for variant, times in repeats.items():
            seconds[variant].append(statistics.median(times))
        exits.append(result.exits)
        progress(name, number, len(units))
    layers = np.array(engine.manifest.exit_layers)
    ran = layers[np.concatenate(exits) - engine.manifest.exits[0]]
    tokens = np.array([len(row) for unit in units for row in unit])
    theoretical = float(layers[-1] * tokens.sum() / max((ran * tokens).sum(), 1))
    return Workload(name, len(tokens), seconds, float(ran.mean()), theoretical)


def rule_for(engine: Engine, text: str | None, depth: float | None, texts: list[Text]) -> ExitRule:
    """The rule of the operating point or of the text, with the threshold for a depth if given.

    Args:
        engine: the engine.
        text: a rule, as for `fpabee-run --rule`.
        depth: the share of the layers that the texts run on average.
        texts: the texts.
    """
    if depth is None:
        return engine.rule if text is None else chosen_rule(engine.rule, text)
    rule = chosen_rule(engine.rule, f"{text or engine.rule.name} threshold=0")
    trace = engine.trace(texts)
    task = engine.manifest.task
    layers = engine.manifest.exit_layers
    return threshold_for_depth(
        trace.logits,
        rule,
        task.problem_type,
        layers,
        depth * layers[-1],
        task.label_thresholds,
        trace.first_exit,
    )


@click.command()
@click.argument("engines", type=click.Path(path_type=Path))
@click.option("--input", "source", required=True, help="Texts, in any format of fpabee-run.")
@click.option("--target", help="Target to use. Default: the default target of the folder.")
@click.option("--rule", "text", help="Exit rule. Default: that of the default operating point.")
@click.option(
    "--depth",
    type=click.FloatRange(0, 1, min_open=True),
    help="Choose the threshold at which the mean depth is this share of the layers.",
)
@exits_with_one_line
def main(
    engines: Path, source: str, target: str | None, text: str | None, depth: float | None
) -> None:
    """Measure ENGINES, and print a table in Markdown."""
    texts = [row.content for row in islice(read_rows(source), MOST_TEXTS)]
    with step_progress(quiet=False) as progress, Engine.load(engines, target) as engine:
        rule = rule_for(engine, text, depth, texts)
        full_target, workloads = run_bench(engines, engine, rule, texts, progress)
        name = engine.target
        layers = engine.manifest.exit_layers[-1]
    click.echo(f"| {' | '.join(COLUMNS)} |")
    click.echo("|---" * len(COLUMNS) + "|")
    for workload in workloads:
        click.echo(workload.row())
    click.echo(
        "\nMilliseconds per text. Speed-up: full graph divided by chain + rule; "
        "theory: from layers alone; share: speed-up divided by theory."
    )
    depth_of_file = f"mean depth {workloads[-1].mean_depth:.2f} of {layers} layers on the file"
    click.echo(f"Rule: {rule_in_words(rule)}; {depth_of_file}.")
    if name != full_target:
        click.echo(f"The full graph runs in {full_target}, not in {name}.")
    versions = ", ".join(map(" ".join, environment().items()))
    click.echo(f"{usable_cores()} threads; {versions}; {name}.")


if __name__ == "__main__":
    main()
