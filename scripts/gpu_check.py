#!/usr/bin/env python
"""Check and measure fpabee on the GPU of this machine.

    pip install -e '.[export,gpu-cu13,tensorrt-cu13]' pytest hypothesis filelock
    python scripts/gpu_check.py

It makes models with random weights, whose labels mean nothing but whose speed is that of trained
ones, builds plans, compares them with the runner of NVIDIA's Polygraphy, runs the tests marked
`gpu`, and measures. Each part runs in a process of its own with a time limit: one that crashes or
takes too long keeps what it had measured, and the models and plans that it had made. What cannot
run here is skipped, with the reason. The exit code is 1 if there is no GPU, or if a part failed or
was stopped; `gpu_check.md` and a log of each part are written all the same.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
from one_graph import write_one_graph

from fpabee.calibration import threshold_for_depth
from fpabee.exporter.onnx_file import graph_runs
from fpabee.exporter.staging import staging
from fpabee.exporter.targets import PlanOptions, build_targets
from fpabee.exporter.targets.backends import RTX, TENSORRT
from fpabee.exporter.targets.builders import BUILDERS
from fpabee.exporter.targets.tensorrt import TIMING_CACHE
from fpabee.runtime import Bucket, Budget, Engine, Entropy, ExitRule, read_manifest
from fpabee.runtime.artifact.folder import is_engines_folder
from fpabee.runtime.artifact.manifest import Graph, TensorSpec
from fpabee.runtime.backends.base import dtype_of
from fpabee.runtime.check import REQUIREMENTS
from fpabee.runtime.encoding import Arrays, EncodedRow, padded_inputs, padding_values
from fpabee.runtime.machine import cuda_device, environment, providers
from fpabee.runtime.targets import why_not

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "gpu_check"
SECONDS = 525.0
# The time limit of each part, if the whole has so many seconds. What a part leaves over is for the
# parts after it. The small model comes first. The limits are estimates for a fast device: each plan
# is built in a process of its own, and TensorRT times kernels for six profiles.
PARTS = {
    "model minilm": 100.0,
    "plans minilm fp16": 140.0,
    "tests": 150.0,
    "onnxruntime minilm fp16": 30.0,
    "model base": 170.0,
    "plans base fp16": 220.0,
    "onnxruntime base fp16": 40.0,
}
LEAST_SECONDS = 5.0  # a part is not started if less time is left

SIZES = {
    "minilm": {"layers": 6, "width": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "base": {"layers": 12, "width": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
TOKENS = (16, 32, 128)  # lengths at which single texts are timed
LONGEST = 128
FILE_TEXTS = 2000
TEST_PACKAGES = ("pytest", "hypothesis", "filelock", "onnx", "torch", "transformers")
PLANS = PlanOptions(batch=(1, 8, 32), sequence=(16, 32, LONGEST))

ENGINE = "one engine"
CHAIN = "chain"
WITH_RULE = "chain with a rule at half depth"
TABLES = {
    "Times": (
        *("model", "runs on", "what"),
        *(f"{tokens} tokens: p50 / p99 in ms" for tokens in TOKENS),
        "texts/s of a file",
    ),
    "Largest difference of a logit from Polygraphy's runner": (
        *("model", "runs on", "what", "at each exit", "verdict"),
    ),
    "Parts": ("part", "state", "time", "remarks"),
}
TIMES, DIFFERENCES, STATES = TABLES
RUNS = 3  # the first ones warm up
# texts of each length, and how often each is timed
ROWS = 32
REPEATS = 20
MEASURE_SECONDS = 4.0
# Both run the same kernels on the same inputs, so only sums in another order may differ.
MOST_DIFFERENCE = 0.01

Emit = Callable[..., None]
"""Called with the name of a table and the cells of a row; a note is a row of the table NOTE."""
NOTE = "note"
SKIPPED = "skipped"
Run = Callable[[Sequence[EncodedRow]], Any]


class Skipped(Exception):  # noqa: N818
    """A part cannot run here."""


def tests(root: Path, emit: Emit) -> None:
    """The tests marked `gpu` of a checkout; only files that have any, as others need more packages.

    Raises:
        CalledProcessError: a test failed.
    """
    missing = [name for name in TEST_PACKAGES if util.find_spec(name) is None]
    if missing:
        raise Skipped(f"the tests need {', '.join(missing)}")
    files = (root / "tests").rglob("test_*.py")
    marked = [str(path) for path in files if "pytest.mark.gpu" in path.read_text("utf-8")]
    # A warning of a library on this machine, which nobody has seen before, must not fail a test.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default"]
    command += ["-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *marked], cwd=root, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    emit(NOTE, (done.stdout.strip().splitlines() or ["no output"])[-1])
    done.check_returncode()


def make_models(folder: Path, emit: Emit) -> None:
    """The engines folder `chain`, and `one` with all layers in one segment."""
    chain = folder / "chain"
    one = folder / "one"
    if is_engines_folder(one) and "fp16" in read_manifest(one).precisions:
        raise Skipped("the model was made before")
    sys.path.insert(0, str(ROOT))
    from tests.conftest import WORDS, make_model

    from fpabee.exporter import ExportOptions, export

    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(folder.name)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(FILE_TEXTS)]
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    sizes = SIZES[folder.name]
    make_model("bert", folder / "model", max_position_embeddings=LONGEST, **sizes)
    export(folder / "model", chain, ExportOptions(force=True))
    build_targets(chain, ["onnxruntime-fp16-cuda"])
    with staging(one) as new:
        write_one_graph(chain, new)


def plans(folder: Path, precision: str, emit: Emit) -> None:
    """Build plans of TensorRT, or of TensorRT for RTX, and compare and measure them."""
    names = [f"{backend}-{precision}" for backend in (TENSORRT, RTX)]
    target = next((name for name in names if BUILDERS[name].why_not() is None), None)
    if target is None:
        raise Skipped(str(BUILDERS[names[0]].why_not()))
    if precision not in read_manifest(folder / "chain").precisions:
        raise Skipped(f"the model has no {precision} graphs")
    options = replace(PLANS, compute_capabilities=(cuda_device().compute_capability,))
    targets: list[str] = []
    # Plans are kept if all of a folder are done, and timings in any case. The one large plan takes
    # longest, so it comes last, and begins with the timings of the same layers.
    for name in ("chain", "one"):
        started = time.perf_counter()
        built = build_targets(folder / name, [target], plans=options)
        if built.refused:
            raise built.refused[target]
        targets += built.added
        emit(NOTE, f"{name} was built in {time.perf_counter() - started:.0f} s")
        cache = folder / "chain" / "targets" / targets[0] / TIMING_CACHE
        if name == "chain" and cache.is_file():
            home = folder / "one" / "targets" / targets[0]
            home.mkdir(parents=True, exist_ok=True)
            shutil.copy(cache, home)
    agrees = judge(folder, targets[0], emit)
    measure(folder, targets[0], emit)
    if not agrees:
        sys.exit("the logits differ from those of Polygraphy's runner")


class PlanSession:
    """A plan in Polygraphy's runner, with the methods of a session that `graph_runs` calls.

    The runner has memory and streams of its own, and copies everything to the host in between. It
    knows nothing of our buffers, contexts and CUDA graphs, so it is an independent judge of them.
    """

    def __init__(self, engine: Engine, folder: Path, bucket: Bucket, graph: str) -> None:
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        backend: Any = engine.core.backend
        self._graph: Graph = backend.graphs[graph]
        plan = folder / backend.target.files[graph].file
        # Plans of TensorRT for RTX have no scratch memory of their own, so the runner allocates it.
        self._runner = TrtRunner(
            EngineFromBytes(BytesFromPath(str(plan))),
            optimization_profile=backend._profile(bucket),
            allocation_strategy="runtime",
        )

    def get_inputs(self) -> Sequence[TensorSpec]:
        """The inputs of the graph."""
        return self._graph.inputs

    def get_outputs(self) -> Sequence[TensorSpec]:
        """The outputs of the graph."""
        return self._graph.outputs

    def run(self, names: Sequence[str], inputs: Arrays) -> list[Any]:
        """Run the plan once; returns copies of the outputs, in the order of their names."""
        feed = {
            spec.name: np.ascontiguousarray(inputs[spec.name], dtype_of(spec))
            for spec in self._graph.inputs
        }
        with self._runner as runner:
            outputs = runner.infer(feed)
            return [np.array(outputs[name]) for name in names]


def judge(folder: Path, target: str, emit: Emit) -> bool:
    """Compare logits with Polygraphy's, of one row at each length and of several rows.

    Returns:
        Whether they are equal.
    """
    check_target(folder, target)
    if target.startswith(RTX):
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # it is read when Polygraphy is imported
    agrees = True
    for name, variant in (("one", ENGINE), ("chain", CHAIN)):
        with Engine.load(folder / name, target) as engine:
            batches = [exact_rows(engine, folder, tokens)[0] for tokens in TOKENS]
            batches.append([row for (row,) in exact_rows(engine, folder, TOKENS[0])[:8]])
            exits = np.max([_differences(engine, folder / name, rows) for rows in batches], axis=0)
        equal = bool((exits <= MOST_DIFFERENCE).all())
        verdict = "equal" if equal else "**they differ**"
        written = ", ".join(f"{difference:.1e}" for difference in exits)
        emit(DIFFERENCES, variant, written, verdict)
        agrees = agrees and equal
    return agrees


def _differences(engine: Engine, folder: Path, rows: Sequence[EncodedRow]) -> list[float]:
    """The largest difference of a logit at each exit."""
    bucket = Bucket(len(rows), len(rows[0]))  # a shape that our runtime does not pad
    inputs = padded_inputs(rows, padding_values(engine.manifest.tokenizer))
    runs = graph_runs(engine.manifest, [inputs], partial(PlanSession, engine, folder, bucket))
    judged = [run.outputs["logits"] for run in runs if "logits" in run.outputs]
    ours = [full_depth(engine)(rows).logits[-len(judged) :] for _ in range(RUNS)]
    differences = np.abs(np.array(ours, np.float64) - np.array(judged, np.float64))
    return [float(each) for each in np.nan_to_num(differences, nan=np.inf).max(axis=(0, 2, 3))]


def check_target(folder: Path, target: str) -> None:
    """Raise `Skipped` if a target cannot run here in the folders `one` and `chain`."""
    for name in ("one", "chain"):
        manifest = read_manifest(folder / name)
        if target not in manifest.targets:
            raise Skipped(f"the engines folder {name} has no target {target}")
        if error := why_not(manifest, target):
            raise Skipped(str(error))


def measure(folder: Path, target: str, emit: Emit) -> None:
    """Measure a target of the folders `one` and `chain`, and compare it with PyTorch."""
    check_target(folder, target)
    with ExitStack() as stack:
        one, chain = (
            stack.enter_context(Engine.load(folder / name, target)) for name in ("one", "chain")
        )
        emit(NOTE, f"{target} reproduces the exported model: {chain.check()}")
        rule: ExitRule = Entropy(threshold=0.5)
        rows: dict[str, list[str]] = {ENGINE: [], CHAIN: [], WITH_RULE: []}
        for tokens in TOKENS:
            batches = exact_rows(chain, folder, tokens)
            rule = at_half_depth(chain, [row for (row,) in batches])
            runs = full_depth(one), full_depth(chain), partial(chain.run_encoded, rule=rule)
            for cells, cell in zip(rows.values(), times(runs, batches), strict=True):
                cells.append(cell)
        used = (one, last_exit(one)), (chain, last_exit(chain)), (chain, rule)
        for (name, cells), (engine, its_rule) in zip(rows.items(), used, strict=True):
            emit(TIMES, name, *cells, texts_per_second(engine, _texts(folder), its_rule))


def _texts(folder: Path) -> list[str]:
    return (folder / "texts.txt").read_text(encoding="utf-8").splitlines()


def exact_rows(engine: Engine, folder: Path, tokens: int) -> list[list[EncodedRow]]:
    """Batches of one row of exactly `tokens` tokens, which is repeated or cut."""
    rows = engine.core.encode(_texts(folder)[:ROWS])
    ids = [np.resize(row.input_ids, tokens) for row in rows]
    return [[EncodedRow(each, np.zeros_like(each), False)] for each in ids]


def last_exit(engine: Engine) -> ExitRule:
    """The rule that runs all layers."""
    return Budget(exit=engine.manifest.exits[-1])


def full_depth(engine: Engine) -> Run:
    """Runs tokenized rows to the last exit."""
    return partial(engine.run_encoded, rule=last_exit(engine))


def at_half_depth(engine: Engine, rows: Sequence[EncodedRow]) -> ExitRule:
    """The entropy rule that runs about half of the layers on these rows."""
    layers = engine.manifest.exit_layers
    task = engine.manifest.task.problem_type
    logits = full_depth(engine)(rows).logits
    start = Entropy(threshold=0.5)
    return threshold_for_depth(logits, start, task, layers, layers[-1] / 2)


def times(runs: Sequence[Run], batches: Sequence[Sequence[EncodedRow]]) -> list[str]:
    """Time runs one after another on each batch, so that all see the same clock rates."""
    seconds: list[list[float]] = [[] for _ in runs]
    for batch in batches[: RUNS + 1]:
        for run in runs:
            run(batch)
    until = time.perf_counter() + MEASURE_SECONDS
    for repeat in range(REPEATS):
        for batch in batches:
            for run, measured in zip(runs, seconds, strict=True):
                started = time.perf_counter()
                run(batch)
                measured.append(time.perf_counter() - started)
        if repeat and time.perf_counter() > until:
            break
    quantiles = (np.quantile(measured, (0.5, 0.99)) * 1e3 for measured in seconds)
    return [f"{p50:.3g} / {p99:.3g}" for p50, p99 in quantiles]


def texts_per_second(engine: Engine, texts: Sequence[str], rule: ExitRule) -> str:
    """Of a file, tokenization included: the better of two runs after a first one."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        list(engine.stream(texts, rule=rule))
        seconds.append(time.perf_counter() - started)
    return f"{len(texts) / min(seconds[1:]):.0f}"


def run_here(name: str, models: Path, results: Path) -> None:
    """Run a part in this process; appends a line of JSON to `results` for everything it finds."""
    part, size, precision = (*name.split(), "", "")[:3]

    def emit(table: str, *cells: str) -> None:
        where = () if table in (NOTE, SKIPPED) else (size, f"{part} {precision}")
        with results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([table, *where, *cells]) + "\n")

    # A few labels of random weights are nearly ties, and a lower precision changes them.
    lenient = {name: replace(r, labels=0.9, exits=0.5) for name, r in REQUIREMENTS.items()}
    folder = models / size
    try:
        with mock.patch.dict(REQUIREMENTS, lenient):
            if part == "tests":
                tests(ROOT, emit)
            elif part == "model":
                make_models(folder, emit)
            elif not is_engines_folder(folder / "one"):
                raise Skipped(f"the model {size} was not made")
            elif part == "plans":
                plans(folder, precision, emit)
            else:
                measure(folder, f"onnxruntime-{precision}-cuda", emit)
    except (Skipped, ImportError) as error:
        emit(SKIPPED, str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(f"pytest ended with code {error.returncode}")


def run_part(name: str, output: Path, limit: float) -> tuple[str, str, list[list[str]]]:
    """Run a part in a process of its own.

    Returns:
        Its state (`done`, `skipped`, `failed`, or `stopped` at the time limit), the reason, and the
        rows that it has reported.
    """
    log = output / "logs" / f"{name.replace(' ', '-')}.log"
    results = log.with_suffix(".jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--output", str(output), "--part", name]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            state, reason = ("done", "") if code == 0 else ("failed", _reason(log, code))
        except subprocess.TimeoutExpired:
            state = "stopped"
            reason = f"it took longer than {limit:.0f} seconds"
        finally:
            # What it has started, such as a builder of plans, must not disturb the next part.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    rows = []
    for line in lines:
        with suppress(json.JSONDecodeError):  # the last one may be incomplete
            rows.append(json.loads(line))
    if state == "done" and rows and rows[-1][0] == SKIPPED:
        state = SKIPPED
        reason = rows.pop()[1]
    return state, reason, rows


def _reason(log: Path, code: int) -> str:
    """The last line that a failed part printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    ended = f"it was ended by signal {-code}" if code < 0 else f"it ended with code {code}"
    return f"{ended}: {lines[-1]}" if lines else ended


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The report: the environment and tables."""
    found = environment() | {"providers": providers()}
    text = ["# fpabee on a GPU", "", ", ".join(f"{key} {value}" for key, value in found.items())]
    text += ["", "Models have random weights. Single texts are timed without tokenization."]
    for title, heads in TABLES.items():
        text += ["", f"## {title}", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for table, *cells in rows:
            if table == title:
                escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
                text.append(f"| {' | '.join(escaped)} |")
    return "\n".join(text) + "\n"


def check(output: Path, seconds: float, names: Sequence[str], no_gpu: str = "") -> dict[str, str]:
    """Run parts, and write the report after each of them.

    Args:
        output: the folder for the report, logs and models.
        seconds: time limit of the whole; those of its parts are in proportion.
        names: the parts, in order.
        no_gpu: why nothing can run.

    Returns:
        The state of each part.
    """
    until = time.monotonic() + seconds
    rows = list[list[str]]()
    states = dict[str, str]()
    output.mkdir(parents=True, exist_ok=True)
    for name in names:
        started = time.monotonic()
        limit = min(PARTS[name] / SECONDS * seconds, until - started)
        state = SKIPPED
        reason = no_gpu or "no time was left"
        found = list[list[str]]()
        if not no_gpu and limit >= LEAST_SECONDS:
            state, reason, found = run_part(name, output, limit)
        remarks = "; ".join([reason] * bool(reason) + [row[1] for row in found if row[0] == NOTE])
        taken = f"{time.monotonic() - started:.0f} s"
        rows += [*found, [STATES, name, state, taken, remarks]]
        states[name] = state
        click.echo(f"{name}: {state} {reason}".rstrip())
        (output / "gpu_check.md").write_text(markdown(rows), encoding="utf-8")
    return states


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="Folder to write.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=SECONDS,
    show_default=True,
    help="Time limit of the whole; those of its parts are in proportion.",
)
@click.option(
    "--prepare",
    is_flag=True,
    help="Only make the models, which needs no GPU. Copy the output folder to a machine without "
    "PyTorch.",
)
@click.option("--part", type=click.Choice(tuple(PARTS)), hidden=True)
def main(output: Path, seconds: float, prepare: bool, part: str | None) -> None:
    """Check and measure fpabee on the GPU of this machine."""
    if part is not None:
        log = output / "logs" / f"{part.replace(' ', '-')}.jsonl"
        run_here(part, output / "models", log)
        return
    names = [name for name in PARTS if name.startswith("model ") or not prepare]
    no_gpu = "" if prepare else cuda_device().error
    states = check(output, seconds, names, no_gpu)
    click.echo(f"the report is {output / 'gpu_check.md'}")
    bad = [name for name, state in states.items() if state in ("failed", "stopped")]
    if bad:
        sys.exit(
            f"error: {', '.join(bad)} did not finish; see {output / 'logs'}. The next run keeps "
            "the models and plans that were made"
        )
    if no_gpu:
        sys.exit(f"error: nothing ran on a GPU: {no_gpu}")


if __name__ == "__main__":
    main()
