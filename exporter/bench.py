"""Time the chain against one graph of the whole model and against plain PyTorch.

A *unit* is what is timed at once: a batch of one shape, one text, or a window of texts. For each
unit the variants run one after another, so that a machine whose speed drifts treats them alike.
Only PyTorch runs after all others, because its threads keep spinning and would slow them down. The
time of a unit is the median of its repeats, and a speed-up is a ratio of sums over units.
Tokenization is never included.
"""

from __future__ import annotations

import dataclasses
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
from ..runtime.encoding import EncodedRow, Text, padded_inputs, padding_values
from ..runtime.engine import Engine
from ..runtime.environment import cpu_name
from ..runtime.errors import ModelError, Remedy
from ..runtime.optional_packages import require
from ..runtime.progress import Progress, silent
from ..runtime.rules.base import ExitRule
from ..runtime.rules.rules import Budget
from ..runtime.rules.runner import RuleRunner
from .onnx_file import serialized
from .prune.merge import merge_chain

FULL_GRAPH = "full graph"
FULL_DEPTH = "chain, full depth"
WITH_RULE = "chain, rule"
PADDED_32 = "full graph, padded 32"
PYTORCH = "PyTorch, rule"

_WINDOW = 256
# How long PyTorch's idle threads may keep a core busy.
_SPIN_SECONDS = 0.3
_FILE_BATCH = 32


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        rule: the exit rule.
        repeats: how often each unit is run at most.
        max_seconds: of a workload, after which its units are run only once.
        shapes: (rows, tokens) of the synthetic batches; those longer than the target takes are
            left out.
        max_rows: how many texts of the file are used at most.
        max_single: how many of them are also run one at a time, at most.
        model_dir: the PyTorch model, to time the same rule in plain PyTorch.
        threads: CPU threads of all variants.
        target: the target whose chain is timed; default: the manifest's. The full graph always runs
            in ONNX Runtime in fp32.
    """

    rule: ExitRule
    repeats: int = 5
    max_seconds: float = 120.0
    shapes: tuple[tuple[int, int], ...] = ((1, 32), (1, 128), (32, 32), (32, 128))
    max_rows: int = 2000
    max_single: int = 100
    model_dir: str | None = None
    threads: int | None = None
    target: str | None = None


@dataclass(frozen=True)
class Timing:
    """Times of one variant over a workload.

    Attributes:
        total_s: the sum over units.
        median_ms: the median over units.
        p95_ms: the 95th percentile of every single run.
    """

    total_s: float
    median_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Workload:
    """Results of one workload.

    Attributes:
        name: what was run.
        units: the number of units.
        rows: the number of rows in all units.
        timings: by variant.
        mean_depth: layers that ran for a row under the rule, on average.
        theoretical: speed-up of the rule in layers, weighted by tokens.
    """

    name: str
    units: int
    rows: int
    timings: dict[str, Timing]
    mean_depth: float
    theoretical: float

    def speedup(self, variant: str, baseline: str = FULL_GRAPH) -> float:
        """The time of the baseline over the time of the variant."""
        return self.timings[baseline].total_s / self.timings[variant].total_s

    @property
    def realised_share(self) -> float:
        """Realised over theoretical speed-up."""
        return self.speedup(WITH_RULE) / self.theoretical


@dataclass(frozen=True)
class BenchReport:
    """All workloads, and the machine that ran them."""

    engines: str
    target: str
    rule: dict[str, Any]
    layers: int
    hardware: str
    versions: dict[str, str]
    workloads: list[Workload] = field(default_factory=list)


Units = Sequence[Sequence[EncodedRow]]
Variants = dict[str, Callable[[Sequence[EncodedRow]], Any]]


class _Runner:
    """Runs encoded rows in each variant."""

    def __init__(self, folder: Path, engine: Engine, options: BenchOptions) -> None:
        self.engine = engine
        self.rule = options.rule
        proto = merge_chain(folder, engine.manifest)
        self._full = cpu_session(
            serialized(proto, "one graph of all segments"), session_options(options.threads)
        )
        self._padding = padding_values(engine.manifest.tokenizer)
        self._full_padding = {v.name: self._padding[v.name] for v in self._full.get_inputs()}
        self._torch = _load_torch(options, engine.manifest.model.source_sha256)

    def variants(self, in_file_order: bool) -> Variants:
        """The variants by name.

        Args:
            in_file_order: also the full graph over padded batches in file order.
        """
        variants: Variants = {
            FULL_GRAPH: self._full_graph,
            FULL_DEPTH: self._full_depth,
            WITH_RULE: self._with_rule,
        }
        if self._torch is not None:
            variants[PYTORCH] = self._pytorch
        if in_file_order:
            variants[PADDED_32] = self._padded
        return variants

    def _full_graph(self, rows: Sequence[EncodedRow]) -> None:
        """The full graph over the groups that the chain starts with."""
        lengths = np.array([len(row) for row in rows], np.intp)
        for numbers in make_groups(lengths, self.engine.limits):
            self._run_full([rows[number] for number in numbers])

    def _padded(self, rows: Sequence[EncodedRow]) -> None:
        for start in range(0, len(rows), _FILE_BATCH):
            self._run_full(rows[start : start + _FILE_BATCH])

    def _full_depth(self, rows: Sequence[EncodedRow]) -> None:
        self.engine.run_encoded(rows, Budget(exit=self.engine.manifest.exits[-1]))

    def _with_rule(self, rows: Sequence[EncodedRow]) -> Any:
        """The chain with the rule; returns the exit of each row."""
        return self.engine.run_encoded(rows, self.rule).exits

    def _pytorch(self, rows: Sequence[EncodedRow]) -> None:
        """The same rule in PyTorch, as published: a batch runs on until its last row stops.

        This variant leaves out exit 0.
        """
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

        model, task = self._torch, self.engine.manifest.task
        arrays = padded_inputs(rows, self._padding)
        ids, types, bias = (torch.from_numpy(value) for value in arrays.values())
        embeddings, blocks, heads = model.parts
        head_of = dict(zip(model.exit_config.exits, heads, strict=True))
        exits = range(1, len(heads) + 1)
        rule = dataclasses.replace(self.rule, exit_0_threshold=None)
        runner = RuleRunner(rule, task.problem_type, exits, task.label_thresholds)
        state, done, number = runner.start(len(rows)), np.zeros(len(rows), bool), 0
        with torch.inference_mode():
            weights = token_weights(bias)
            hidden, carried = embeddings(ids, types if model.backbone.token_types else None)
            for layer, block in enumerate(blocks, start=1):
                hidden = block(hidden, bias, **carried)
                if layer in head_of:
                    number += 1
                    logits = head_of[layer](hidden, weights).numpy()
                    stops, _ = runner.decide(number, state, logits)
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
        texts: the texts of the file workloads, whose tokens also fill the synthetic batches.
        options: what to measure.
        progress: called with (what, done, total): the workload with its expected duration, and
            how many of its runs are done.

    Raises:
        ModelError: the PyTorch model is not the exported one.
    """
    import onnxruntime

    progress("load", 0, 1)
    with Engine.load(folder, options.target, threads=options.threads, preload=True) as engine:
        runner = _Runner(Path(folder), engine, options)
        rows = engine.encode(texts[: options.max_rows])
        threads = options.threads or usable_cores()
        report = BenchReport(
            engines=str(folder),
            target=engine.target,
            rule=options.rule.to_dict(),
            layers=engine.manifest.model.layers,
            hardware=f"{cpu_name()}, {threads} threads, {platform.system()}",
            versions={
                "python": platform.python_version(),
                "onnxruntime": onnxruntime.__version__,
                "numpy": np.__version__,
            },
        )
        work: dict[str, Units] = {
            f"{batch} x {tokens} tokens": exact_batches(
                rows, batch, tokens, units=16 if batch == 1 else 2
            )
            for batch, tokens in options.shapes
            if tokens <= engine.limits.max_sequence
        }
        single = [[row] for row in _spread(rows, min(options.max_single, len(rows)))]
        work[f"file, batch 1 ({len(single)} texts)"] = single
        whole = f"file, all {len(rows)} texts"
        work[whole] = [rows[start : start + _WINDOW] for start in range(0, len(rows), _WINDOW)]
        for number, (name, units) in enumerate(work.items(), start=1):
            place = f"{number} of {len(work)}"
            measured = _measure(name, place, units, runner, options, name == whole, progress)
            report.workloads.append(measured)
    return report


def _measure(
    name: str,
    place: str,
    units: Units,
    runner: _Runner,
    options: BenchOptions,
    in_file_order: bool,
    progress: Progress,
) -> Workload:
    what, total = f"{place}: {name}", len(units) * options.repeats
    progress(what, 0, total)
    together = runner.variants(in_file_order)
    # The first run loads segments, prepares bindings and measures the cost curve.
    first = {variant: _timed(run, units[0])[0] for variant, run in together.items()}
    every: dict[str, list[list[float]]] = {variant: [] for variant in together}
    pytorch = together.pop(PYTORCH, None)
    exits = []
    time.sleep(_SPIN_SECONDS)
    begun = time.perf_counter()
    for number, unit in enumerate(units, start=1):
        for times in every.values():
            times.append([])
        until = begun + options.max_seconds * number / len(units)
        for repeat in range(options.repeats):
            if repeat and time.perf_counter() > until:
                break
            results = {}
            for variant, run in together.items():
                seconds, results[variant] = _timed(run, unit)
                every[variant][-1].append(seconds)
            if (number, repeat) == (1, 0):
                # Every unit runs once, even if the time for repeats is up.
                once = time.perf_counter() - begun
                runs = min(total, max(len(units), options.max_seconds / once))
                pauses = len(units) * _SPIN_SECONDS if pytorch else 0.0
                minutes, rest = divmod(round(runs * (once + first.get(PYTORCH, 0)) + pauses), 60)
                what += f", about {minutes}:{rest:02d}"
            progress(what, (number - 1) * options.repeats + repeat + 1, total)
        exits.append(results[WITH_RULE])
        if pytorch is not None:
            every[PYTORCH][-1] += [_timed(pytorch, unit)[0] for _ in every[FULL_GRAPH][-1]]
            time.sleep(_SPIN_SECONDS)
    manifest = runner.engine.manifest
    layers = np.array(manifest.exit_layers)
    ran = layers[np.concatenate(exits) - manifest.exits[0]]
    tokens = np.array([len(row) for unit in units for row in unit])
    return Workload(
        name=name,
        units=len(units),
        rows=len(ran),
        timings={variant: _timing(times) for variant, times in every.items()},
        mean_depth=float(ran.mean()),
        theoretical=float(layers[-1] * tokens.sum() / max((ran * tokens).sum(), 1)),
    )


def _timed(
    run: Callable[[Sequence[EncodedRow]], Any], unit: Sequence[EncodedRow]
) -> tuple[float, Any]:
    """Seconds, and the result."""
    started = time.perf_counter()
    result = run(unit)
    return time.perf_counter() - started, result


def _timing(times: Sequence[Sequence[float]]) -> Timing:
    """The timing of a variant from its seconds, by unit and repeat."""
    medians = [statistics.median(repeats) for repeats in times]
    return Timing(
        total_s=sum(medians),
        median_ms=1e3 * statistics.median(medians),
        p95_ms=1e3 * float(np.percentile(np.concatenate(times), 95)),
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


def _load_torch(options: BenchOptions, exported: Mapping[str, str]) -> Any:
    """The PyTorch model, if it is asked for; it must be the exported one."""
    if options.model_dir is None:
        return None
    require("export")
    import torch

    from .checkpoint import load_checkpoint, resolve_model_dir
    from .weights import WEIGHTS

    folder = resolve_model_dir(options.model_dir)
    for name in WEIGHTS:
        path = folder / name
        if name in exported and path.is_file() and sha256_of(path) != exported[name]:
            raise ModelError(
                f"{path} is not the exported model: its hash differs",
                Remedy("give the model that the engines folder was made from as {model_dir}"),
            )
    if options.threads:
        torch.set_num_threads(options.threads)
    return load_checkpoint(folder, attention=None)
