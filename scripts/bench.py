#!/usr/bin/env python
"""Make the README's table: run `fpabee-bench` and write its report as Markdown.

    python scripts/bench.py engines/ --input test.jsonl --depth 0.5 --model-dir model_dir \
        --metrics --readme README.md

Takes the options of `fpabee-bench`. `--readme FILE` puts the table between the markers
`<!-- bench:begin -->` and `<!-- bench:end -->` of that file instead of printing it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from fpabee.exporter.bench import (
    FULL_DEPTH,
    FULL_GRAPH,
    PADDED_32,
    PADDED_FP32,
    PYTORCH,
    WITH_RULE,
)
from fpabee.runtime import Engine, ExitRule
from fpabee.runtime.files import read_rows
from fpabee.runtime.metrics import encode_labels, evaluate
from fpabee.runtime.rule_words import rule_in_words

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def table(report: dict[str, Any], scores: str, title: str) -> str:
    """The report as Markdown, with the hardware and the settings of the command below it.

    Args:
        report: what `fpabee-bench --json` printed.
        scores: a sentence; empty: none.
        title: what was measured.
    """
    lines = [
        "| workload | full graph | chain, full depth | chain + rule | speed-up | theory | share "
        "| PyTorch, same rule |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for workload in report["workloads"]:
        timings = workload["timings"]
        cells = [_milliseconds(timings.get(v)) for v in (FULL_GRAPH, FULL_DEPTH, WITH_RULE)]
        cells[1] += f" ({workload['full_depth_over_full_graph']:.2f}x)"
        cells += [
            f"**{workload['realised']:.2f}x**",
            f"{workload['theoretical']:.2f}x" if workload["mean_depth"] else "no layers",
            f"{workload['realised_over_theoretical']:.3f}" if workload["mean_depth"] else "",
            _milliseconds(timings.get(PYTORCH)),
        ]
        lines.append(f"| {workload['name']} | " + " | ".join(cells) + " |")
    last = report["workloads"][-1]
    seconds = {variant: timing["total_s"] for variant, timing in last["timings"].items()}
    gain = seconds[PADDED_32] / seconds[WITH_RULE]
    in_fp32 = ""
    if PADDED_FP32 in seconds:
        ratio = seconds[PADDED_FP32] / seconds[WITH_RULE]
        in_fp32 = f" ONNX Runtime in fp32, over such batches, takes **{ratio:.1f}x** as long."
    first, first_full = (
        last["timings"][variant]["first_s"] / seconds[variant]
        for variant in (WITH_RULE, FULL_GRAPH)
    )
    rule = rule_in_words(ExitRule.from_dict(report["rule"]))
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    lines += ["", f"Median milliseconds per unit (a batch, a text, or 256 texts). {title}"]
    lines += [
        f"Rule: {rule}; mean depth {last['mean_depth']:.2f} of {report['layers']} layers on "
        f"the file. The usual way, one full graph over padded batches of 32 in file order, takes "
        f"**{gain:.1f}x** as long as the chain with the rule.{in_fp32} The first runs of all units "
        f"of the file take {first:.2f}x as long as their medians with the chain and the rule, and "
        f"{first_full:.2f}x with the full graph."
    ]
    lines += [scores] if scores else []
    lines.append(f"{report['hardware']}; {versions}; {report['target']}.")
    return "\n".join(lines)


def label_scores(engines: Path, source: str, report: dict[str, Any]) -> str:
    """The main score of a labelled file, with the rule and at full depth, as a sentence."""
    rows = list(read_rows(source))
    with Engine.load(engines, report["target"]) as engine:
        task, texts = engine.manifest.task, [row.content for row in rows]
        expected = encode_labels([row.labels or () for row in rows], task.labels, task.problem_type)
        scores = [
            evaluate(engine.trace(texts, rule=chosen).predictions, expected, len(task.labels))
            for chosen in (ExitRule.from_dict(report["rule"]), None)
        ]
    name = next(iter(scores[0]))
    with_rule, full = (score[name] for score in scores)
    return f"Scores: {name} {with_rule:.4f} with the rule, {full:.4f} at full depth."


def _milliseconds(timing: dict[str, float] | None) -> str:
    return "" if timing is None else f"{timing['median_ms']:.1f}"


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("engines", type=click.Path(path_type=Path))
@click.option("--input", "source", required=True, help="Texts, in any format of fpabee-run.")
@click.option("--metrics", is_flag=True, help="Score against the labels in the input.")
@click.option("--title", default="", help="What was measured, for the line below the table.")
@click.option("--readme", type=click.Path(path_type=Path), help="File that has the markers.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(
    engines: Path,
    source: str,
    metrics: bool,
    title: str,
    readme: Path | None,
    options: tuple[str, ...],
) -> None:
    """Run fpabee-bench on ENGINES with its OPTIONS, and write a Markdown table."""
    program = [sys.executable, "-m", "fpabee", "bench"]
    command = [*program, str(engines), "--input", source, "--json", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    report = json.loads(done.stdout)
    scores = label_scores(engines, source, report) if metrics else ""
    text = table(report, scores, title)
    if readme is None:
        click.echo(text)
        return
    content = readme.read_text(encoding="utf-8")
    before, rest = content.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
