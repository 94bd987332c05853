#!/usr/bin/env python
"""The first hour on a GPU: does fpabee run on the GPU of this machine, and how fast?

    pip install -e '.[cpu,export,serve,tensorrt-rtx-cu13]' filelock hypothesis pytest
    python scripts/gpu_check.py

It makes a model with random weights, whose labels mean nothing but whose speed is that of a trained
one. Then, for TensorRT for RTX and for TensorRT, as far as they are installed, it builds plans,
times a plan without exits, the packed plan and the chain, sends texts to a server, and compares the
packed plan with the chain. It measures first and judges afterwards.

Each part runs in a process of its own, and leaves the time that it does not need to those after it.
`gpu_check.md` and `gpu_check.json` are written after each of them, also with what a part had found
when it failed, took too long or was stopped with Ctrl-C. What cannot run here is skipped. The exit
code is 1 if nothing was measured, a part did not finish, or a check failed. The next run keeps what
was made and built. Only the part `model` needs PyTorch, filelock, hypothesis and pytest.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
from bare_plan import BarePlan
from load_test import POSITIVE, Client, served
from one_graph import write_one_graph

from fpabee.calibration import threshold_for_depth
from fpabee.exporter.single_file import pack
from fpabee.exporter.staging import staging
from fpabee.exporter.targets import PlanOptions, build_targets
from fpabee.exporter.targets.backends import RTX, TENSORRT
from fpabee.exporter.targets.builders import BUILDERS
from fpabee.exporter.targets.plans import RTX_CAPABILITIES
from fpabee.runtime import Bucket, Budget, Engine, ExitRule, read_manifest, simulate
from fpabee.runtime.artifact.folder import is_engines_folder
from fpabee.runtime.backends.cuda import cuda
from fpabee.runtime.check import REQUIREMENTS, logit_differences
from fpabee.runtime.encoding import Arrays, EncodedRow, TextEncoder
from fpabee.runtime.machine import cuda_device, environment, providers
from fpabee.runtime.targets import why_not

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "gpu_check"
SHAPES = (Bucket(1, 16), Bucket(1, 128), Bucket(16, 64))  # ascending, within those of plans
TIMED_SECONDS = 2.0  # for each shape
LEAST_ROUNDS = 5  # the first one does not count
QUANTILES = (0.5, 0.99)
SERVED_SECONDS = 5.0  # for each number of clients
CLIENTS = (1, 64)
DEPTHS = (0.5, 0.4)  # of all layers, at the operating points whose answers are compared
MOST_DIFFERENT = 0.01  # of the rows; near ties may end otherwise in fp16
MOST_DIFFERENCE = 0.05  # of the size of the logits: other kernels run for other shapes, in fp16
PARTS = {
    "model": 110.0,
    **{f"build {RTX}": 80.0, f"measure {RTX}": 85.0, f"server {RTX}": 55.0},
    **{f"build {TENSORRT}": 130.0, f"measure {TENSORRT}": 80.0, f"server {TENSORRT}": 60.0},
}
"""Seconds that are kept for each part of 600: estimates for a desktop GPU."""
TABLES = {
    "Times": ("library", "what", "rows x tokens", "p50 ms", "p99 ms"),
    "First times": ("library", "what", "step", "ms", "MiB of the GPU since loading began"),
    "Checks": ("library", "check", "found", "verdict"),
    "Parts": ("part", "state", "seconds", "reason"),
}
TIMES, FIRST, CHECKS, STATES = TABLES
DONE = "done"
SKIPPED = "skipped"
INTERRUPTED = "interrupted"
GOOD = "good"
BAD = "BAD"

Findings = Iterable[Sequence[str | float]]
"""Rows of what a part finds, each the name of a table and its cells."""
Rows = Sequence[EncodedRow]
Run = Callable[[], Arrays]
"""Gives `logits` `[rows, labels]` and `exit` `[rows]` of some rows."""


def make_model(folder: Path, library: str) -> Findings:
    """The engines folder `chain`, and `one` with all layers in one segment; both with fp16."""
    if is_engines_folder(folder / "one"):
        return ()  # it was made before
    sys.path.insert(0, str(ROOT))
    from tests.conftest import WORDS
    from tests.conftest import make_model as make

    from fpabee.exporter import ExportOptions, export

    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(500)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    sizes: Any = {"num_attention_heads": 12, "max_position_embeddings": 128}
    make("bert", folder / "model", width=384, layers=6, intermediate_size=1536, **sizes)
    export(folder / "model", folder / "chain", ExportOptions(force=True))
    build_targets(folder / "chain", ["onnxruntime-fp16-cuda"])
    with staging(folder / "one") as new:
        write_one_graph(folder / "chain", new)
    return ()


def build(folder: Path, library: str) -> Findings:
    """The plans of the chain, and of the packed graph without exits and with them."""
    name = f"{library}-fp16"
    options = PlanOptions()
    if library == RTX:
        options = PlanOptions(compute_capabilities=(cuda_device().compute_capability,))
    plans = {f"plain-{library}": "one", f"packed-{library}": "chain"}
    if not target_in(folder, library):
        for packed in plans:  # for another GPU or version of the library, if there are any
            shutil.rmtree(folder / packed, ignore_errors=True)
        built, ms = timed(partial(build_targets, folder / "chain", [name], plans=options))
        if name in built.refused:
            raise built.refused[name]
        yield FIRST, library, "chain", "build", ms, ""
    options = replace(options, batch=(1, 1, 32))  # as fpabee-pack does
    for packed, source in plans.items():
        if not (folder / packed).exists():
            _, ms = timed(partial(pack, folder / source, folder / packed, name, plans=options))
            yield FIRST, library, packed, "build", ms, ""


def target_in(folder: Path, library: str) -> str:
    """The target of the chain that can run here; empty if there is none."""
    manifest = read_manifest(folder / "chain")
    names = (name for name, target in manifest.targets.items() if target.backend == library)
    return next((name for name in names if not why_not(manifest, name)), "")


def texts_of(folder: Path) -> list[str]:
    """The texts that are run."""
    return (folder / "texts.txt").read_text(encoding="utf-8").splitlines()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of some work, and the milliseconds that it took."""
    started = time.perf_counter()
    result = work()
    return result, 1e3 * (time.perf_counter() - started)


def prepared(way: Engine | BarePlan, rows: Rows, rule: ExitRule) -> Run:
    """The function that runs rows with a rule; an `Engine` is the chain."""
    if isinstance(way, BarePlan):
        return way.prepare(rows, rule)

    def run() -> Arrays:
        trace = way.run_encoded(rows, rule)
        return at_exits(trace.logits, trace.exits)

    return run


def measure(folder: Path, library: str) -> Findings:
    """Time the plan without exits, the packed plan and the chain, and then judge the answers."""
    manifest = read_manifest(folder / "chain")
    rows = TextEncoder(folder / "chain", manifest.tokenizer).encode(texts_of(folder))
    exact = {f"{shape.batch} x {shape.sequence}": exact_rows(rows, shape) for shape in SHAPES}
    never = ExitRule.from_dict(manifest.default_rule).with_stop_threshold(0.0)
    last = manifest.exits[-1]
    stops = {"never": last, "half-way": (last + 1) // 2, "all stop at exit 1": 1}
    loads: dict[str, Callable[[], Any]] = {
        "without exits": partial(BarePlan, folder / f"plain-{library}", library, manifest, SHAPES),
        "packed plan": partial(BarePlan, folder / f"packed-{library}", library, manifest, SHAPES),
        "chain": partial(Engine.load, folder / "chain", target_in(folder, library)),
    }
    with ExitStack() as stack:
        ways: dict[str, Any] = {}
        for name, load in loads.items():
            before = used_memory()
            ways[name], ms = timed(load)
            stack.callback(ways[name].close)
            yield FIRST, library, name, "load", ms, used_memory() - before
            for shape, some in exact.items():
                _, ms = timed(prepared(ways[name], some, never))
                yield FIRST, library, name, shape, ms, used_memory() - before
        for shape, some in exact.items():
            runs = {"without exits": prepared(ways["without exits"], some, never)}
            for name in ("packed plan", "chain"):
                for stop, number in stops.items():
                    runs[f"{name}, {stop}"] = prepared(ways[name], some, never.capped(number))
            for name, quantiles in times(runs).items():
                yield TIMES, library, name, shape, *quantiles
        for check in judged(ways["chain"], ways["packed plan"], rows):
            yield CHECKS, library, *check


def exact_rows(rows: Rows, shape: Bucket) -> list[EncodedRow]:
    """Rows of exactly this shape, which are repeated or cut."""
    ids = [np.resize(row.input_ids, shape.sequence) for row in rows[: shape.batch]]
    return [EncodedRow(each, np.zeros_like(each), False) for each in ids]


def used_memory() -> float:
    """Used memory of the device, in MiB."""
    with cuda(0):
        free, total = cuda(0).memory()
    return (total - free) / 2**20


def times(runs: Mapping[str, Run]) -> dict[str, list[float]]:
    """Median and 99th percentile in ms; one runs after another, so that all see the same clocks."""
    ms: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + TIMED_SECONDS
    while time.perf_counter() < until or min(map(len, ms.values())) < LEAST_ROUNDS:
        for name, run in runs.items():
            ms[name].append(timed(run)[1])
    return {name: np.quantile(each[1:], QUANTILES).tolist() for name, each in ms.items()}


def judged(chain: Engine, packed: BarePlan, rows: Rows) -> Findings:
    """The comparisons: each with its name, its finding, and the verdict."""
    layers = chain.manifest.exit_layers
    task = chain.manifest.task.problem_type
    full = chain.run_encoded(rows, Budget(exit=len(layers))).logits
    rules = {"stopped half-way": chain.rule.capped((len(layers) + 1) // 2)}
    for depth in DEPTHS:
        rule = threshold_for_depth(full, chain.rule, task, layers, depth * layers[-1])
        rules[f"at {depth:.0%} of the depth"] = rule
    for at, rule in rules.items():
        expected = at_exits(full, simulate(full, rule, task).exits)
        answers = prepared(chain, rows, rule)()
        yield f"The chain stops where its logits say, {at}", *compared(answers, expected)
        for size, how in ((1, "alone"), (SHAPES[-1].batch, "in a batch")):
            answers, expected = (in_batches(way, rows, rule, size) for way in (packed, chain))
            check = f"The packed plan answers texts {how} as the chain does, {at}"
            yield check, *compared(answers, expected)
    yield "The chain answers as the model does in PyTorch", str(chain.check()), GOOD


def at_exits(logits: Any, exits: Any) -> Arrays:
    """The answers of rows that stop at some exits, of logits `[exits, rows, labels]`."""
    return {"logits": logits[exits - 1, np.arange(len(exits))], "exit": exits}


def in_batches(way: Engine | BarePlan, rows: Rows, rule: ExitRule, size: int) -> Arrays:
    """The answers of rows that are run in batches of this size."""
    starts = range(0, len(rows), size)
    parts = [prepared(way, rows[start : start + size], rule)() for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def compared(answers: Arrays, expected: Arrays) -> tuple[str, str]:
    """How answers differ from others, and whether rounding in fp16 explains it."""
    same = answers["exit"] == expected["exit"]
    elsewhere = int(np.count_nonzero(~same))
    differences = logit_differences(answers["logits"], expected["logits"])
    largest = float(differences[same].max(initial=0.0))
    found = (
        f"{elsewhere} of {len(same)} rows stop elsewhere, {len({*expected['exit']})} exits are used"
        f"; logits at equal exits differ by at most {largest:.2g} of their size"
    )
    good = elsewhere <= MOST_DIFFERENT * len(same) and largest <= MOST_DIFFERENCE
    return found, GOOD if good else BAD


def serve(folder: Path, library: str) -> Findings:
    """Send single texts to `fpabee-serve`; each client sends one as soon as it has an answer."""
    bodies = [json.dumps({"input": [text]}).encode() for text in texts_of(folder)]
    started = time.perf_counter()
    with served(str(folder / "chain"), ["--target", target_in(folder, library)]) as address:
        yield FIRST, library, "server", "start", 1e3 * (time.perf_counter() - started), ""
        for clients in CLIENTS:
            answers = asyncio.run(Client(address).in_turns(bodies, clients, SERVED_SECONDS))
            ms = [1e3 * seconds for seconds, _ in answers] or [np.nan]
            name = f"server, {clients} clients: {len(answers) / SERVED_SECONDS:.0f} texts/s"
            yield TIMES, library, name, "1 x any", *np.quantile(ms, QUANTILES).tolist()


def why_skipped(part: str) -> str:
    """Why this machine cannot run a part; empty if it can."""
    gpu = cuda_device()
    _, _, library = part.partition(" ")
    if gpu.error or not library:
        return gpu.error
    if library == RTX and gpu.compute_capability not in RTX_CAPABILITIES:
        return f"TensorRT for RTX does not support compute capability {gpu.compute_capability}"
    return str(BUILDERS[f"{library}-fp16"].why_not() or "")


WORK = {"model": make_model, "build": build, "measure": measure, "server": serve}


def run_part(part: str, output: Path, limit: float) -> tuple[str, str, list[Any]]:
    """Run a part in a process of its own; returns its state, why it ended, and what it found."""
    path = output / "logs" / f"{part.replace(' ', '-')}.log"
    command = [sys.executable, __file__, "--output", str(output), "--part", part]
    with path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(limit)
            state = f"failed with code {code}" if code else DONE
        except subprocess.TimeoutExpired:
            state = f"stopped after {limit:.0f} s"
        except KeyboardInterrupt:
            state = INTERRUPTED
        finally:
            # What it has started, such as a server, must not disturb the next part.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    findings = [line for line in lines if line.startswith('["') and line.endswith("]")]
    messages = [line for line in lines if line not in findings and state != DONE]
    return state, "".join(messages[-1:]), [json.loads(line) for line in findings]


def write_report(rows: Findings, output: Path) -> None:
    """Write the environment and the tables as `gpu_check.json` and `gpu_check.md`."""
    facts = environment() | {"providers": providers()}
    tables = {title: [cells for table, *cells in rows if table == title] for title in TABLES}
    record = {"environment": facts, "heads": TABLES, "tables": tables}
    text = ["# fpabee on a GPU", "", ", ".join(f"{key} {value}" for key, value in facts.items())]
    text += ["", "Random weights, no tokenization; what loads first also starts the library."]
    for title, heads in TABLES.items():
        text += ["", f"## {title}", "", f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for cells in tables[title]:
            words = (f"{cell:.3g}" if isinstance(cell, float) else cell for cell in cells)
            text.append(f"| {' | '.join(word.replace('|', '/') for word in words)} |")
    (output / "gpu_check.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    (output / "gpu_check.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def check(output: Path, seconds: float) -> list[str]:
    """Run all parts, and write the report after each; returns what did not finish or is wrong.

    Each part that can run here has its share of the time, and all that earlier parts did not need.
    """
    until = time.monotonic() + seconds
    reasons = {part: why_skipped(part) for part in PARTS}
    shares = {part: share for part, share in PARTS.items() if not reasons[part]}
    scale = seconds / max(1, sum(shares.values()))
    rows: list[Sequence[str | float]] = []
    bad: list[str] = []
    for part, reason in reasons.items():
        started = time.monotonic()
        shares.pop(part, None)
        limit = until - started - scale * sum(shares.values())
        state = SKIPPED
        findings: list[Any] = []
        if not reason:
            state, reason, findings = run_part(part, output, limit)
        rows += [*findings, [STATES, part, state, f"{time.monotonic() - started:.0f}", reason]]
        write_report(rows, output)
        click.echo(f"{part}: {state} {reason}".rstrip())
        bad += [part] if state not in (DONE, SKIPPED) else []
        bad += [f"{check} ({library})" for _, library, check, *_, found in findings if found == BAD]
        if state == INTERRUPTED:
            break
    if not any(table == TIMES for table, *_ in rows):
        bad.append("nothing was measured")
    return bad


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="Folder to write.")
@click.option("--seconds", type=POSITIVE, default=600.0, show_default=True, help="Time limit.")
@click.option(
    "--part",
    type=click.Choice(tuple(PARTS)),
    help="Run only this part, in this process. `model` needs no GPU: copy the output folder to a "
    "machine without PyTorch.",
)
def main(output: Path, seconds: float, part: str | None) -> None:
    """Check and measure fpabee on the GPU of this machine."""
    (output / "logs").mkdir(parents=True, exist_ok=True)
    if part is not None:
        # A few labels of random weights are nearly ties, and a lower precision changes them.
        lenient = {name: replace(r, labels=0.9, exits=0.5) for name, r in REQUIREMENTS.items()}
        name, _, library = part.partition(" ")
        with mock.patch.dict(REQUIREMENTS, lenient):
            for row in WORK[name](output / "models", library):
                click.echo(json.dumps(row))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    bad = check(output, seconds)
    click.echo((output / "gpu_check.md").read_text(encoding="utf-8"))
    if bad:
        sys.exit(f"error: {cuda_device().error or ', '.join(bad)}; see {output / 'logs'}")


if __name__ == "__main__":
    main()
