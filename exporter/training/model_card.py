"""The model card: README.md in model_dir, with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from ...runtime.errors import printable
from .report import TrainReport
from .rows import dataset_name


def model_card(report: TrainReport) -> str:
    """The model card of a training."""
    start = report.options.backbone or report.options.from_classifier or ""
    datasets = {dataset_name(data.source) for data in report.data.values()}
    metadata = ModelCardData(
        library_name="fpabee",
        pipeline_tag="text-classification",
        tags=["early-exit", report.model_type],
        # A local folder means nothing to other people.
        base_model=None if Path(start).exists() else start,
        datasets=sorted(filter(None, datasets)) or None,
        metrics=list(report.scores["dev"][0]),
    )
    layers = ", ".join(map(str, report.exits))
    labels = printable(", ".join(report.labels))
    lines = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {report.model_type} classifier with {len(report.exits)} exits",
        f"A text classifier with an exit after the layers {layers}: easy texts need only the first "
        "layers. Compile it with `fpabee-export`.",
        f"Task: {report.problem_type.value}. Labels: {labels}.",
        "## Data",
        _table(
            ["part", "source", "rows", "SHA-256"],
            [
                [name, _shown(data.source), str(data.rows), data.sha256]
                for name, data in report.data.items()
            ],
        ),
    ]
    for name, scores in report.scores.items():
        rows = [
            [str(number), str(layer), *(f"{value:.4f}" for value in row.values())]
            for number, (layer, row) in enumerate(zip(report.exits, scores, strict=True), start=1)
        ]
        lines += [f"## Scores on {name}", _table(["exit", "layer", *scores[0]], rows)]
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    lines.append("## Training")
    if report.command:
        lines.append(f"```\n{report.command}\n```")
    lines.append(
        f"{report.train_seconds:.0f} seconds, with {versions}. All settings are in `training.json`."
    )
    return "\n\n".join(lines) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _shown(source: str) -> str:
    """A dataset, or a file without its folder, which exists only on one machine."""
    return printable(source if dataset_name(source) else Path(source).name)
