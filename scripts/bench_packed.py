#!/usr/bin/env python
"""Measure how much time a packed file saves on batches, from which rows leave as they stop.

    python scripts/bench_packed.py engines/ --input texts.txt --depth 0.5

Texts are sorted by length and divided into 40 batches of 32. No two batches have the same length,
because runtimes prepare operations for each new shape, and in traffic most shapes are new. A round
loads fresh sessions and runs each batch once in each graph: the whole model as a plain graph
without heads, the packed file at full depth, and the packed file with the rule. The order of the
graphs rotates from batch to batch. A time is the CPU time of one thread, and a result the median
over rounds. Theory is the share of the layers that rows ran, weighted with the lengths of their
batches: what the time with the rule would be, divided by that of full depth, if only layers took
time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
import onnx_ir as ir
from bench import rule_for
from numpy.typing import NDArray
from one_graph import merge_graphs

from fpabee.commands.command import exits_with_one_line
from fpabee.exporter.onnx_file import load_graphs
from fpabee.exporter.single_file.graph import EXIT, MASK, single_graph
from fpabee.exporter.single_file.rules import as_inputs, settings_of
from fpabee.exporter.targets.check import FP32_TARGET
from fpabee.runtime import EncodedRow, Engine
from fpabee.runtime.artifact.folder import EnginesFolder
from fpabee.runtime.artifact.manifest import ATTENTION_BIAS
from fpabee.runtime.encoding import Arrays, padded_batches, padding_values
from fpabee.runtime.files import read_rows
from fpabee.runtime.machine import environment
from fpabee.runtime.rules.words import rule_in_words

BATCHES = 40
ROWS = 32
SINGLE_RUNS = 200

PLAIN = "plain graph"
FULL = "packed, full depth"
RULE = "packed + rule"
WITHOUT = "packed for a plan, rows stay"
COLUMNS = ("runtime", f"{FULL} / {PLAIN}", f"{RULE} / {PLAIN}", f"{RULE} / {FULL}", "theory")
SINGLE_COLUMN = f"one text: packed / {WITHOUT}"

Answers = dict[str, NDArray[Any]]
Run = Callable[[Arrays], Answers]


def in_onnxruntime(graph: bytes) -> Run:
    """Load a graph in ONNX Runtime with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    outputs = [each.name for each in session.get_outputs()]

    def run(arrays: Arrays) -> Answers:
        results = session.run(outputs, {name: arrays[name] for name in names})
        return dict(zip(outputs, results, strict=True))

    return run


def in_openvino(graph: bytes) -> Run:
    """Compile a graph in OpenVINO with one thread."""
    import openvino

    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    request = core.compile_model(core.read_model(graph), "CPU", settings).create_infer_request()
    names = [each.any_name for each in request.model_inputs]

    def run(arrays: Arrays) -> Answers:
        results = request.infer({name: arrays[name] for name in names})
        return {output.any_name: np.array(results[output]) for output in request.model_outputs}

    return run


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def batches_of(rows: Sequence[EncodedRow], padding: Any) -> list[Arrays]:
    """Batches of rows of similar length; no two batches have the same length.

    Args:
        rows: repeated if they are too few.
        padding: see `padding_values`.
    """
    ordered = sorted(islice(cycle(rows), BATCHES * ROWS), key=len)
    batches = []
    longest = 0
    for arrays in padded_batches(ordered, padding, ROWS):
        arrays[MASK] = (arrays[ATTENTION_BIAS][:, 0, 0] == 0).astype(np.int64)
        tokens = arrays[MASK].shape[1]
        longest = max(longest + 1, tokens)
        masked = arrays[ATTENTION_BIAS].min(initial=-10_000.0)
        for name, array in arrays.items():
            extra = [(0, 0)] * (array.ndim - 1) + [(0, longest - tokens)]
            fill = masked if name == ATTENTION_BIAS else 0
            arrays[name] = np.pad(array, extra, constant_values=fill)
        batches.append(arrays)
    order = np.random.default_rng(0).permutation(len(batches))
    return [batches[number] for number in order]


def first_pass(
    graphs: dict[str, bytes], load: Callable[[bytes], Run], batches: Sequence[Arrays]
) -> tuple[dict[str, float], NDArray[np.int64]]:
    """Run each batch once in fresh sessions.

    Returns:
        CPU seconds by graph, and the exits `[batches, rows]` under the rule.
    """
    runs = {name: load(graph) for name, graph in graphs.items()}
    seconds = dict.fromkeys(runs, 0.0)
    exits = []
    names = [*runs]
    for number, arrays in enumerate(batches):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.process_time()
            answers = runs[name](arrays)
            seconds[name] += time.process_time() - started
            if name == RULE:
                exits.append(answers[EXIT])
    return seconds, np.stack(exits)


def single_text(graphs: Sequence[bytes], load: Callable[[bytes], Run], arrays: Arrays) -> float:
    """The median ratio of the CPU times of two graphs for one text."""
    runs = [load(graph) for graph in graphs]
    ratios = []
    for _ in range(SINGLE_RUNS):
        seconds = []
        for run in runs:
            started = time.process_time()
            run(arrays)
            seconds.append(time.process_time() - started)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


@click.command()
@click.argument("engines", type=click.Path(path_type=Path))
@click.option("--input", "source", required=True, help="Texts, in any format of fpabee-run.")
@click.option("--rule", "text", default="entropy", help="Exit rule. Default: entropy.")
@click.option("--depth", type=click.FloatRange(0, 1, min_open=True), default=0.5)
@click.option("--rounds", type=click.IntRange(min=1), default=5)
@exits_with_one_line
def main(engines: Path, source: str, text: str, depth: float, rounds: int) -> None:
    """Measure ENGINES as a packed file without exit 0, and print a table in Markdown."""
    texts = [row.content for row in islice(read_rows(source), BATCHES * ROWS)]
    folder = EnginesFolder.read(engines).with_manifest(exit_0=None)
    manifest = folder.manifest
    with Engine.load(engines, FP32_TARGET) as engine:
        rule = rule_for(engine, text, depth, texts)
        rows = engine.core.encode(texts)
    rule = msgspec.structs.replace(rule, exit_0_threshold=None)
    never = msgspec.structs.replace(rule, min_exit=manifest.exits[-1])
    calls = [name for segment in manifest.segments for name in segment.calls]

    def packed(rule: Any, for_plan: bool = False) -> bytes:
        protos = load_graphs(folder, manifest.graphs)
        model = single_graph(protos, manifest, rule, (), for_plan)
        return bytes(ir.to_proto(model).SerializeToString())

    graphs = {FULL: packed(never), RULE: packed(rule)}
    without = packed(never, for_plan=True)
    settings = as_inputs(settings_of(never, manifest.task, manifest.exits))
    protos = load_graphs(folder, manifest.graphs)
    graphs[PLAIN] = merge_graphs([(name, protos[name]) for name in calls]).SerializeToString()
    padding = padding_values(manifest.tokenizer)
    batches = batches_of(rows, padding)
    single = {name: array[:1] for name, array in batches[0].items()} | settings
    layers = np.array(manifest.exit_layers[-len(manifest.segments) :])
    click.echo(f"| {' | '.join((*COLUMNS, SINGLE_COLUMN))} |")
    click.echo("|---" * (len(COLUMNS) + 1) + "|")
    for runtime, load in RUNTIMES.items():
        passes = [first_pass(graphs, load, batches) for _ in range(rounds)]
        _, exits = passes[0]
        lengths = np.array([arrays[MASK].shape[1] for arrays in batches])
        ran = layers[exits - 1].mean(axis=1) / layers[-1]
        ratios = [
            statistics.median(seconds[over] / seconds[under] for seconds, _ in passes)
            for over, under in ((FULL, PLAIN), (RULE, PLAIN), (RULE, FULL))
        ]
        cells = [*ratios, (ran * lengths).sum() / lengths.sum()]
        cells.append(single_text([graphs[FULL], without], load, single))
        click.echo(f"| {runtime} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    click.echo(f"\nRule: {rule_in_words(rule)}; {BATCHES} batches of {ROWS} rows, {rounds} rounds.")
    click.echo(f"Lengths {lengths.min()} to {lengths.max()} tokens, one thread.")
    click.echo("; ".join(map(" ".join, environment().items())))


if __name__ == "__main__":
    main()
