"""Time the chain against one full graph and against plain PyTorch, interleaved.

A *unit* is what is timed at once: a batch of one shape, one text, or a window of texts.
For every unit the variants run one after another, so that a machine whose speed drifts
treats them alike; only PyTorch comes after them, since its threads would slow its
neighbour. A unit's time is the median of its repeats, and speed-ups are ratios of the sums
over units. Tokenization is left out everywhere.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.artifact.folder import sha256_of
from ..runtime.backends.onnxruntime_session import cpu_session, session_options, usable_cores
from ..runtime.batching import make_groups
from ..runtime.cli.console import duration
from ..runtime.encoding import EncodedRow, Text, padded_inputs, padding_values
from ..runtime.engine import Engine
from ..runtime.environment import cpu_name
from ..runtime.errors import ModelError
from ..runtime.progress import Progress, silent
from ..runtime.rules.rules import Budget, ExitRule
from ..runtime.rules.runner import RuleRunner
from .onnx_file import serialized
from .prune.merge import merge_chain

FULL_GRAPH = "full graph"
FULL_DEPTH = "chain, full depth"
WITH_RULE = "chain, rule"
PADDED_32 = "full graph, padded 32"
PYTORCH = "PyTorch, rule"

_WINDOW = 256
# How long idle threads of PyTorch may keep a core busy.
_SPIN_SECONDS = 0.3
_FILE_BATCH = 32


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        rule: the exit rule.
        repeats: times each unit is run at most.
        max_seconds: of a workload, after which its units are run only once.
        shapes: (rows, tokens) of the synthetic batches; those longer than the target
            takes are left out.
        max_rows: texts of the file that are used.
        max_single: texts of the file that are also run one at a time.
        model_dir: the PyTorch model, to time the same rule in plain PyTorch.
        threads: CPU threads for all variants.
    """

    rule: ExitRule
    repeats: int = 5
    max_seconds: float = 120.0
    shapes: tuple[tuple[int, int], ...] = ((1, 32), (1, 128), (32, 32), (32, 128))
    max_rows: int = 2000
    max_single: int = 100
    model_dir: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Timing:
    """Times of one variant over a workload: of a unit its median, p95 over every run."""

    total_s: float
    median_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Workload:
    """Results of one workload.

    Attributes:
        name: what was run.
        units: how many units.
        rows: how many rows in all.
        timings: by variant.
        mean_depth: layers that ran for a row under the rule.
        theoretical: speed-up of the rule in layers, weighted by tokens.
    """

    name: str
    units: int
    rows: int
    timings: dict[str, Timing]
    mean_depth: float
    theoretical: float

    def speedup(self, variant: str, baseline: str = FULL_GRAPH) -> float:
        """Baseline time over the variant's."""
        return self.timings[baseline].total_s / self.timings[variant].total_s

    @property
    def realised_share(self) -> float:
        """Realised over theoretical speed-up."""
        return self.speedup(WITH_RULE) / self.theoretical


@dataclass(frozen=True)
class BenchReport:
    """All workloads, and the machine they ran on."""

    engines: str
    target: str
    rule: dict[str, Any]
    layers: int
    hardware: str
    versions: dict[str, str]
    workloads: list[Workload] = field(default_factory=list)


Variants = dict[str, Callable[[Sequence[EncodedRow]], Any]]
Units = Sequence[Sequence[EncodedRow]]


class _Runner:
    """The variants, ready to be run on encoded rows."""

    def __init__(self, folder: Path, engine: Engine, options: BenchOptions) -> None:
        self.engine = engine
        self.rule = options.rule
        self.limits = engine.limits
        proto = merge_chain(folder, engine.manifest)
        self._full = cpu_session(
            serialized(proto, "the full graph, all segments in one,"),
            session_options(options.threads),
        )
        self._padding = padding_values(engine.manifest.tokenizer)
        self._full_padding = {v.name: self._padding[v.name] for v in self._full.get_inputs()}
        self._torch = _load_torch(options, engine.manifest.model.source_sha256)

    @property
    def has_torch(self) -> bool:
        return self._torch is not None

    def full_graph(self, rows: Sequence[EncodedRow]) -> None:
        """The full graph over the groups that the chain starts with."""
        lengths = np.array([len(row) for row in rows], np.intp)
        for numbers in make_groups(lengths, self.limits):
            self._run_full([rows[number] for number in numbers])

    def padded(self, rows: Sequence[EncodedRow]) -> None:
        """The full graph over padded batches in file order."""
        for start in range(0, len(rows), _FILE_BATCH):
            self._run_full(rows[start : start + _FILE_BATCH])

    def full_depth(self, rows: Sequence[EncodedRow]) -> None:
        """The chain, every layer for every row."""
        self.engine.run_encoded(rows, Budget(exit=len(self.engine.manifest.segments)))

    def with_rule(self, rows: Sequence[EncodedRow]) -> Any:
        """The chain with the rule; gives the exit of each row."""
        return self.engine.run_encoded(rows, self.rule).exits

    def pytorch(self, rows: Sequence[EncodedRow]) -> None:
        """The same rule in PyTorch, as published: a batch goes on until its last row stops."""
        for start in range(0, len(rows), _FILE_BATCH):
            self._run_torch(rows[start : start + _FILE_BATCH])

    def _run_full(self, rows: Sequence[EncodedRow]) -> None:
        import onnxruntime as ort

        # Bound like the chain's segments, so that neither side copies more than the other.
        binding = self._full.io_binding()
        for name, value in padded_inputs(rows, self._full_padding).items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value))
        binding.bind_output(self._full.get_outputs()[0].name, "cpu")
        self._full.run_with_iobinding(binding)
        binding.copy_outputs_to_cpu()

    def _run_torch(self, rows: Sequence[EncodedRow]) -> None:
        import torch

        from .model import token_weights

        model = self._torch
        arrays = padded_inputs(rows, self._padding)
        ids, types, bias = (torch.from_numpy(value) for value in arrays.values())
        task = self.engine.manifest.task
        embeddings, blocks, heads = model.parts
        layers = model.exit_config.exits
        runner = RuleRunner(self.rule, task.problem_type, len(layers), task.label_thresholds)
        progress, done, number = runner.start(len(rows)), np.zeros(len(rows), bool), 0
        with torch.inference_mode():
            weights = token_weights(bias)
            hidden, carried = embeddings(ids, types if model.backbone.token_types else None)
            for layer, block in enumerate(blocks, start=1):
                hidden = block(hidden, bias, **carried)
                if layer == layers[number]:
                    logits = heads[number](hidden, weights).numpy()
                    number += 1
                    stops, _ = runner.decide(number, progress, logits)
                    if stops is not None:
                        done |= stops
                    if done.all():
                        return


def run_bench(
    folder: str | Path,
    texts: Sequence[Text],
    options: BenchOptions,
    progress: Progress = silent,
) -> BenchReport:
    """Measure an engines folder on texts.

    Args:
        folder: the engines folder.
        texts: the texts of the file workloads; also the source of the synthetic batches.
        options: what to measure.
        progress: called with (what, done, total): the workload with the time that it is expected
            to take, and how many of its runs are done.
    """
    progress("load", 0, 1)
    with Engine.load(folder, threads=options.threads, preload=True) as engine:
        runner = _Runner(Path(folder), engine, options)
        rows = engine.encode(texts[: options.max_rows])
        report = BenchReport(
            engines=str(folder),
            target=engine.target,
            rule=options.rule.to_dict(),
            layers=engine.manifest.model.layers,
            hardware=hardware_line(options.threads),
            versions=_versions(),
        )
        fitting = [s for s in options.shapes if s[1] <= engine.limits.max_sequence]
        work: dict[str, Units] = {
            f"{batch} x {tokens} tokens": _synthetic(rows, batch, tokens, 16 if batch == 1 else 2)
            for batch, tokens in fitting
        }
        single = [[row] for row in _spread(rows, min(options.max_single, len(rows)))]
        work[f"file, batch 1 ({len(single)} texts)"] = single
        whole = f"file, all {len(rows)} texts"
        work[whole] = [rows[start : start + _WINDOW] for start in range(0, len(rows), _WINDOW)]
        for number, (name, units) in enumerate(work.items(), start=1):
            variants = _as_file(runner) if name == whole else _in_groups(runner)
            place = f"{number} of {len(work)}"
            measured = _measure(name, place, units, runner, options, variants, progress)
            report.workloads.append(measured)
    return report


def hardware_line(threads: int | None) -> str:
    """Processor, threads and system, for the line beside a table."""
    return f"{cpu_name()}, {threads or usable_cores()} threads, {platform.system()}"


def _versions() -> dict[str, str]:
    import onnxruntime

    return {
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    }


def _in_groups(runner: _Runner) -> Variants:
    variants: Variants = {
        FULL_GRAPH: runner.full_graph,
        FULL_DEPTH: runner.full_depth,
        WITH_RULE: runner.with_rule,
    }
    return variants | ({PYTORCH: runner.pytorch} if runner.has_torch else {})


def _as_file(runner: _Runner) -> Variants:
    return _in_groups(runner) | {PADDED_32: runner.padded}


def _measure(
    name: str,
    place: str,
    units: Units,
    runner: _Runner,
    options: BenchOptions,
    variants: Variants,
    progress: Progress,
) -> Workload:
    what, total = f"{place}: {name}", len(units) * options.repeats
    progress(what, 0, total)
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    every: dict[str, list[float]] = {variant: [] for variant in variants}
    layers = np.array(runner.engine.manifest.exit_layers)
    depth = weighted = tokens = 0.0
    alone = 0.0
    for variant, run in variants.items():
        started = time.perf_counter()
        run(units[0])  # loads segments, prepares bindings, measures the cost curve
        alone = time.perf_counter() - started if variant == PYTORCH else alone
    time.sleep(_SPIN_SECONDS)
    begun = time.perf_counter()
    for number, unit in enumerate(units, start=1):
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        results: dict[str, Any] = {}
        until = begun + options.max_seconds * number / len(units)
        together = {name: run for name, run in variants.items() if name != PYTORCH}
        for repeat in range(options.repeats):
            if repeat and time.perf_counter() > until:
                break
            for variant, run in together.items():
                started = time.perf_counter()
                results[variant] = run(unit)
                times[variant].append(time.perf_counter() - started)
            if (number, repeat) == (1, 0):
                once = time.perf_counter() - begun
                # Repeats end with the time that they are given, but every unit runs once.
                runs = min(total, max(len(units), options.max_seconds / once))
                pauses = len(units) * _SPIN_SECONDS if alone else 0.0
                what += f", about {duration(runs * (once + alone) + pauses)}"
            progress(what, (number - 1) * options.repeats + repeat + 1, total)
        if PYTORCH in variants:
            times[PYTORCH] = _alone(variants[PYTORCH], unit, len(times[FULL_GRAPH]))
        for variant, values in times.items():
            seconds[variant].append(statistics.median(values))
            every[variant] += values
        ran = layers[results[WITH_RULE] - 1]
        lengths = np.array([len(row) for row in unit])
        depth += float(ran.sum())
        weighted += float((ran * lengths).sum())
        tokens += float(lengths.sum())
    rows = sum(len(unit) for unit in units)
    return Workload(
        name=name,
        units=len(units),
        rows=rows,
        timings={name: _timing(values, every[name]) for name, values in seconds.items()},
        mean_depth=depth / rows,
        theoretical=float(layers[-1]) * tokens / weighted,
    )


def _alone(
    run: Callable[[Sequence[EncodedRow]], Any], unit: Sequence[EncodedRow], repeats: int
) -> list[float]:
    """Times of what must not run beside the others: PyTorch's threads spin on when it is done."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run(unit)
        times.append(time.perf_counter() - started)
    time.sleep(_SPIN_SECONDS)
    return times


def _timing(seconds: list[float], every: list[float]) -> Timing:
    milliseconds = np.array(seconds) * 1e3
    return Timing(
        total_s=float(milliseconds.sum() / 1e3),
        median_ms=float(np.median(milliseconds)),
        p95_ms=float(np.percentile(every, 95) * 1e3),
    )


def _synthetic(
    rows: Sequence[EncodedRow], batch: int, tokens: int, units: int
) -> list[list[EncodedRow]]:
    """Batches of one exact length, of real token ids: a row is repeated or cut to fit."""
    chosen = _spread(rows, batch * units)
    resized = [
        EncodedRow(np.resize(row.input_ids, tokens), np.resize(row.token_type_ids, tokens), False)
        for row in chosen
    ]
    return [resized[start : start + batch] for start in range(0, len(resized), batch)]


def _spread(rows: Sequence[EncodedRow], count: int) -> list[EncodedRow]:
    """`count` rows, evenly spread over all of them (repeated if there are fewer)."""
    return [rows[number * len(rows) // count] for number in range(count)]


def _load_torch(options: BenchOptions, exported: Mapping[str, str]) -> Any:
    """The PyTorch model, if it is asked for; another than the exported one is no comparison."""
    if options.model_dir is None:
        return None
    from ..runtime.optional_packages import require

    require("export")
    import torch

    from .checkpoint import load_checkpoint, resolve_model_dir
    from .weights import WEIGHTS

    folder = resolve_model_dir(options.model_dir)
    for name in WEIGHTS:
        path = folder / name
        if name in exported and path.is_file() and sha256_of(path) != exported[name]:
            raise ModelError(
                f"{path} is not what was exported: its hash differs",
                "give --model-dir the model that the engines folder was made of",
            )
    if options.threads:
        torch.set_num_threads(options.threads)
    return load_checkpoint(folder, attention=None)
