"""A trained classifier or reranker, and the model with exits of it.

It is an `AutoModelForSequenceClassification`; with one label it is a reranker, such as a
`CrossEncoder` of sentence-transformers. The last exit takes over its head and gives its logits. The
other exits are new.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.artifact.manifest import Activation, ProblemType
from ...runtime.check import EXPORT_LIMIT, logit_differences
from ...runtime.errors import ModelError, first_line
from ...runtime.hub import repository_of
from ..backbones import build_encoder, family_of
from ..checkpoint import (
    CONFIG_ERRORS,
    label_names,
    load_config,
    load_pretrained,
    problem_type_of,
    resolve_model_dir,
)
from ..exit_config import LastHead, MultiExitConfig, Pooling
from ..model import MultiExitModel
from ..weights import check_weight, read_weights
from .cross_encoder import activation_of
from .places import check_adapter

_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def named_task(source: str | Path, asked: ProblemType | None = None) -> ProblemType:
    """The task of a model, which its configuration names; its weights are not loaded.

    Args:
        source: a folder or a hub id.
        asked: the task, if the model does not name it.

    Raises:
        ModelError: there is no such model, or its configuration is damaged or contradicts `asked`.
    """
    folder = resolve_model_dir(source)
    return problem_type_of(folder, load_config(folder), asked)


class Classifier:
    """A trained classifier or reranker without early exits.

    Args:
        source: a folder or a hub id.
        problem_type: the task, if the classifier does not name it.
        adapter: the folder of a PEFT adapter, which is merged into the weights.

    Attributes:
        folder: where it is.
        model: the Hugging Face model, in eval mode and float32.
        labels: in the order of its logits.
        problem_type: its task.
        activation: what makes a score of a logit of a reranker; None: it is a classifier.
        backbone: the adapter of the family, for the encoder of this model.
        layers: how many layers the encoder has.
        base_model: the hub id that it was given by; empty: a folder, or an adapter changed it.

    Raises:
        ModelError: files are missing or damaged, the family is not supported, there is no
            trained head, the model is a regression with several outputs or has one layer, the
            scores of a reranker have another activation, or the adapter cannot be merged.
        MissingExtraError: an adapter is given, and `peft` is not installed.
    """

    def __init__(
        self,
        source: str | Path,
        problem_type: ProblemType | None = None,
        adapter: Path | None = None,
    ) -> None:
        self.folder = resolve_model_dir(source)
        self.base_model = "" if adapter else repository_of(source) or ""
        config = load_config(self.folder)
        self.problem_type = problem_type_of(self.folder, config, problem_type)
        self.activation: Activation | None = None
        if self.problem_type is ProblemType.RANKING:
            self.activation = activation_of(self.folder, config)
        self.model = _load(self.folder, config, adapter)
        self.backbone = family_of(config.model_type)(self.model.base_model)
        self.layers = len(self.backbone.layers())
        if self.layers < 2:
            raise ModelError(
                f"{self.folder} has one layer, so there is no exit before its last",
                "give a model with at least two layers",
            )
        parts = self.backbone.classifier_parts()
        outputs = self.model.get_submodule(parts.classifier).out_features
        self.labels = label_names(self.folder, config, outputs)

    def exit_config(
        self, exits: tuple[int, ...], pooling: Pooling = Pooling.MEAN
    ) -> MultiExitConfig:
        """What a model of this classifier with exits is, without hidden layers.

        Args:
            exits: layers with an exit; the last layer has one in any case.
            pooling: what the other exits see.
        """
        parts = self.backbone.classifier_parts()
        norm = self.model.get_submodule(parts.norm) if parts.norm else None
        head = LastHead(Pooling(parts.pooling), parts.activation, norm.eps if norm else None)
        return MultiExitConfig(
            exits=(*exits, self.layers),
            labels=self.labels,
            problem_type=self.problem_type,
            pooling=pooling,
            last_head=head,
            activation=self.activation,
        )

    def multi_exit(self, config: MultiExitConfig) -> MultiExitModel:
        """A multi-exit model whose last exit gives the logits of the classifier.

        Args:
            config: of the model, see `exit_config`.

        Raises:
            ModelError: the head is not the usual one of the family.
        """
        encoder = build_encoder(self.model.config, attention=None)
        # Not strict: some classifiers lack their encoder's pooler, which then keeps its initial
        # weights.
        encoder.load_state_dict(self.model.base_model.state_dict(), strict=False)
        model = MultiExitModel(encoder, config)
        parts = self.backbone.classifier_parts()
        assert model.last_head is not None
        _copy(self.model.get_submodule(parts.dense), model.last_head.dense)
        _copy(self.model.get_submodule(parts.classifier), model.classifiers[-1])
        if parts.norm is not None:
            _copy(self.model.get_submodule(parts.norm), model.last_head.norm)
        self._check_head(model)
        return model

    @torch.no_grad()
    def _check_head(self, model: MultiExitModel) -> None:
        """Compare logits, because the head may not be the usual one of the model's family."""
        ids = torch.arange(16).view(2, 8) % int(model.backbone.config.vocab_size)
        mask = torch.ones_like(ids)
        logits = model.eval()(ids, mask)[-1]
        expected = self.model(ids, attention_mask=mask).logits
        difference = float(logit_differences(logits.numpy(), expected.numpy()).max())
        if not difference <= EXPORT_LIMIT:
            raise ModelError(
                f"{self.folder} does not have the usual head of its family: the logits of the last "
                f"exit differ from it by {difference:.2e} of their size",
                "train a model with new heads instead",
            )


def _load(folder: Path, config: Any, adapter: Path | None) -> Any:
    from transformers import AutoModelForSequenceClassification

    model, missing = load_pretrained(AutoModelForSequenceClassification, folder, config)
    if adapter is not None:
        model, replaced = _merged(model, adapter)
        missing = [name for name in missing if not replaced.intersection(name.split("."))]
    if missing:
        raise ModelError(
            f"{folder} has no trained head: it lacks {len(missing)} weights, first {missing[0]!r}",
            "give a trained AutoModelForSequenceClassification",
        )
    return model.eval()


def _merged(model: Any, adapter: Path) -> tuple[Any, set[str]]:
    """A model with a PEFT adapter merged into it, and the modules that the adapter replaces.

    Raises:
        ModelError: the adapter is damaged, of another base, or depends on the input.
        MissingExtraError: `peft` is not installed.
    """
    check_adapter(adapter)
    from peft import PeftModel

    # Before the library reads them, for which they may be anything.
    for name, value in read_weights(adapter, _ADAPTER_WEIGHTS).items():
        check_weight(adapter, name, value, value.shape)
    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter))
        # It has loaded the adapter already, but only this says what the model has no place for.
        unused = wrapped.load_adapter(str(adapter), wrapped.active_adapter).unexpected_keys
        replaced = set(wrapped.active_peft_config.modules_to_save or ())
        merged = wrapped.merge_and_unload(safe_merge=True)
    # AttributeError: prompts and the like have nothing to merge. The others: a setting is wrong, or
    # the names or the shapes of weights do not fit.
    except (*CONFIG_ERRORS, ImportError) as error:
        raise ModelError(
            f"the adapter {adapter} cannot be merged into this classifier: {first_line(error)}",
            "give the classifier that it was trained for, with as many labels; adapters that "
            "depend on the input, such as prompts, cannot be merged",
        ) from error
    if unused:
        raise ModelError(
            f"the adapter {adapter} has {len(unused)} weights that this classifier has no place "
            f"for, first {min(unused)!r}",
            "give the classifier that it was trained for",
        )
    return merged, replaced


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Copy weights; a bias that the source does not have becomes 0."""
    with torch.no_grad():
        for name, value in target.named_parameters():
            weight: Tensor | None = getattr(source, name)
            value.copy_(torch.zeros_like(value) if weight is None else weight)
