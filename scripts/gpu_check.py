"""What `scripts/gpu_check` runs: tests marked `gpu`, then every target of a folder timed.

Each target is timed on the same texts, interleaved with the others, one text at a time and
all at once: with its rule and at full depth. Medians, in milliseconds.
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
from fpabee.runtime.environment import environment
from fpabee.runtime.inspection import target_states
from fpabee.runtime.manifest import read_manifest
from fpabee.runtime.text_io import read_rows

REPEATS = 9
TEXTS = 256


def run_tests() -> dict[str, Any]:
    """The tests marked `gpu`: exit code, and the last lines."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "-rs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"exit_code": done.returncode, "tail": done.stdout.splitlines()[-20:]}


def time_targets(folder: Path, texts: list[Any]) -> dict[str, Any]:
    """Median milliseconds of every target that can run here."""
    states = target_states(folder, read_manifest(folder))
    report: dict[str, Any] = {s.name: {"why_not": s.why_not} for s in states if s.why_not}
    engines = {s.name: Engine.load(folder, target=s.name) for s in states if not s.why_not}
    full = Budget(exit=len(read_manifest(folder).segments))
    units = {"one text": [[text] for text in texts[:20]], "all": [texts]}
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(REPEATS + 2):  # two to warm up
        for name, engine in engines.items():
            for unit, parts in units.items():
                encoded = [engine.encode(part) for part in parts]
                for kind, rule in (("rule", engine.rule), ("full depth", full)):
                    started = time.perf_counter()
                    for rows in encoded:
                        engine.run_encoded(rows, rule)
                    if repeat >= 2:
                        key = (name, f"{unit}, {kind}")
                        times.setdefault(key, []).append(time.perf_counter() - started)
    for (name, what), seconds in times.items():
        count = len(units[what.split(",")[0]])
        report.setdefault(name, {})[what] = round(statistics.median(seconds) / count * 1e3, 3)
    for engine in engines.values():
        engine.close()
    return report


def main(folder: str, source: str) -> None:
    """Run everything and print one JSON."""
    try:
        texts = [row.content for row in read_rows(source)][:TEXTS]
        report = {
            "environment": environment(),
            "tests": run_tests(),
            "milliseconds": time_targets(Path(folder), texts),
        }
    except FpabeeError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
