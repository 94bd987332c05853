"""The multi-exit model: an encoder with a classifier after chosen layers.

State-dict layout (that of PABEE, F-PABEE, PCEE-BERT and EPEE training code): the encoder
under its usual prefix, the pooler inside it (without use in `Pooling.MEAN`), and
`classifiers.{i}.weight/bias` for exit i from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import ModelError
from ..runtime.manifest import ProblemType
from .backbones import Backbone, Block, Embeddings, attention_bias, family_of


class Pooling(str, Enum):
    """What an exit's classifier sees of the hidden states."""

    CLS = "cls"
    """The first token, through a dense layer with tanh that all exits share (PABEE)."""
    MEAN = "mean"
    """The mean over real tokens: early exits learn far more with it, and cost far less."""


@dataclass(frozen=True)
class MultiExitConfig:
    """What makes an encoder a multi-exit classifier.

    Attributes:
        exits: the layer after which each exit sits, counted from 1, ascending.
        labels: label names in the order of the logits.
        problem_type: single-label or multi-label classification.
        pooling: what the heads see.
    """

    exits: tuple[int, ...]
    labels: tuple[str, ...]
    problem_type: ProblemType = ProblemType.SINGLE_LABEL
    pooling: Pooling = Pooling.CLS

    def validate(self, layers: int) -> None:
        """Check the exits against an encoder's depth.

        Raises:
            ModelError: exits are not ascending layers between 1 and `layers`.
        """
        if not self.exits or list(self.exits) != sorted(set(self.exits)):
            raise ModelError(
                f"exits {list(self.exits)} are not an ascending list of layers",
                f"give layers between 1 and {layers}, for example 2,4,{layers}",
            )
        if self.exits[0] < 1 or self.exits[-1] > layers:
            raise ModelError(
                f"exits {list(self.exits)} do not fit an encoder of {layers} layers",
                f"give layers between 1 and {layers}",
            )


def token_weights(attention_bias: Tensor) -> Tensor:
    """Weights `[rows, 1, sequence]` that make a sum over tokens the mean over real ones.

    Args:
        attention_bias: `[rows, 1, 1, sequence]`, 0 on real tokens and MASK_FILL on padding.
    """
    # So its softmax is 1/n on the n real tokens, and 0 on padding.
    return torch.softmax(attention_bias.squeeze(1), dim=-1)


class Head(nn.Module):
    """Exit head: pool the hidden states, then a linear classifier.

    Args:
        classifier: hidden size to labels.
        pooler: the dense layer of `Pooling.CLS`; None is `Pooling.MEAN`.
        dropout: before the classifier, in training.
    """

    def __init__(self, classifier: nn.Linear, pooler: nn.Linear | None, dropout: float) -> None:
        super().__init__()
        self.pooler = pooler
        self.classifier = classifier
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, token_weights: Tensor | None) -> Tensor:
        """Logits `[rows, labels]`.

        Args:
            hidden_states: `[rows, sequence, hidden]`.
            token_weights: see `token_weights`; only `Pooling.MEAN` reads them.
        """
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(hidden_states[:, 0]))
        else:
            assert token_weights is not None
            pooled = (token_weights @ hidden_states).squeeze(1)
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits


class MultiExitModel(nn.Module):
    """An encoder with one classifier per exit.

    Args:
        encoder: a Hugging Face encoder with a pooler (see `backbones`).
        config: exits, labels, task and pooling.

    Raises:
        ModelError: the family is not supported, or the exits do not fit the encoder.
    """

    def __init__(self, encoder: Any, config: MultiExitConfig) -> None:
        super().__init__()
        self.exit_config = config
        self.backbone: Backbone = family_of(encoder.config.model_type)(encoder)
        layers = self.backbone.layers()
        config.validate(len(layers))
        self.add_module(self.backbone.prefix, encoder)
        hidden = int(encoder.config.hidden_size)
        self.classifiers = nn.ModuleList(
            nn.Linear(hidden, len(config.labels)) for _ in config.exits
        )
        # Views of modules registered above; tuples keep them out of the state dict.
        self._parts = (
            self.backbone.embeddings(),
            tuple(Block(layer) for layer in layers),
            tuple(self._head(classifier) for classifier in self.classifiers),
        )

    def _head(self, classifier: nn.Module) -> Head:
        assert isinstance(classifier, nn.Linear)
        dropout = getattr(self.backbone.config, "classifier_dropout", None)
        if dropout is None:
            dropout = getattr(self.backbone.config, "hidden_dropout_prob", 0.0)
        pooler = self.backbone.pooler() if self.exit_config.pooling is Pooling.CLS else None
        return Head(classifier, pooler, float(dropout or 0.0))

    @property
    def parts(self) -> tuple[Embeddings, tuple[Block, ...], tuple[Head, ...]]:
        """Embeddings, one block per layer, one head per exit: what segments are cut from."""
        return self._parts

    def train(self, mode: bool = True) -> MultiExitModel:
        """Set the mode of the model and of the heads, which are not registered modules."""
        super().train(mode)
        for head in self._parts[2]:
            head.train(mode)
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits of all exits.

        Args:
            input_ids: `[rows, sequence]` int64.
            attention_mask: `[rows, sequence]`, 1 for real tokens.
            token_type_ids: `[rows, sequence]` int64, for families that have them.

        Returns:
            `[exits, rows, labels]` float32.
        """
        embeddings, blocks, heads = self._parts
        bias = attention_bias(attention_mask)
        weights = token_weights(bias)
        hidden_states, carried = embeddings(input_ids, token_type_ids)
        head_of = dict(zip(self.exit_config.exits, heads, strict=True))
        logits = []
        for layer, block in enumerate(blocks[: self.exit_config.exits[-1]], start=1):
            hidden_states = block(hidden_states, bias, **carried)
            if layer in head_of:
                logits.append(head_of[layer](hidden_states, weights).float())
        return torch.stack(logits)
