#!/usr/bin/env python
"""Draw the README's picture: score against time per text.

    python scripts/picture.py measure demo/engines demo/model scripts/demo_data OUT.json
    python scripts/picture.py draw scripts/results/picture.json docs/assets

`measure` times the rule `fpabee` with several thresholds, one text at a time, against one ONNX
graph at full depth and against PyTorch with the same rule. Each threshold is chosen on the dev set
for a mean depth; scores and times are those of the test set. `draw` writes a light and a dark
version.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
from matplotlib.figure import Figure

from fpabee.calibration import threshold_for_depth
from fpabee.exporter.bench import (
    FULL_DEPTH,
    FULL_GRAPH,
    PYTORCH,
    WITH_RULE,
    BenchOptions,
    run_bench,
)
from fpabee.runtime import Engine, FPabee, read_rows

SHARES = (0.45, 0.6, 0.75, 0.9)
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


@dataclass(frozen=True)
class Theme:
    """Colours of a version of the picture."""

    name: str
    ink: str
    grid: str


THEMES = (Theme("light", "#1f2328", "#d8dee4"), Theme("dark", "#e6edf3", "#3d444d"))


@click.group()
def main() -> None:
    """Measure and draw the README's picture."""


@main.command()
@click.argument("engines", type=click.Path(path_type=Path))
@click.argument("model_dir")
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
def measure(engines: Path, model_dir: str, data: Path, output: Path) -> None:
    """Measure ENGINES and MODEL_DIR on the dev and test rows of DATA and write OUTPUT."""
    dev, test = (list(read_rows(data / f"{part}.jsonl.gz")) for part in ("dev", "test"))
    texts, labels = [row.content for row in test], [row.labels for row in test]
    points: list[dict[str, Any]] = []
    with Engine.load(engines) as engine:
        manifest = engine.manifest
        task, layers = manifest.task, manifest.exit_layers
        trace = engine.trace([row.content for row in dev])

        def accuracy(**how: Any) -> float:
            found = engine.predict(texts, **how)
            return sum(p.labels == want for p, want in zip(found, labels, strict=True)) / len(test)

        full = accuracy(full_depth=True)
        for share in SHARES:
            rule = threshold_for_depth(
                trace.logits, FPabee(threshold=0.0), task.problem_type, layers, share * layers[-1]
            )
            options = BenchOptions(rule, repeats=3, shapes=(), max_rows=60, model_dir=model_dir)
            report = run_bench(engines, texts, options)
            single, score = report.workloads[0], accuracy(rule=rule)
            times = {
                name: timing.total_s * 1e3 / single.rows for name, timing in single.timings.items()
            }
            points.append(
                {"rule": rule.to_dict(), "score": score, "depth": single.mean_depth, "ms": times}
            )
            click.echo(f"{rule.to_dict()}: {score:.4f}, {times}", err=True)
    content = {
        "data": f"{len(test)} test rows of {data}",
        "layers": layers[-1],
        "full_depth": full,
        "hardware": report.hardware,
        "versions": report.versions,
        "points": points,
    }
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@main.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def draw(results: Path, folder: Path) -> None:
    """Draw RESULTS as score-light.svg and score-dark.svg into FOLDER."""
    content = json.loads(results.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        style: dict[Any, Any] = {"svg.hashsalt": "fpabee", "svg.fonttype": "none", "font.size": 11}
        with mpl.rc_context(style):
            figure = picture(content, theme)
            path = folder / f"score-{theme.name}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None})


def picture(content: dict[str, Any], theme: Theme) -> Figure:
    """The picture in one theme; ratios of times are relative to the full graph of the same run."""
    points, full = content["points"], 100 * content["full_depth"]
    ordinary = min(point["ms"][FULL_GRAPH] for point in points)
    ratios = {
        name: [point["ms"][name] / point["ms"][FULL_GRAPH] for point in points]
        for name in (WITH_RULE, PYTORCH, FULL_DEPTH)
    }
    scores = [100 * point["score"] for point in points]
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    curve = [ratio * ordinary for ratio in ratios[WITH_RULE]]
    axes.plot(curve, scores, "o-", color=BLUE, label="fpabee, several thresholds")
    torch = [ratio * ordinary for ratio in ratios[PYTORCH]]
    axes.plot(torch, scores, "^--", color=GREEN, label="PyTorch, same thresholds")
    axes.plot([ordinary], [full], "s", color=ORANGE, markersize=9, label="ONNX Runtime, full depth")
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds per text, one text at a time", color=theme.ink)
    axes.set_ylabel("test accuracy, %", color=theme.ink)
    axes.grid(color=theme.grid, linewidth=0.7)
    axes.tick_params(colors=theme.ink)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(theme.ink)
    figure.legend(frameon=False, labelcolor=theme.ink, loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    main()
