"""Add exits to a trained classifier (`AutoModelForSequenceClassification`).

The last exit takes over the head of the classifier and gives its logits. The other exits are new,
and are trained on the predictions of the classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...runtime.artifact.manifest import ProblemType
from ...runtime.encoding import EncodedRow
from ...runtime.errors import ModelError, first_line
from ..backbones import build_encoder, family_of
from ..checkpoint import agreed_problem_type, label_names, load_config, resolve_model_dir
from ..exits import LastHead, MultiExitConfig, Pooling
from ..model import MultiExitModel, predict
from .trainer import probabilities

_TOLERANCE = 1e-4


class Classifier:
    """A trained classifier without early exits.

    Args:
        source: a folder or a hub id.
        problem_type: the task, if the classifier does not name it.

    Attributes:
        folder: where it is.
        model: the Hugging Face model, in eval mode and float32.
        labels: in the order of its logits.
        problem_type: its task.

    Raises:
        ModelError: files are missing or damaged, the family is not supported, there is no
            trained head, or the model is a regression.
    """

    def __init__(self, source: str | Path, problem_type: ProblemType | None = None) -> None:
        self.folder = resolve_model_dir(source)
        config = load_config(self.folder)
        if config.problem_type == "regression" or len(config.id2label) == 1:
            raise ModelError(
                f"{self.folder} is a regression model, which has no classes",
                "give a classifier with at least two labels",
            )
        self.problem_type = agreed_problem_type(self.folder, config, problem_type)
        self.model = _load(self.folder)
        parts = family_of(config.model_type)(self.model.base_model).classifier_parts()
        outputs = self.model.get_submodule(parts.classifier).out_features
        self.labels = label_names(self.folder, config, outputs)

    def multi_exit(self, exits: tuple[int, ...] | None, pooling: Pooling) -> MultiExitModel:
        """A multi-exit model whose last exit gives the logits of the classifier.

        The head of that exit is frozen.

        Args:
            exits: layers with an exit, including the last layer; None: every layer.
            pooling: what the other exits see.

        Raises:
            ModelError: the exits do not fit, or the head is not the usual one of the family.
        """
        config = self.model.config
        encoder = build_encoder(config, attention=None)
        # Not strict: some classifiers lack their encoder's pooler, which then keeps its initial
        # weights.
        encoder.load_state_dict(self.model.base_model.state_dict(), strict=False)
        backbone = family_of(config.model_type)(encoder)
        parts = backbone.classifier_parts()
        norm = self.model.get_submodule(parts.norm) if parts.norm else None
        head = LastHead(Pooling(parts.pooling), parts.activation, norm.eps if norm else None)
        layers = len(backbone.layers())
        exits = exits or tuple(range(1, layers + 1))
        exit_config = MultiExitConfig(exits, self.labels, self.problem_type, pooling, head)
        if exits[-1] != layers:
            raise ModelError(
                f"the classifier has its head after layer {layers}, but the last of the exits "
                f"{list(exits)} is after layer {exits[-1]}",
                f"add {layers} to `exits`",
            )
        model = MultiExitModel(encoder, exit_config.with_hidden_layers())
        assert model.last_head is not None
        _copy(self.model.get_submodule(parts.dense), model.last_head.dense)
        _copy(self.model.get_submodule(parts.classifier), model.classifiers[-1])
        if norm is not None:
            _copy(norm, model.last_head.norm)
        self._check_head(model)
        for part in (model.last_head, model.classifiers[-1]):
            part.requires_grad_(False)
        return model

    def soft_labels(
        self, rows: Sequence[EncodedRow], padding: Mapping[str, float]
    ) -> NDArray[np.float32]:
        """The probabilities `[rows, labels]` that the classifier predicts.

        Args:
            rows: tokenized rows.
            padding: see `model_inputs`.
        """

        def read(output: Any) -> Tensor:
            return probabilities(output.logits, self.problem_type)

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return predict(self.model.to(device), rows, padding, read)

    @torch.no_grad()
    def _check_head(self, model: MultiExitModel) -> None:
        """Compare logits, because the head may not be the usual one of the model's family."""
        ids = torch.arange(16).view(2, 8) % int(model.backbone.config.vocab_size)
        mask = torch.ones_like(ids)
        found = model.eval()(ids, mask)[-1]
        difference = float((found - self.model(ids, attention_mask=mask).logits).abs().max())
        if not difference <= _TOLERANCE:
            raise ModelError(
                f"{self.folder} does not have the usual head of its family: the logits of the last "
                f"exit differ from it by {difference:.2e}",
                "train with `backbone` instead, which makes new heads",
            )


def _load(folder: Path) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification

    load: Any = AutoModelForSequenceClassification.from_pretrained
    try:
        model, info = load(folder, dtype=torch.float32, output_loading_info=True)
    # Which error is raised depends on why the weights do not fit.
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} does not hold a classifier that can be loaded: {first_line(error)}",
            "copy config.json and the weights again from where the model was trained",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} is not a trained classifier: it lacks {len(missing)} weights, first "
            f"{missing[0]!r}",
            "give a trained AutoModelForSequenceClassification, or train with `backbone`",
        )
    return model.eval()


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy weights; a bias that the source does not have becomes 0."""
    with torch.no_grad():
        for name, value in target.named_parameters():
            given: Tensor | None = getattr(source, name)
            value.copy_(torch.zeros_like(value) if given is None else given)
