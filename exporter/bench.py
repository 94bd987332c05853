"""Time the chain against one graph of the whole model and against plain PyTorch.

A *unit* is what is timed at once: a batch of one shape, one text, or a window of texts. For each
unit the variants run one after another, so that a machine whose speed drifts treats them alike.
Only libraries other than that of the target run after all others, because their threads keep
spinning and would slow them down. The time of a unit is the median of its repeats, and a speed-up
is a ratio of sums over units. Tokenization is never included.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..runtime.artifact.folder import read_manifest, sha256_of
from ..runtime.backends.onnxruntime_session import usable_cores
from ..runtime.backends.tensorrt import MODULES, library_version
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
from ..runtime.targets import open_backend
from .exact import FP32_TARGET
from .merge import write_one_graph
from .targets.cpu import ONNXRUNTIME, OPENVINO, version_of

FULL_GRAPH = "full graph"
FULL_DEPTH = "chain, full depth"
WITH_RULE = "chain, rule"
PADDED_32 = "full graph, padded 32"
PADDED_FP32 = "onnxruntime-fp32, full graph, padded 32"
PYTORCH = "PyTorch, rule"

_WINDOW = 256
# How long idle threads of PyTorch or ONNX Runtime may keep a core busy.
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
        target: the target whose chain and full graph are timed; default: the manifest's. For
            targets on GPUs, the full graph runs in ONNX Runtime in fp32.
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
        first_s: the sum over units of the first timed run of each. It may be longer than `total_s`,
            because OpenVINO prepares kernels for every new shape. The first unit has run before.
    """

    total_s: float
    median_ms: float
    p95_ms: float
    first_s: float


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
    """All workloads, the targets of the chain and of the full graph, and the machine."""

    engines: str
    target: str
    full_target: str
    rule: dict[str, Any]
    layers: int
    hardware: str
    versions: dict[str, str]
    workloads: list[Workload] = field(default_factory=list)


Units = Sequence[Sequence[EncodedRow]]
Variants = dict[str, Callable[[Sequence[EncodedRow]], Any]]


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
        for numbers in make_groups(lengths, self._limits):
            self._run([rows[number] for number in numbers])

    def padded(self, rows: Sequence[EncodedRow]) -> None:
        """Run batches of 32 rows in file order."""
        for start in range(0, len(rows), _FILE_BATCH):
            self._run(rows[start : start + _FILE_BATCH])

    def _run(self, rows: Sequence[EncodedRow]) -> None:
        bucket = self._limits.bucket(len(rows), max(map(len, rows)), alone=len(rows) == 1)
        hidden = self._execution.begin(rows, bucket)
        self._execution.enqueue(0, hidden).result()
        self._execution.release(hidden)

    def close(self) -> None:
        """Free what is loaded."""
        self._backend.give_back(self._execution)
        self._backend.close()


class _Runner:
    """Runs encoded rows in each variant.

    Args:
        whole: the engines folder with only its last exit.
        engine: the engine of the folder with all exits.
        options: what to measure.
        stack: closes what is opened.
    """

    def __init__(
        self, whole: Path, engine: Engine, options: BenchOptions, stack: ExitStack
    ) -> None:
        self.engine = engine
        self.rule = options.rule
        has_target = engine.target in read_manifest(whole).targets
        is_for_cpus = not engine.manifest.targets[engine.target].device
        self.full_target = engine.target if has_target and is_for_cpus else FP32_TARGET

        def graph(target: str) -> _Graph:
            return stack.enter_context(closing(_Graph(whole, target, options.threads)))

        self._full = graph(self.full_target)
        self._fp32 = None if self.full_target == FP32_TARGET else graph(FP32_TARGET)
        self._padding = padding_values(engine.manifest.tokenizer)
        self._torch = _load_torch(options, engine.manifest.model.source_sha256)

    def variants(self, in_file_order: bool) -> tuple[Variants, Variants]:
        """The variants by name: those that take turns, and those of other libraries.

        Args:
            in_file_order: also the full graph over padded batches in file order.
        """
        full_depth = Budget(exit=self.engine.manifest.exits[-1])
        variants: Variants = {
            FULL_GRAPH: self._full.grouped,
            FULL_DEPTH: partial(self.engine.run_encoded, rule=full_depth),
            WITH_RULE: partial(self.engine.run_encoded, rule=self.rule),
        }
        others: Variants = {}
        if self._torch is not None:
            others[PYTORCH] = self._pytorch
        if in_file_order:
            variants[PADDED_32] = self._full.padded
            if self._fp32 is not None:
                others[PADDED_FP32] = self._fp32.padded
        return variants, others

    def _pytorch(self, rows: Sequence[EncodedRow]) -> None:
        """The same rule in PyTorch, as published: a batch runs on until its last row stops.

        This variant leaves out exit 0.
        """
        for start in range(0, len(rows), _FILE_BATCH):
            self._run_torch(rows[start : start + _FILE_BATCH])

    def _run_torch(self, rows: Sequence[EncodedRow]) -> None:
        import torch

        from .model import token_weights

        model, task = self._torch, self.engine.manifest.task
        arrays = padded_inputs(rows, self._padding)
        ids, types, bias = (torch.from_numpy(value) for value in arrays.values())
        embeddings, blocks, heads = model.parts
        kept = self.engine.manifest.exit_layers  # the folder may have fewer exits than the model
        layers = zip(model.exit_config.exits, heads, strict=True)
        head_of = {layer: head for layer, head in layers if layer in kept}
        exits = range(len(head_of) + 1)
        runner = RuleRunner(self.rule, task.problem_type, exits, task.label_thresholds)
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
    progress("load", 0, 1)
    with ExitStack() as stack:
        engine = stack.enter_context(
            Engine.load(folder, options.target, threads=options.threads, preload=True)
        )
        one = Path(stack.enter_context(TemporaryDirectory()))
        write_one_graph(Path(folder), one)
        runner = _Runner(one, engine, options, stack)
        rows = engine.encode(texts[: options.max_rows])
        threads = options.threads or usable_cores()
        report = BenchReport(
            engines=str(folder),
            target=engine.target,
            full_target=runner.full_target,
            rule=options.rule.to_dict(),
            layers=engine.manifest.model.layers,
            hardware=f"{cpu_name()}, {threads} threads, {platform.system()}",
            versions={
                "python": platform.python_version(),
                ONNXRUNTIME: version_of(ONNXRUNTIME),
                **_versions_of(engine.manifest.targets[engine.target].backend),
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
    together, others = runner.variants(in_file_order)
    # The first run loads segments, prepares bindings and measures the cost curve.
    both = together | others
    first = {variant: _timed(run, units[0])[0] for variant, run in both.items()}
    every: dict[str, list[list[float]]] = {variant: [] for variant in both}
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
                pauses = len(units) * _SPIN_SECONDS * len(others)
                apart = sum(first[variant] for variant in others)
                minutes, rest = divmod(round(runs * (once + apart) + pauses), 60)
                what += f", about {minutes}:{rest:02d}"
            progress(what, (number - 1) * options.repeats + repeat + 1, total)
        exits.append(results[WITH_RULE].exits)
        for variant, run in others.items():
            every[variant][-1] += [_timed(run, unit)[0] for _ in every[FULL_GRAPH][-1]]
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


def _versions_of(backend: str) -> dict[str, str]:
    """The installed version of a backend's library, besides ONNX Runtime."""
    if backend == OPENVINO:
        return {backend: version_of(backend)}
    return {name: library_version(name) for key, name in MODULES.items() if key == backend}


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
        first_s=sum(repeats[0] for repeats in times),
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
