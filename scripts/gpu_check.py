"""What `scripts/gpu_check` runs: tests marked `gpu`, then every target of a folder timed.

Each target is timed on the same texts, interleaved with the others, one text at a time and
all at once: with its rule and at full depth. Medians, in milliseconds. The exit code is 1 if
there is no GPU, a test fails, or a target does not run; the JSON is written all the same.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fpabee.runtime import Budget, Engine, FpabeeError
from fpabee.runtime.artifact.folder import read_manifest
from fpabee.runtime.artifact.manifest import Manifest
from fpabee.runtime.backends.cuda_probe import cuda_device
from fpabee.runtime.environment import environment
from fpabee.runtime.files import read_rows
from fpabee.runtime.inspection import target_states

ROOT = Path(__file__).parents[1]
REPEATS = 9
TEXTS = 256


def run_tests(root: Path) -> dict[str, Any]:
    """The tests marked `gpu` of a checkout: exit code, and the last lines."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "-rs"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return {"exit_code": done.returncode, "tail": done.stdout.splitlines()[-20:]}


def time_targets(folder: Path, manifest: Manifest, texts: list[Any]) -> dict[str, Any]:
    """Median milliseconds of every target that can run here; of others why not, or the error."""
    states = target_states(folder, manifest)
    report: dict[str, Any] = {
        s.name: {"why_not": s.unavailable_reason} for s in states if s.unavailable_reason
    }
    full = Budget(exit=len(manifest.segments))
    units = {"one text": [[text] for text in texts[:20]], "all": [texts]}
    engines: dict[str, Engine] = {}
    for state in states:
        if state.unavailable_reason:
            continue
        try:
            engine = Engine.load(folder, target=state.name)
            for _ in range(2):  # to warm up
                _pass(engine, units, full)
        except FpabeeError as error:
            report[state.name] = {"error": str(error)}
        else:
            engines[state.name] = engine
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(REPEATS):
        for name, engine in engines.items():
            for what, seconds in _pass(engine, units, full).items():
                times.setdefault((name, what), []).append(seconds)
    for (name, what), measured in times.items():
        report.setdefault(name, {})[what] = round(statistics.median(measured) * 1e3, 3)
    for engine in engines.values():
        engine.close()
    return report


def _pass(engine: Engine, units: dict[str, list[list[Any]]], full: Budget) -> dict[str, float]:
    """Seconds of a call, for each unit and rule."""
    seconds = {}
    for unit, parts in units.items():
        encoded = [engine.encode(part) for part in parts]
        for kind, rule in (("rule", engine.rule), ("full depth", full)):
            started = time.perf_counter()
            for rows in encoded:
                engine.run_encoded(rows, rule)
            seconds[f"{unit}, {kind}"] = (time.perf_counter() - started) / len(parts)
    return seconds


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
