"""What `scripts/gpu_check` runs: the tests marked `gpu`, and then every target of a folder.

Each target must reproduce the reference logits of the folder. It is timed on the same texts,
interleaved with the others: one text and all texts, each with its rule and at full depth, in
milliseconds of a whole call: median, 99th percentile, and the first call. The exit code is 1 if
there is no GPU, a test fails, or a target does not run; the JSON is complete all the same.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fpabee.runtime import Engine, FpabeeError
from fpabee.runtime.artifact.folder import read_manifest
from fpabee.runtime.artifact.manifest import Manifest
from fpabee.runtime.backends.cuda_probe import cuda_device
from fpabee.runtime.environment import environment
from fpabee.runtime.files import read_rows
from fpabee.runtime.inspection import target_states

ROOT = Path(__file__).parents[1]
WARM_UP = 2
REPEATS = 9
TEXTS = 256


def run_tests(root: Path) -> dict[str, Any]:
    """The tests marked `gpu` of a checkout: exit code, and the last lines."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "-rs"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return {"exit_code": done.returncode, "tail": done.stdout.splitlines()[-20:]}


def time_targets(folder: Path, manifest: Manifest, texts: list[Any]) -> dict[str, Any]:
    """Median milliseconds of each target that can run here; the reason or error of the others."""
    report: dict[str, Any] = {}
    engines: dict[str, Engine] = {}
    for state in target_states(folder, manifest):
        try:
            if state.unavailable_reason:
                report[state.name] = {"unavailable": state.unavailable_reason}
            else:
                engines[state.name] = Engine.load(folder, target=state.name, check=True)
        except FpabeeError as error:
            report[state.name] = {"error": str(error)}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    workloads = itertools.product(("one text", "all texts"), ("rule", "full depth"))
    for (rows, depth), (name, engine) in itertools.product(
        [*workloads] * (WARM_UP + REPEATS), engines.items()
    ):
        started = time.perf_counter()
        engine.predict(texts[:1] if rows == "one text" else texts, full_depth=depth != "rule")
        seconds = time.perf_counter() - started
        times[name].setdefault(f"{rows}, {depth}", []).append(seconds)
    for name, engine in engines.items():
        engine.close()
        report[name] = {
            what: {
                "p50": round(statistics.median(measured[WARM_UP:]) * 1e3, 3),
                "p99": round(float(np.quantile(measured[WARM_UP:], 0.99)) * 1e3, 3),
                "first": round(measured[0] * 1e3, 3),
            }
            for what, measured in times[name].items()
        }
    return report


def problems(report: dict[str, Any]) -> list[str]:
    """What went wrong, one line each."""
    found = [] if not cuda_device().error else [f"nothing ran on a GPU: {cuda_device().error}"]
    if report["tests"]["exit_code"] != 0:
        found.append(f"tests failed: {(report['tests']['tail'] or ['no output'])[-1]}")
    for name, entry in report["milliseconds"].items():
        if "error" in entry:
            found.append(f"{name}: {entry['error']}")
    return found


def main(folder: str, source: str) -> None:
    """Run everything and print one JSON."""
    try:
        manifest = read_manifest(Path(folder))
        texts = [row.content for row in read_rows(source)][:TEXTS]
    except FpabeeError as error:
        sys.exit(f"error: {error}")
    report = {
        "environment": environment(),
        "tests": run_tests(ROOT),
        "milliseconds": time_targets(Path(folder), manifest, texts),
    }
    print(json.dumps(report, indent=2))
    found = problems(report)
    if found:
        sys.exit("\n".join(f"error: {problem}" for problem in found))


if __name__ == "__main__":
    main(*sys.argv[1:])
