"""Times, memory, driver calls and parity of a target, for `scripts/gpu_check`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from gpu_check_table import ENGINE, STEPWISE, TOKENS, WITH_RULE

from fpabee.calibration import threshold_for_depth
from fpabee.exporter.bench import exact_batches
from fpabee.runtime import Budget, Engine, Entropy, ExitRule, FpabeeError, read_manifest
from fpabee.runtime.artifact.reference import read_reference
from fpabee.runtime.backends.cuda import Cuda, cuda
from fpabee.runtime.encoding import EncodedRow
from fpabee.runtime.inspection import target_states

ROWS = 32  # texts of each length
REPEATS = 20  # of each text
SECONDS = 4.0  # for all repeats of a length, once each text has run twice
WARM_UP = 4  # the first run of a shape allocates, the second one captures, later ones replay

Emit = Callable[..., None]
Run = Callable[[Sequence[EncodedRow]], Any]


class Skipped(Exception):  # noqa: N818
    """A part, or something in it, cannot run here."""


@dataclass
class Times:
    """Seconds of each run of one variant at one length: elapsed, and of the CPU."""

    clock: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, run: Run, rows: Sequence[EncodedRow]) -> None:
        """Run and time it."""
        cpu, started = time.process_time(), time.perf_counter()
        run(rows)
        self.clock.append(time.perf_counter() - started)
        self.cpu.append(time.process_time() - cpu)

    def summary(self) -> dict[str, float]:
        """Milliseconds: median, 99th percentile and mean, and the mean time of the CPU."""
        p50, p99 = np.quantile(self.clock, (0.5, 0.99))
        seconds = {"p50": p50, "p99": p99, "mean": np.mean(self.clock), "cpu": np.mean(self.cpu)}
        found = {f"{name}_ms": round(float(value) * 1e3, 4) for name, value in seconds.items()}
        return found | {"runs": len(self.clock)}


def measure(folder: Path, target: str, emit: Emit) -> None:
    """Measure a target of the folders `one` and `chain`.

    Args:
        folder: holds the two engines folders, and `texts.txt`.
        target: the name of the target in both of them.
        emit: is called with each result.

    Raises:
        Skipped: the target cannot run here.
        FpabeeError: it should run, but does not.
    """
    check_target(folder, target)
    texts = (folder / "texts.txt").read_text(encoding="utf-8").splitlines()
    with ExitStack() as stack:
        engines = {}
        for variant, name in ((ENGINE, "one"), (STEPWISE, "chain")):
            engines[variant] = _loaded(folder / name, target, variant, texts, emit)
            stack.enter_context(engines[variant])
        chain = engines[STEPWISE]
        _emit_parity(folder / "chain", chain, STEPWISE, emit)
        runs = {name: full_depth(engine) for name, engine in engines.items()}
        rule: ExitRule = Entropy(threshold=0.5)
        for tokens in TOKENS:
            batches = exact_rows(chain, texts, tokens)
            rule, mean_depth = at_half_depth(chain, [row for (row,) in batches])
            variants = runs | {WITH_RULE: partial(chain.run_encoded, rule=rule)}
            times = interleaved(variants, batches)
            for name, measured in times.items():
                calls = _driver_calls(variants[name], batches[0])
                depth = {"mean_depth": mean_depth} if name == WITH_RULE else {}
                found = measured.summary() | calls | depth
                emit(what="latency", variant=name, tokens=tokens, **found)
        for name, engine in engines.items():
            full = Budget(exit=engine.manifest.exits[-1])
            emit_throughput(name, partial(_file, engine, texts, full), emit)
        emit_throughput(WITH_RULE, partial(_file, chain, texts, rule), emit)


def check_target(folder: Path, target: str) -> None:
    """Raise `Skipped` if a target cannot run here in the folders `one` and `chain`."""
    for name in ("one", "chain"):
        states = {s.name: s for s in target_states(folder / name, read_manifest(folder / name))}
        if target not in states:
            raise Skipped(f"the engines folder {name} has no target {target}")
        if states[target].unavailable_reason:
            raise Skipped(states[target].unavailable_reason)


def _loaded(folder: Path, target: str, variant: str, texts: Sequence[str], emit: Emit) -> Engine:
    """An engine that has run each length once; emits times and memory of the load."""
    free, started = cuda().memory()[0], time.perf_counter()
    engine = Engine.load(folder, target, preload=True)
    loaded, first = time.perf_counter() - started, Times()
    for tokens in TOKENS:
        first.add(full_depth(engine), exact_rows(engine, texts, tokens)[0])
    used = round((free - cuda().memory()[0]) / 2**20, 1)
    emit(what="load", variant=variant, seconds=round(loaded, 3), mib=used)
    for tokens, seconds in zip(TOKENS, first.clock, strict=True):
        emit(what="first call", variant=variant, tokens=tokens, ms=round(seconds * 1e3, 2))
    return engine


def interleaved(
    variants: dict[str, Run], batches: Sequence[Sequence[EncodedRow]]
) -> dict[str, Times]:
    """Time the variants one after another on each batch, so that all see the same clock rates."""
    for batch in batches[:WARM_UP]:
        for run in variants.values():
            run(batch)
    times = {name: Times() for name in variants}
    until = time.perf_counter() + SECONDS
    for repeat in range(REPEATS):
        for batch in batches:
            for name, run in variants.items():
                times[name].add(run, batch)
        if repeat and time.perf_counter() > until:
            break
    return times


def full_depth(engine: Engine) -> Run:
    """Runs tokenized rows to the last exit."""
    return partial(engine.run_encoded, rule=Budget(exit=engine.manifest.exits[-1]))


def exact_rows(engine: Engine, texts: Sequence[str], tokens: int) -> Sequence[list[EncodedRow]]:
    """Batches of one row of exactly `tokens` tokens."""
    return [list(unit) for unit in exact_batches(engine.encode(texts[:ROWS]), 1, tokens, ROWS)]


def at_half_depth(engine: Engine, rows: Sequence[EncodedRow]) -> tuple[ExitRule, float]:
    """The entropy rule that runs about half of the layers on these rows, and their mean depth."""
    manifest = engine.manifest
    layers, task = manifest.exit_layers, manifest.task.problem_type
    logits = engine.run_encoded(rows, Budget(exit=manifest.exits[-1])).logits
    start = Entropy(threshold=0.5)
    rule = threshold_for_depth(logits, start, task, layers, layers[-1] / 2)
    exits = engine.run_encoded(rows, rule).exits
    return rule, round(float(np.array(layers)[exits - 1].mean()), 2)


def _driver_calls(run: Run, rows: Sequence[EncodedRow]) -> dict[str, float]:
    """Driver calls of a request, and the share of its segments that ran in a captured graph."""
    with _counted() as calls:
        result = run(rows)
    launches, segments = calls.get("launch", 0), int(result.exits[0]) + result.wasted
    return {"driver_calls": sum(calls.values()), "captured": round(launches / segments, 3)}


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Counts the calls of each function of the driver while the context lasts."""
    driver: Any = cuda()
    calls: dict[str, int] = {}

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return function(*arguments)

        return call

    with ExitStack() as stack:
        for name in dir(Cuda):
            if not name.startswith("_"):
                counted = counting(name, getattr(driver, name))
                stack.enter_context(mock.patch.object(driver, name, counted))
        yield calls


def _emit_parity(folder: Path, engine: Engine, variant: str, emit: Emit) -> None:
    """Compare the logits of every exit with those of the PyTorch model in fp32."""
    texts, expected = read_reference(folder, engine.manifest)
    difference = np.abs(engine.trace(texts).logits - expected)
    exits = [float(f"{value:.2e}") for value in difference.max(axis=(1, 2))]
    try:
        verdict = str(engine.check())
    except FpabeeError as error:
        verdict = f"refused: {error.message}"
    emit(what="parity", variant=variant, exits=exits, verdict=verdict)


def _file(engine: Engine, texts: Sequence[str], rule: ExitRule) -> Sequence[Any]:
    return list(engine.stream(texts, rule=rule))


def emit_throughput(variant: str, run: Callable[[], Sequence[Any]], emit: Emit) -> None:
    """Texts per second over a file, tokenization included: the better of two runs after a first."""
    rows, seconds = len(run()), []
    for _ in range(2):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    emit(what="throughput", variant=variant, texts_per_s=round(rows / min(seconds), 1))
