#!/usr/bin/env python
"""The first hour on a GPU: does fpabee run on the GPU of this machine, and how fast?

    pip install -e '.[cpu,export,serve,tensorrt-rtx-cu13]' filelock hypothesis pytest
    python scripts/gpu_check.py

It calls the driver, and makes a model with random weights, whose labels mean nothing but whose
speed is that of a trained one. Then, for TensorRT for RTX and for TensorRT, as far as they are
installed, it builds plans, times the chain, the packed plan and one plain engine, compares exits
and logits, and sends texts to a server. It measures first and judges afterwards.

Each part runs in a process of its own with a time limit. `gpu_check.md` and `gpu_check.json` are
written after each of them, also with what a part had found when it crashed, took too long or was
stopped with Ctrl-C. What cannot run here is skipped, with the reason. The exit code is 1 if there
is no GPU, nothing was measured, a part did not finish, or a check failed. The next run keeps what
was made and built.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
from load_test import Client, served
from one_graph import write_one_graph

from fpabee.calibration import threshold_for_depth
from fpabee.exporter.single_file import pack
from fpabee.exporter.staging import staging
from fpabee.exporter.targets import PlanOptions, build_targets
from fpabee.exporter.targets.backends import RTX, TENSORRT
from fpabee.exporter.targets.builders import BUILDERS
from fpabee.exporter.targets.plans import RTX_CAPABILITIES
from fpabee.runtime import Bucket, Budget, Engine, Entropy, read_manifest, simulate
from fpabee.runtime.artifact.folder import is_engines_folder
from fpabee.runtime.artifact.manifest import Graph
from fpabee.runtime.backends.buffers import dtype_of, shape_of
from fpabee.runtime.backends.cuda import GATHER, cuda
from fpabee.runtime.backends.tensorrt import (
    MODULES,
    ErrorLog,
    RuntimeCache,
    error_logger,
    profile_for,
    succeeds,
)
from fpabee.runtime.check import REQUIREMENTS
from fpabee.runtime.encoding import Arrays, EncodedRow, padded_inputs, padding_values
from fpabee.runtime.errors import FpabeeError
from fpabee.runtime.machine import cuda_device, environment, providers
from fpabee.runtime.targets import why_not

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "gpu_check"
SIZES: dict[str, dict[str, Any]] = {
    "minilm": {"layers": 6, "width": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"layers": 12, "width": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
LIBRARIES = (RTX, TENSORRT)
# Seconds after which a part is stopped: estimates for a desktop GPU and the small model. TensorRT
# times kernels for six profiles. What a part leaves over is for those after it.
PARTS = {
    "driver": 15.0,
    "model": 120.0,
    **{f"build {RTX}": 80.0, f"measure {RTX}": 50.0, f"server {RTX}": 55.0},
    **{f"build {TENSORRT}": 170.0, f"measure {TENSORRT}": 50.0, f"server {TENSORRT}": 60.0},
}
SECONDS = sum(PARTS.values())
LEAST_SECONDS = 5.0  # a part is not started if less time is left
SHAPES = (Bucket(1, 16), Bucket(1, 128), Bucket(16, 64))  # of what is timed, without padding
PLANS = PlanOptions(batch=(1, 8, 32), sequence=(16, 64, 128))
PACKED_BATCH = (1, 1, 32)  # that of fpabee-pack
TEXTS = 500
RUNS = 3  # the first ones are not timed
REPEATS = 200
TIMED_SECONDS = 2.0  # for each shape
SERVED_SECONDS = 5.0  # for each number of clients
CLIENTS = (1, 64)
THREADS = 4
MOST_DIFFERENT = 0.01  # of the rows; near ties may end otherwise in fp16
MOST_DIFFERENCE = 0.05  # of a logit: other kernels run for other shapes, in fp16

TABLES = {
    "Times": ("library", "what", "rows x tokens", "p50 ms", "p99 ms"),
    "Checks": ("library", "check", "found", "verdict"),
    "Server": ("library", "clients", "texts/s", "p50 ms", "p99 ms"),
    "Parts": ("part", "state", "time", "remarks"),
}
TIMES, CHECKS, SERVER, STATES = TABLES
NOTE = "note"
INTERRUPTED = "interrupted"
SKIPPED = "skipped"
GOOD = "good"
BAD = "BAD"

Emit = Callable[..., None]
"""Called with the name of a table, and the cells of a row; a note has one cell."""


class Skipped(Exception):  # noqa: N818
    """A part cannot run here."""


def smoke(emit: Emit) -> None:
    """Copy rows to the device, gather some of them there, and copy them back."""
    calls = cuda(0)
    with calls:
        free, total = calls.memory()
        emit(NOTE, f"{free / 2**20:.0f} of {total / 2**20:.0f} MiB of device memory are free")
        rows = np.arange(64, dtype=np.float32).reshape(4, 16)
        order = [2, 0, 3]
        pitch = rows[0].nbytes
        stream = calls.stream()
        event = calls.event()
        there = calls.pinned(rows.shape, rows.dtype)
        back = calls.pinned(rows.shape, rows.dtype)
        source = calls.malloc(rows.nbytes)
        target = calls.malloc(rows.nbytes)
        plan = np.zeros(1, GATHER)
        plan["to"] = target
        plan["pitch"] = pitch
        plan["sources"][0, : len(order)] = [source + row * pitch for row in order]
        plan["widths"][0, : len(order)] = pitch
        there.array[...] = rows
        calls.copy(source, there.pointer, rows.nbytes, stream)
        calls.gather(plan, len(rows), stream)
        calls.copy(back.pointer, target, rows.nbytes, stream)
        calls.record(event, stream)
        calls.wait(event)
        expected = np.concatenate([rows[order], np.zeros_like(rows[:1])])
        wrong = np.count_nonzero(back.array != expected)
        verdict = BAD if wrong else GOOD
        emit(CHECKS, "driver", "Copies, gather and event.", f"{wrong} wrong numbers", verdict)
        calls.free(source)
        calls.free(target)
        calls.destroy_event(event)
        calls.destroy_stream(stream)


def make_model(folder: Path, size: str, emit: Emit) -> None:
    """The engines folder `chain`, and `one` with all layers in one segment; both with fp16."""
    if is_engines_folder(folder / "one"):
        raise Skipped("the model was made before")
    sys.path.insert(0, str(ROOT))
    from tests.conftest import WORDS
    from tests.conftest import make_model as make

    from fpabee.exporter import ExportOptions, export

    draw = random.Random(size)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(TEXTS)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    sizes: dict[str, Any] = {"max_position_embeddings": PLANS.sequence[2], **SIZES[size]}
    make("bert", folder / "model", **sizes)
    export(folder / "model", folder / "chain", ExportOptions(force=True))
    build_targets(folder / "chain", ["onnxruntime-fp16-cuda"])
    with staging(folder / "one") as new:
        write_one_graph(folder / "chain", new)


def build(folder: Path, library: str, emit: Emit) -> None:
    """Plans of the segments, of all layers as one plan, and the packed plan with the exits."""
    name = f"{library}-fp16"
    if error := BUILDERS[name].why_not():
        raise Skipped(str(error))
    options = PLANS
    if library == RTX:
        here = cuda_device().compute_capability
        if here not in RTX_CAPABILITIES:
            raise Skipped(f"TensorRT for RTX does not support compute capability {here}")
        options = replace(PLANS, compute_capabilities=(here,))
    for model in ("chain", "one"):
        if target_in(folder / model, library):
            emit(NOTE, f"{model} was built before")
            continue
        started = time.perf_counter()
        built = build_targets(folder / model, [name], plans=options)
        if name in built.refused:
            raise built.refused[name]
        emit(NOTE, f"{model} was built in {time.perf_counter() - started:.0f} s")
    packed = folder / f"packed-{library}"
    if not packed.exists():
        started = time.perf_counter()
        pack(folder / "chain", packed, name, plans=replace(options, batch=PACKED_BATCH))
        emit(NOTE, f"the packed plan was built in {time.perf_counter() - started:.0f} s")


def target_in(folder: Path, library: str) -> str:
    """The target of plans that can run here; empty if there is none."""
    manifest = read_manifest(folder)
    names = (name for name, target in manifest.targets.items() if target.backend == library)
    return next((name for name in names if not why_not(manifest, name)), "")


class BarePlan:
    """A plan in bare TensorRT at one shape, as an application without fpabee would run it.

    Args:
        path: the plan.
        library: `tensorrt-rtx` or `tensorrt`.
        inputs: its inputs by name.
        outputs: the shape and type of its outputs by name.
        profile: the number of its optimization profile.

    Attributes:
        outputs: the outputs of the last run, by name.
    """

    def __init__(
        self,
        path: Path,
        library: str,
        inputs: Arrays,
        outputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
        profile: int = 0,
    ) -> None:
        trt: Any = import_module(MODULES[library])
        self._calls = cuda(0)
        self._addresses: list[int] = []
        with self._calls:
            self._load(trt, path, library, inputs, outputs, profile)

    def _load(
        self,
        trt: Any,
        path: Path,
        library: str,
        inputs: Arrays,
        outputs: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
        profile: int,
    ) -> None:
        self._stream = self._calls.stream()
        self._event = self._calls.event()
        self._errors = ErrorLog()
        self._logger = error_logger(trt, self._errors)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        self._must(self._engine is not None, "it cannot be loaded")
        how = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if library == RTX:  # otherwise slow kernels would run until better ones are compiled
            self._cache = RuntimeCache(f"check of {path.name}", self._errors)
            how = self._cache.config(trt, path.name, self._engine)
        self._context = self._engine.create_execution_context(how)
        self._must(self._context is not None, "there is no execution context")
        set_profile = self._context.set_optimization_profile_async
        done = succeeds(set_profile, profile, self._stream)
        self._must(done, f"it has no profile {profile}")
        for name, array in inputs.items():
            done = self._context.set_input_shape(name, array.shape)
            self._must(done, f"{name} cannot be of shape {array.shape}")
        done = succeeds(lambda: not self._context.infer_shapes())
        self._must(done, "an input has no shape")
        shapes = {name: (array.shape, array.dtype) for name, array in inputs.items()}
        self._memory = {}
        for name, (shape, dtype) in {**shapes, **outputs}.items():
            pinned = self._calls.pinned(shape, dtype)
            address = self._allocated(max(1, pinned.array.nbytes))
            done = self._context.set_tensor_address(name, address)
            self._must(done, f"{name} cannot be at an address")
            self._memory[name] = pinned, address
        for name, array in inputs.items():
            self._memory[name][0].array[...] = array
        self.outputs = {name: self._memory[name][0].array for name in outputs}
        size = int(self._context.update_device_memory_size_for_shapes())
        if size:
            self._context.set_device_memory(self._allocated(size), size)

    def _allocated(self, size: int) -> int:
        """The address of new device memory, which `close` frees."""
        address = self._calls.malloc(size)
        self._addresses.append(address)
        return address

    def close(self) -> None:
        """Free everything."""
        with self._calls:
            del self._context, self._engine, self._runtime
            for address in self._addresses:
                self._calls.free(address)
            self._calls.destroy_event(self._event)
            self._calls.destroy_stream(self._stream)

    def run(self) -> None:
        """Copy the inputs to the device, run, copy the outputs back, and wait for them."""
        with self._calls:
            for name, (pinned, address) in self._memory.items():
                if name not in self.outputs:
                    self._calls.copy(address, pinned.pointer, pinned.array.nbytes, self._stream)
            self._must(self._context.execute_async_v3(self._stream), "it does not start")
            for name in self.outputs:
                pinned, address = self._memory[name]
                self._calls.copy(pinned.pointer, address, pinned.array.nbytes, self._stream)
            self._calls.record(self._event, self._stream)
            self._calls.wait(self._event)

    def _must(self, done: bool, what: str) -> None:
        self._errors.must(done, f"the plan in bare TensorRT: {what}", 0)


def plain_engine(
    folder: Path, library: str, rows: Sequence[EncodedRow], bucket: Bucket
) -> BarePlan:
    """The plan with all layers, which has these rows as its inputs."""
    manifest = read_manifest(folder)
    target = manifest.targets[target_in(folder, library)]
    ((name, file),) = target.files.items()
    graph: Graph = manifest.graphs_of(target)[name]
    padded = padded_inputs(rows, padding_values(manifest.tokenizer))
    inputs = {spec.name: padded[spec.name].astype(dtype_of(spec)) for spec in graph.inputs}
    outputs = {spec.name: (shape_of(spec, bucket), dtype_of(spec)) for spec in graph.outputs}
    profile = profile_for(target.profiles, bucket)
    assert profile is not None
    return BarePlan(folder / file.file, library, inputs, outputs, profile)


def packed_plan(folder: Path, library: str, rows: Sequence[EncodedRow], stop: int) -> BarePlan:
    """The packed plan, which has these rows as its inputs, all of which stop at one exit.

    Args:
        folder: holds `packed-LIBRARY`, see `fpabee-pack`.
        library: see `BarePlan`.
        rows: the rows.
        stop: the number of the exit.
    """
    packed = folder / f"packed-{library}"
    description = json.loads((packed / "fpabee.json").read_text(encoding="utf-8"))
    plan = description["plan"]
    values = padded_inputs(rows, padding_values(read_manifest(folder / "chain").tokenizer))
    values["attention_mask"] = np.ones_like(values["input_ids"])
    values |= description["settings"]
    values |= {"fpabee.max_exit": np.array(stop)}
    values["fpabee.thresholds"] = np.full_like(
        description["settings"]["fpabee.thresholds"], np.finfo(np.float32).min, np.float32
    )
    inputs = {
        each["name"]: np.asarray(values[each["name"]], each["dtype"]) for each in plan["inputs"]
    }
    outputs = {
        each["name"]: (
            tuple(len(rows) if size == "batch" else size for size in each["shape"]),
            np.dtype(each["dtype"]),
        )
        for each in plan["outputs"]
    }
    return BarePlan(packed / plan["file"], library, inputs, outputs)


def exact_rows(engine: Engine, folder: Path, bucket: Bucket) -> list[EncodedRow]:
    """Rows of exactly as many tokens, whose texts are repeated or cut."""
    rows = engine.core.encode(texts_of(folder)[: bucket.batch])
    ids = [np.resize(row.input_ids, bucket.sequence) for row in rows]
    return [EncodedRow(each, np.zeros_like(each), False) for each in ids]


def texts_of(folder: Path) -> list[str]:
    """The texts that are run."""
    return (folder / "texts.txt").read_text(encoding="utf-8").splitlines()


def measure(folder: Path, library: str, emit: Emit) -> None:
    """Time chain, packed plan and plain engine, and then compare the answers of the chain."""
    target = target_in(folder / "chain", library)
    if not target or not target_in(folder / "one", library):
        raise Skipped(f"there are no plans of {library} that can run here")
    with Engine.load(folder / "chain", target) as engine:
        last = engine.manifest.exits[-1]
        stops = {"all stop at exit 1": 1, "half-way": (last + 1) // 2, "never": last}
        for bucket in SHAPES:
            rows = exact_rows(engine, folder, bucket)
            with ExitStack() as stack:
                plain = closing(plain_engine(folder / "one", library, rows, bucket))
                runs: dict[str, Callable[[], Any]] = {
                    "plain engine": stack.enter_context(plain).run
                }
                for name, number in stops.items():
                    rule = Budget(exit=number)
                    runs[f"chain, {name}"] = partial(engine.run_encoded, rows, rule)
                    packed = closing(packed_plan(folder, library, rows, number))
                    runs[f"packed plan, {name}"] = stack.enter_context(packed).run
                for name, (p50, p99) in times(runs).items():
                    shape = f"{bucket.batch} x {bucket.sequence}"
                    emit(TIMES, library, name, shape, f"{p50:.3g}", f"{p99:.3g}")
        for check in (same_model, same_exits, same_logits, same_in_threads):
            what = (check.__doc__ or "").rstrip(".")
            words, good = check(engine, texts_of(folder))
            emit(CHECKS, library, what, words, GOOD if good else BAD)


def times(runs: Mapping[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Median and 99th percentile in ms; one runs after another, so that all see the same clocks."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + TIMED_SECONDS
    for number in range(RUNS + REPEATS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
        if number > RUNS and time.perf_counter() > until:
            break
    ms = {name: np.array(each[RUNS:]) * 1e3 for name, each in seconds.items()}
    return {name: (np.quantile(each, 0.5), np.quantile(each, 0.99)) for name, each in ms.items()}


def same_model(engine: Engine, texts: Sequence[str]) -> tuple[str, bool]:
    """The reference texts get the logits of the model that was exported."""
    try:
        return str(engine.check()), True
    except FpabeeError as error:
        return str(error), False


def same_exits(engine: Engine, texts: Sequence[str]) -> tuple[str, bool]:
    """Rows stop where a simulation of the rule stops them."""
    full = engine.trace(texts)
    rule = half_depth(engine, full.logits)
    task = engine.manifest.task
    expected = simulate(
        full.logits, rule, task.problem_type, task.label_thresholds, full.first_exit
    )
    different = int(np.count_nonzero(engine.trace(texts, rule=rule).exits != expected.exits))
    spread = len(set(expected.exits.tolist()))
    words = f"{different} of {len(texts)} rows stop elsewhere; {spread} exits are used"
    return words, bool(different <= MOST_DIFFERENT * len(texts))


def same_logits(engine: Engine, texts: Sequence[str]) -> tuple[str, bool]:
    """Rows that were gathered and joined have the logits of rows that were not."""
    full = engine.trace(texts).logits
    gathered = engine.trace(texts, rule=half_depth(engine, full)).logits
    difference = float(np.nanmax(np.abs(gathered - full)))
    return f"they differ by at most {difference:.2g}", difference <= MOST_DIFFERENCE


def same_in_threads(engine: Engine, texts: Sequence[str]) -> tuple[str, bool]:
    """Four threads get the answers of one."""

    def labels(_: int) -> list[Any]:
        return [row.labels for row in engine.predict(texts, full_depth=True)]

    started = time.perf_counter()
    expected = labels(0)
    between = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(labels, range(THREADS)))
    ended = time.perf_counter()
    pairs = (pair for each in answers for pair in zip(each, expected, strict=True))
    different = sum(a != b for a, b in pairs)
    speed = len(texts) / (between - started), THREADS * len(texts) / (ended - between)
    words = f"{different} labels differ; {speed[0]:.0f} texts/s, with threads {speed[1]:.0f}"
    return words, different <= MOST_DIFFERENT * THREADS * len(texts)


def half_depth(engine: Engine, logits: Any) -> Any:
    """The entropy rule that runs about half of the layers."""
    layers = engine.manifest.exit_layers
    task = engine.manifest.task.problem_type
    return threshold_for_depth(logits, Entropy(threshold=0.5), task, layers, layers[-1] / 2)


def serve(folder: Path, library: str, emit: Emit) -> None:
    """Send single texts to `fpabee-serve`; each client sends one as soon as it has an answer."""
    target = target_in(folder / "chain", library)
    if not target:
        raise Skipped(f"there are no plans of {library} that can run here")
    bodies = [json.dumps({"input": [text]}).encode() for text in texts_of(folder)]
    started = time.perf_counter()
    with served(str(folder / "chain"), ["--target", target]) as address:
        emit(NOTE, f"the server was ready after {time.perf_counter() - started:.1f} s")
        for clients in CLIENTS:
            answers = asyncio.run(Client(address).in_turns(bodies, clients, SERVED_SECONDS))
            ms = 1e3 * np.array([seconds for seconds, _ in answers] or [np.nan])
            speed = f"{len(answers) / SERVED_SECONDS:.0f}"
            quantiles = (f"{each:.3g}" for each in np.quantile(ms, (0.5, 0.99)))
            emit(SERVER, library, str(clients), speed, *quantiles)


def run_here(part: str, models: Path, size: str, results: Path) -> None:
    """Run a part in this process; appends a line of JSON to `results` for everything it finds."""
    name, library = (*part.split(), "")[:2]
    folder = models / size

    def emit(table: str, *cells: str) -> None:
        with results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([table, *cells]) + "\n")

    work = {
        "driver": partial(smoke, emit),
        "model": partial(make_model, folder, size, emit),
        "build": partial(build, folder, library, emit),
        "measure": partial(measure, folder, library, emit),
        "server": partial(serve, folder, library, emit),
    }
    # A few labels of random weights are nearly ties, and a lower precision changes them.
    lenient = {name: replace(r, labels=0.9, exits=0.5) for name, r in REQUIREMENTS.items()}
    try:
        if name not in ("driver", "model") and not is_engines_folder(folder / "one"):
            raise Skipped("the model was not made")
        with mock.patch.dict(REQUIREMENTS, lenient):
            work[name]()
    except (Skipped, ImportError) as error:
        emit(SKIPPED, str(error))


def run_part(part: str, output: Path, size: str, limit: float) -> tuple[str, str]:
    """Run a part in a process of its own; returns its state, and the reason if it is not done."""
    log = log_of(part, output)
    command = [sys.executable, __file__, "--output", str(output), "--size", size, "--part", part]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "stopped", f"it took longer than {limit:.0f} seconds"
        except KeyboardInterrupt:
            return INTERRUPTED, "the check was stopped"
        finally:
            # What it has started, such as a server, must not disturb the next part.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0:
        return "done", ""
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    ended = f"it was ended by signal {-code}" if code < 0 else f"it ended with code {code}"
    return "failed", ": ".join([ended, *last])


def log_of(part: str, output: Path) -> Path:
    """The log of a part; its results are beside it."""
    return output / "logs" / f"{part.replace(' ', '-')}.log"


def results_of(part: str, output: Path) -> list[list[str]]:
    """What a part has found so far."""
    path = log_of(part, output).with_suffix(".jsonl")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):  # the last one may be incomplete
            rows.append(json.loads(line))
    return rows


def write_report(rows: Sequence[Sequence[str]], output: Path) -> None:
    """Write the environment and the tables as `gpu_check.json` and `gpu_check.md`."""
    facts = environment() | {"providers": providers()}
    tables = {title: [cells for table, *cells in rows if table == title] for title in TABLES}
    record = {"environment": facts, "heads": TABLES, "tables": tables}
    text = ["# fpabee on a GPU", "", ", ".join(f"{key} {value}" for key, value in facts.items())]
    text += ["", "The model has random weights. Texts are timed without tokenization."]
    for title, heads in TABLES.items():
        text += ["", f"## {title}", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for cells in tables[title]:
            escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
            text.append(f"| {' | '.join(escaped)} |")
    (output / "gpu_check.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (output / "gpu_check.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def check(output: Path, size: str, seconds: float, no_gpu: str = "") -> list[str]:
    """Run parts, and write the report after each of them.

    Args:
        output: the folder for the report, logs and models.
        size: name of the model.
        seconds: time limit of the whole; those of its parts are in proportion.
        no_gpu: why nothing can run.

    Returns:
        What did not finish or is wrong.
    """
    until = time.monotonic() + seconds
    rows = list[list[str]]()
    bad = list[str]()
    done = list[str]()
    for part in PARTS:
        started = time.monotonic()
        limit = min(PARTS[part] / SECONDS * seconds, until - started)
        log_of(part, output).with_suffix(".jsonl").unlink(missing_ok=True)
        state = SKIPPED
        reason = no_gpu or "no time was left"
        if not no_gpu and limit >= LEAST_SECONDS:
            state, reason = run_part(part, output, size, limit)
        results = results_of(part, output)
        if state == "done" and results and results[-1][0] == SKIPPED:
            state = SKIPPED
            reason = results.pop()[1]
        notes = [cells[0] for table, *cells in results if table == NOTE]
        taken = f"{time.monotonic() - started:.0f} s"
        rows += [*results, [STATES, part, state, taken, "; ".join([reason] * bool(reason) + notes)]]
        write_report(rows, output)
        click.echo(f"{part}: {state} {reason}".rstrip())
        done += [part] if state == "done" else []
        bad += [part] if state not in ("done", SKIPPED) else []
        bad += [f"{cells[1]} ({cells[0]})" for table, *cells in results if BAD in cells]
        if state == INTERRUPTED:
            break
    measuring = {part for part in PARTS if part.startswith("measure")}
    if measuring and not no_gpu and measuring.isdisjoint(done):
        bad.append("nothing was measured")
    return bad


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="Folder to write.")
@click.option("--size", type=click.Choice(tuple(SIZES)), default="minilm", help="Of the model.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=SECONDS,
    show_default=True,
    help="Time limit of the whole; those of its parts are in proportion.",
)
@click.option(
    "--part",
    type=click.Choice(tuple(PARTS)),
    help="Run only this part, in this process. `model` needs no GPU: copy the output folder to a "
    "machine without PyTorch.",
)
def main(output: Path, size: str, seconds: float, part: str | None) -> None:
    """Check and measure fpabee on the GPU of this machine."""
    (output / "logs").mkdir(parents=True, exist_ok=True)
    if part is not None:
        run_here(part, output / "models", size, log_of(part, output).with_suffix(".jsonl"))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    no_gpu = cuda_device().error
    bad = check(output, size, seconds, no_gpu)
    click.echo(f"the report is {output / 'gpu_check.md'}")
    if bad:
        sys.exit(f"error: {', '.join(bad)}; see {output / 'logs'}")
    if no_gpu:
        sys.exit(f"error: nothing ran on a GPU: {no_gpu}")


if __name__ == "__main__":
    main()
