"""Make a multi-exit model of a plain classifier (`AutoModelForSequenceClassification`).

The last exit takes the classifier's own head and gives its logits; the others have yet to be
trained, on what the classifier says of each text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.artifact.manifest import ProblemType
from ...runtime.errors import ModelError, first_line
from ..backbones import build_encoder, family_of
from ..checkpoint import agreed_problem_type, label_names, load_config, resolve_model_dir
from ..model import LastHead, MultiExitConfig, MultiExitModel, Pooling

_BATCH = 64
_TOLERANCE = 1e-4

Encoded = dict[str, Any]


class Classifier:
    """A trained plain classifier.

    Args:
        source: a folder or a hub id.
        problem_type: the task, if the classifier does not name it.

    Attributes:
        folder: where it is.
        model: the Hugging Face model, in eval mode, in float32.
        labels: its labels in the order of its logits.
        problem_type: its task.

    Raises:
        ModelError: missing or damaged files, an unsupported family, no trained head, or a
            regression.
    """

    def __init__(self, source: str | Path, problem_type: ProblemType | None = None) -> None:
        self.folder = resolve_model_dir(source)
        config = load_config(self.folder)
        family_of(config.model_type)
        self.problem_type = agreed_problem_type(
            self.folder, _problem_type(self.folder, config), problem_type
        )
        self.model = _load(self.folder)
        parts = family_of(config.model_type)(self.model.base_model).classifier_parts()
        outputs = self.model.get_submodule(parts.classifier).out_features
        self.labels = label_names(self.folder, config, outputs)

    def multi_exit(self, exits: tuple[int, ...] | None, pooling: Pooling) -> MultiExitModel:
        """A multi-exit model whose last exit gives the classifier's logits.

        Its head does not learn.

        Args:
            exits: layers with an exit, the last layer among them; None: every layer.
            pooling: what the other exits see.

        Raises:
            ModelError: exits that do not fit, or a head unlike those of its family.
        """
        config = self.model.config
        encoder = build_encoder(config, attention=None)
        # A pooler that this classifier does not use stays as it is made.
        encoder.load_state_dict(self.model.base_model.state_dict(), strict=False)
        backbone = family_of(config.model_type)(encoder)
        parts = backbone.classifier_parts()
        norm = self.model.get_submodule(parts.norm) if parts.norm else None
        head = LastHead(Pooling(parts.pooling), parts.activation, norm.eps if norm else None)
        layers = len(backbone.layers())
        exits = exits or tuple(range(1, layers + 1))
        exit_config = MultiExitConfig(exits, self.labels, self.problem_type, pooling, head)
        exit_config.validate(layers)
        if exits[-1] != layers:
            raise ModelError(
                f"the last of the exits {list(exits)} is not after layer {layers}, where the "
                "classifier has its head",
                f"add {layers} to --exits",
            )
        model = MultiExitModel(encoder, exit_config)
        assert model.last_head is not None
        _copy(self.model.get_submodule(parts.dense), model.last_head["dense"])
        _copy(self.model.get_submodule(parts.classifier), model.classifiers[-1])
        if norm is not None:
            _copy(norm, model.last_head["norm"])
        self._check(model)
        for part in (model.last_head, model.classifiers[-1]):
            part.requires_grad_(False)
        return model

    @torch.no_grad()
    def soft_labels(
        self, rows: Sequence[Encoded], collate: Callable[[list[Encoded]], Any]
    ) -> list[list[float]]:
        """What the classifier says of each row: probabilities of the labels.

        Args:
            rows: tokenized rows.
            collate: makes a padded batch of rows.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(device)
        # Rows of like length together: less padding.
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
        soft: dict[int, list[float]] = {}
        for start in range(0, len(order), _BATCH):
            numbers = order[start : start + _BATCH]
            batch = collate([rows[number] for number in numbers])
            logits = self.model(**{name: part.to(device) for name, part in batch.items()}).logits
            single = self.problem_type is ProblemType.SINGLE_LABEL
            probabilities = torch.softmax(logits, dim=-1) if single else torch.sigmoid(logits)
            soft.update(zip(numbers, probabilities.tolist(), strict=True))
        return [soft[number] for number in range(len(rows))]

    @torch.no_grad()
    def _check(self, model: MultiExitModel) -> None:
        """Families are known by name, but anybody may give one another head."""
        ids = torch.arange(16).view(2, 8) % int(model.backbone.config.vocab_size)
        mask = torch.ones_like(ids)
        found = model.eval()(ids, mask)[-1]
        difference = float((found - self.model(ids, attention_mask=mask).logits).abs().max())
        if not difference <= _TOLERANCE:
            raise ModelError(
                f"the head of {self.folder} is not that of its family: logits of the last exit "
                f"differ by {difference:.2e}",
                "train with --backbone instead, which makes new heads",
            )


def _load(folder: Path) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    load: Any = AutoModelForSequenceClassification.from_pretrained
    try:
        with _quiet():
            model, info = load(folder, dtype=torch.float32, output_loading_info=True)
    # What weights that do not fit raise depends on how they do not.
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} holds no classifier that can be loaded: {first_line(error)}",
            "copy config.json and the weights again from where the model was trained",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} is not a trained classifier: it lacks {len(missing)} weights, first "
            f"{missing[0]!r}",
            "give a folder that AutoModelForSequenceClassification saved, or train with --backbone",
        )
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep bars and tables of missing weights out of our output: the error says it in one line."""
    from transformers.utils import logging as logging_of_transformers

    theirs: Any = logging_of_transformers
    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(verbosity)
        if bars:
            theirs.enable_progress_bar()


def _problem_type(folder: Path, config: Any) -> ProblemType | None:
    named = config.problem_type
    if named == "regression" or len(config.id2label) == 1:
        raise ModelError(
            f"{folder} is a regression, which has no classes to exit with",
            "give a classifier of two labels or more",
        )
    return ProblemType(named) if named else None


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy weights; a bias that the source has not is 0."""
    with torch.no_grad():
        for name, value in target.named_parameters():
            given: Tensor | None = getattr(source, name)
            value.copy_(torch.zeros_like(value) if given is None else given)
