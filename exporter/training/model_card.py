"""The model card: README.md in model_dir, with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ...runtime.errors import printable
from .report import TrainReport
from .rows import dataset_name


def model_card(report: TrainReport) -> ModelCard:
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
    template = str(Path(__file__).with_name("model_card.md"))
    card: ModelCard = ModelCard.from_template(
        metadata, template, report=report, printable=printable, place=_place, zip=zip
    )
    return card


def _place(source: str) -> str:
    """A dataset, or a file without its folder, which exists only on one machine."""
    return printable(source if dataset_name(source) else Path(source).name)
