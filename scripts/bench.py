#!/usr/bin/env python
"""Make the README's table: run `fpabee-bench` and print its report as Markdown.

    python scripts/bench.py engines/ --input test.jsonl --depth 0.5 --model-dir model_dir

Takes the options of `fpabee-bench`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from fpabee.exporter import bench
from fpabee.runtime import ExitRule
from fpabee.runtime.rule_words import rule_in_words


def table(report: dict[str, Any]) -> Iterator[str]:
    """The lines of a report of `fpabee-bench --json`, with the hardware and the settings below."""
    yield (
        "| workload | full graph | chain, full depth | chain + rule | speed-up | theory | share "
        "| PyTorch, same rule |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for workload in report["workloads"]:
        timings = workload["timings"]
        full, chain, rule, torch = (
            f"{timings[variant]['median_ms']:.1f}" if variant in timings else ""
            for variant in (bench.FULL_GRAPH, bench.FULL_DEPTH, bench.WITH_RULE, bench.PYTORCH)
        )
        theory, share = (
            f"{workload['theoretical']:.2f}x",
            f"{workload['realised_over_theoretical']:.3f}",
        )
        if not workload["mean_depth"]:
            theory, share = "no layers", ""
        yield (
            f"| {workload['name']} | {full} "
            f"| {chain} ({workload['full_depth_over_full_graph']:.2f}x) "
            f"| {rule} | **{workload['realised']:.2f}x** | {theory} | {share} | {torch} |"
        )
    whole = report["workloads"][-1]
    seconds = {variant: timing["total_s"] for variant, timing in whole["timings"].items()}
    yield "\nMedian milliseconds per unit (a batch, a text, or 256 texts)."
    yield (
        f"Rule: {rule_in_words(ExitRule.from_dict(report['rule']))}; mean depth "
        f"{whole['mean_depth']:.2f} of {report['layers']} layers on the file."
    )
    for variant in (bench.PADDED_32, bench.PADDED_FP32):
        if variant in seconds:
            ratio = seconds[variant] / seconds[bench.WITH_RULE]
            yield f"Over the file, {variant!r} takes **{ratio:.1f}x** as long as 'chain, rule'."
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    yield f"{report['hardware']}; {versions}; {report['target']}."


if __name__ == "__main__":
    command = [sys.executable, "-m", "fpabee", "bench", "--json", *sys.argv[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    print("\n".join(table(json.loads(done.stdout))))
