"""The settings of a training. Needs no torch, so that the command starts fast."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from ...runtime.artifact.folder import check_outside
from ...runtime.artifact.manifest import ProblemType
from ...runtime.errors import InputError
from ...runtime.files import Inputs, ReadOptions
from ...runtime.tasks import row_of
from ..early import Config
from ..exit_config import Pooling
from ..paths import check_apart, check_model_dir, resolved
from ..unfinished import check_free, partial_of
from .examples import labelled_rows

REPORT_NAME = "training.json"
"""Settings and scores, which every training writes beside its model."""
STEPS = "training"
"""The name of the folder with the trained encoder of an unfinished training."""
FEWEST_LABELS = {ProblemType.SINGLE_LABEL: 2, ProblemType.MULTI_LABEL: 1}
"""The tasks that can be trained, and how many labels the rows of each must have."""

# A pair has three special tokens, and needs at least one token of text.
_ABOVE = {"epochs": 0, "lr": 0, "batch_size": 0, "max_length": 3}
# Small data needs more than the usual passes: with 500 rows, 3 of them are 48 steps.
_EPOCHS = 3.0
_FEWEST_STEPS = 1000
_MOST_EPOCHS = 20.0


@dataclass(frozen=True)
class TrainOptions:
    """The settings of a training.

    Data is a file in any format of `fpabee.runtime.read_rows`.

    Attributes:
        train: labelled rows to train on.
        dev: labelled rows that are scored after every epoch.
        backbone: the encoder: a folder, the id of a model on the Hugging Face hub, or another
            model_dir.
        test: labelled rows that are scored once, at the end.
        problem_type: the task; default: single-label.
        exits: the layers after which there is an exit, ascending; default: every layer.
        distill: share of the targets of all exits but the last that comes from the last exit
            instead of the labels (self-distillation as in FastBERT, arXiv 2004.02178). 0 gives
            the loss of F-PABEE.
        pooling: how exits see the text. With attention, each has four queries and a hidden layer.
        epochs: passes over the training rows; may be a fraction. Default: see `epochs_for`.
        lr: learning rate of the encoder.
        batch_size: rows per step.
        max_length: longest sequence in tokens, special tokens included; longer texts are
            truncated.
        seed: of all random choices.
        bf16: compute in bfloat16 where that is safe (autocast); needs a GPU, or a CPU with AVX-512.
        exit_0: whether exit 0, a bag of n-grams before layer 1, is trained after the encoder.
        reading: how the rows are read.
        force: replace an existing model.

    Raises:
        InputError: a number is out of range.
    """

    train: str
    dev: str
    backbone: str
    test: str | None = None
    problem_type: ProblemType | None = None
    exits: tuple[int, ...] | None = None
    distill: float = 0.5
    pooling: Pooling = Pooling.ATTENTION
    epochs: float | None = None
    lr: float = 5e-5
    batch_size: int = 32
    max_length: int = 128
    seed: int = 42
    bf16: bool = False
    exit_0: bool = True
    reading: ReadOptions = field(default_factory=ReadOptions)
    force: bool = False

    def __post_init__(self) -> None:
        for name, bound in _ABOVE.items():
            value = getattr(self, name)
            if value is not None and not bound < value < math.inf:
                raise InputError(f"{name} is {value}", f"give `{name}` above {bound}")
        if self.problem_type is not None:
            hint = "train one with sentence-transformers, and convert it"
            row_of(FEWEST_LABELS, self.problem_type, "trained here", hint)
        if not 0 <= self.distill <= 1:
            raise InputError(f"distill is {self.distill}", "give `distill` from 0 to 1")

    def epochs_for(self, rows: int) -> float:
        """Passes over a number of training rows.

        They are `epochs`, or 3, and more if those would be less than 1,000 steps, up to 20.

        Args:
            rows: the number of training rows, at least 1.
        """
        if self.epochs is not None:
            return self.epochs
        steps = -(-rows // self.batch_size)
        return max(_EPOCHS, min(_MOST_EPOCHS, float(-(-_FEWEST_STEPS // steps))))


def check_training(output: Path, options: TrainOptions) -> None:
    """Check the paths of a training, its columns and its exits, before PyTorch is loaded.

    Args:
        output: the folder to write.
        options: the settings.

    Raises:
        InputError: there is already a model and no `force`, or it holds what is read; the folder is
            an engines folder or inside of the folder of a model; there are no such rows, or they
            lack labels.
        RowError: a first row cannot be read.
        ArtifactError: another process trains into the folder, or something else is in the way.
        ModelError: there is no such encoder, or it lacks a layer of `exits`.
    """
    sources = [source for source in (options.train, options.dev, options.test) if source]
    inputs = [options.backbone, *sources]
    partial = partial_of(resolved(output))
    check_apart(partial, inputs)
    check_free(partial, STEPS)
    holds_model = (output / "config.json").is_file()
    check_outside(output if holds_model else output / "config.json")
    if holds_model:
        check_apart(resolved(output), inputs)
        if not options.force:
            raise InputError(
                f"{output} already holds a model",
                "give `force` to replace it, or another `output`",
            )
        if not (output / REPORT_NAME).is_file():
            raise InputError(
                f"{output} holds a model that fpabee did not train; it will not be replaced",
                "give another `output`",
            )
    Inputs(sources, options.reading)
    for source in sources:
        if Path(source).is_file():  # a pipe can be read only once
            next(labelled_rows(source, options.reading))  # which needs the columns
    Config(check_model_dir(options.backbone)).check_layers(options.exits)
