#!/usr/bin/env python
"""What `scripts/gpu_check` runs: parts, each in a process of its own and with a time limit.

Writes `gpu_check.json`, `gpu_check.md` and a log of each part into the output folder. A part that
crashes or exceeds its limit keeps what it had measured. A part that cannot run here is skipped,
with the reason. The exit code is 1 if there is no GPU, or if a part failed or was stopped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from gpu_check_table import markdown

from fpabee.runtime.backends.cuda_probe import cuda_device
from fpabee.runtime.environment import environment, providers

SCRIPT = Path(__file__).with_name("gpu_check_parts.py")
OUTPUT = Path(__file__).parents[1] / "build" / "gpu_check"
LEAST_SECONDS = 5.0
"""A part is not started if less time is left."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        name: what `gpu_check_parts.py` is called with, such as `plans base fp16`.
        seconds: its time limit if the whole check has `SECONDS`.
    """

    name: str
    seconds: float


SECONDS = 525.0
MODELS = (Part("model minilm", 100), Part("model base", 170))
# The parts of a stage run at the same time; those of the second one measure no times. A limit only
# keeps a part from using up the time of the others: what it leaves over is for the parts after it.
# With more or less time for the whole, the limits are in proportion, see `stages`. The first four
# stages compare one model in all libraries, the small one first. Their limits fit into the 525
# seconds of the whole; the stages after them run if time is left, or in the next run. Nobody has
# seen the times of a GPU yet, so the limits are estimates:
# - `plans` builds 7 plans for minilm and 13 for base, each in a process that needs several seconds
#   to start, and TensorRT times kernels for 5 profiles (see PLANS). The plan of the whole model
#   uses the timings of the segments again. Measuring takes 4 seconds for each length, and about 30
#   in all. The plans that a stopped part has built are kept, so the next run has them.
# - `onnxruntime` and `pytorch` measure the same, without builds.
STAGES: tuple[tuple[Part, ...], ...] = (
    (Part("tests", 150), *MODELS),
    (Part("plans minilm fp16", 140),),
    (Part("onnxruntime minilm fp16", 30),),
    (Part("pytorch minilm eager", 20),),
    (Part("plans base fp16", 220),),
    (Part("onnxruntime base fp16", 40),),
    (Part("pytorch base eager", 30),),
    (Part("plans minilm int8", 140),),
    (Part("pytorch minilm compiled", 60),),
    (Part("plans base int8", 220),),
    (Part("pytorch base compiled", 60),),
)


def stages(seconds: float) -> list[list[Part]]:
    """The stages for a check of this length: a slow device needs more time for each part."""
    return [
        [replace(part, seconds=part.seconds * seconds / SECONDS) for part in stage]
        for stage in STAGES
    ]


def run_part(part: Part, output: Path, until: float, no_gpu: str) -> Entry:
    """Run a part, and return its state and results.

    Args:
        part: the part.
        output: the folder for its log and its results.
        until: when the whole check must end, by `time.monotonic`.
        no_gpu: why there is no GPU; empty if there is one, or if the part needs none.

    Returns:
        `name`, `state` (`done`, `skipped`, `failed`, or `stopped` at the time limit), `reason`,
        `seconds`, and `results`: what the part has reported, one dictionary each.
    """
    started = time.monotonic()
    limit = min(part.seconds, until - started)
    if no_gpu:
        return _entry(part, "skipped", no_gpu)
    if limit < LEAST_SECONDS:
        return _entry(part, "skipped", "no time was left")
    log = output / "logs" / f"{part.name.replace(' ', '-')}.log"
    results = log.with_suffix(".jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    command = [sys.executable, str(SCRIPT), *part.name.split()]
    options = ["--models", str(output / "models"), "--results", str(results)]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *options], stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            state, reason = ("done", "") if code == 0 else ("failed", _reason(log, code))
        except subprocess.TimeoutExpired:
            state, reason = "stopped", f"it took longer than {limit:.0f} seconds"
        finally:
            # What it has started, such as a builder of plans, must not disturb the next part.
            _kill_group(process)
    found = _read(results)
    skipped = [result["skipped"] for result in found if "skipped" in result]
    if skipped and state == "done":
        state, reason = "skipped", skipped[-1]
    kept = [result for result in found if "skipped" not in result]
    return _entry(part, state, reason, time.monotonic() - started, kept)


def _entry(
    part: Part, state: str, reason: str, seconds: float = 0.0, results: Sequence[Entry] = ()
) -> Entry:
    return {
        "name": part.name,
        "state": state,
        "reason": reason,
        "seconds": round(seconds, 1),
        "results": list(results),
    }


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(log: Path, code: int) -> str:
    """The last line that a failed part printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    ended = f"it was ended by signal {-code}" if code < 0 else f"it ended with code {code}"
    return f"{ended}: {lines[-1]}" if lines else ended


def _read(results: Path) -> list[Entry]:
    """The lines that a part has written; the last one may be incomplete."""
    if not results.exists():
        return []
    found = []
    for line in results.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def check(
    output: Path, seconds: float, stages: Sequence[Sequence[Part]], needs_gpu: bool = True
) -> Entry:
    """Run stages of parts, and write the report after each of them.

    Args:
        output: the folder for the report, logs and models.
        seconds: time limit of the whole.
        stages: the parts, in order.
        needs_gpu: whether nothing runs without a GPU.

    Returns:
        The report, as in `gpu_check.json`.
    """
    until = time.monotonic() + seconds
    device = cuda_device()
    no_gpu = device.error if needs_gpu else ""
    report: Entry = {
        "environment": environment() | {"providers": providers()},
        "gpu": {
            "name": device.name,
            "compute_capability": device.compute_capability,
            "error": device.error,
        },
        "parts": [],
    }
    output.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        with ThreadPoolExecutor(len(stage)) as pool:
            for entry in pool.map(lambda p: run_part(p, output, until, no_gpu), stage):
                report["parts"].append(entry)
                click.echo(f"{entry['name']}: {entry['state']} {entry['reason']}".rstrip())
        (output / "gpu_check.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        (output / "gpu_check.md").write_text(markdown(report), encoding="utf-8")
    return report


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
def main(output: Path, seconds: float, prepare: bool) -> None:
    """Check and measure fpabee on the GPU of this machine."""
    models = [replace(part, seconds=seconds) for part in MODELS]
    parts = [models] if prepare else stages(seconds)
    report = check(output, seconds, parts, needs_gpu=not prepare)
    click.echo(f"the report is in {output / 'gpu_check.md'} and {output / 'gpu_check.json'}")
    bad = [entry["name"] for entry in report["parts"] if entry["state"] in ("failed", "stopped")]
    if bad:
        sys.exit(
            f"error: {', '.join(bad)} did not finish; see {output / 'logs'}. The next run keeps "
            "the models and plans that were made"
        )
    if report["gpu"]["error"] and not prepare:
        sys.exit(f"error: nothing ran on a GPU: {report['gpu']['error']}")


if __name__ == "__main__":
    main()
