"""The result of a training, as it is written to `training.json` and to the model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from ...runtime.artifact.manifest import ProblemType
from ...runtime.errors import printable
from ..markdown import in_markdown
from .options import TrainOptions


@dataclass(frozen=True)
class DataSource:
    """Rows that a training used.

    Attributes:
        source: the file.
        rows: number of rows.
        sha256: of the file; for a pipe, of the texts and labels of its rows.
    """

    source: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class TrainReport:
    """The result of a training.

    Attributes:
        options: the settings.
        problem_type: the task.
        model_type: family of the encoder.
        data: by name: `train`, `dev` and, if given, `test`.
        labels: in the order of the logits.
        exits: the layer of each exit; 0 for exit 0, which is the first if there is one.
        exit_0_bytes: size of exit 0, in bytes; 0: there is none.
        scores: for `dev` and `test`: by exit, the value of each metric.
        train_seconds: how long the training took, without loading and the final scores.
        command: how it was started; empty: not known.
        versions: of Python and of the main packages.
    """

    options: TrainOptions
    problem_type: ProblemType
    model_type: str
    data: dict[str, DataSource]
    labels: tuple[str, ...]
    exits: tuple[int, ...]
    exit_0_bytes: int
    scores: dict[str, list[dict[str, float]]]
    train_seconds: float
    command: str
    versions: dict[str, str]

    @property
    def numbers(self) -> range:
        """The number of each exit: from 0 with exit 0, else from 1."""
        first = min(self.exits[0], 1)
        return range(first, first + len(self.exits))

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has."""
        return cast("dict[str, Any]", msgspec.json.decode(msgspec.json.encode(self)))


def model_card(report: TrainReport) -> Any:
    """The model card of a training, with the metadata that the Hugging Face hub reads."""
    from huggingface_hub import ModelCard, ModelCardData

    start = report.options.backbone
    metadata = ModelCardData(
        library_name="fpabee",
        pipeline_tag="text-classification",
        tags=["early-exit", report.model_type],
        # A local folder means nothing to other people.
        base_model=None if Path(start).exists() else start,
        metrics=list(report.scores["dev"][0]),
    )
    template = str(Path(__file__).with_name("model_card.md"))
    functions: dict[str, Any] = {
        "printable": printable,
        "text": in_markdown,
        "place": _place,
        "zip": zip,
    }
    return ModelCard.from_template(metadata, template, report=report, **functions)


def _place(source: str) -> str:
    """A file without its folder, which exists only on one machine."""
    return Path(source).name
