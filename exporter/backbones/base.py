"""The base of all adapters: how to reach the embeddings, layers and head of an encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.artifact.manifest import MASK_FILL, Size


def attention_bias(attention_mask: Tensor) -> Tensor:
    """The additive bias `[rows, 1, 1, sequence]` float32 for a 0/1 mask `[rows, sequence]`."""
    return (1.0 - attention_mask[:, None, None, :].float()) * MASK_FILL


class Embeddings(nn.Module):
    """From token ids to the first hidden states, and perhaps a tensor that all layers read.

    Args:
        embeddings: the embeddings of the encoder.
        mapping: projects them to the hidden size, if they are narrower.
        name: of the tensor that is carried from layer to layer.
        carried: makes that tensor; it reads the shape of the hidden states only. None: there is no
            such tensor.
        table: builds a module that does the same, from the tensor of the longest sequence.
    """

    def __init__(
        self,
        embeddings: nn.Module,
        mapping: nn.Module | None = None,
        name: str = "",
        carried: Callable[[Tensor], Tensor] | None = None,
        table: Callable[[Tensor], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.mapping = nn.Identity() if mapping is None else mapping
        self.name = name
        self.carried = carried
        self.table = table

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states `[rows, sequence, hidden]`, and the carried tensor by its name."""
        # By position: families without token types have another optional argument there.
        hidden_states = self.mapping(self.embeddings(input_ids, token_type_ids))
        return hidden_states, {self.name: self.carried(hidden_states)} if self.carried else {}

    def frozen(self, max_positions: int) -> Embeddings:
        """The same module, with everything that does not depend on the text computed in advance."""
        if self.carried is None:
            return self
        with torch.no_grad():
            table = self.table(self.carried(torch.zeros(1, max_positions, 1)))
        return Embeddings(self.embeddings, self.mapping, self.name, table, self.table)


class DistanceTable(nn.Module):
    """A table of values that depend on the distance of two tokens only.

    Args:
        longest: `[..., positions, positions]` for the longest sequence, by query and key.
    """

    def __init__(self, longest: Tensor) -> None:
        super().__init__()
        self.positions = longest.shape[-1]
        # Distances key - query in ascending order from 1 - positions.
        by_distance = torch.cat([longest[..., 1:, 0].flip(-1), longest[..., 0, :]], dim=-1)
        self.register_buffer("by_distance", by_distance)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., sequence, sequence]` for hidden states `[rows, sequence, hidden]`."""
        positions = torch.arange(hidden_states.shape[1])
        distance = positions[None, :] - positions[:, None] + self.positions - 1
        return self.get_buffer("by_distance")[..., distance]


class Block(nn.Module):
    """One encoder layer, from hidden states to hidden states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, attention_bias: Tensor, **carried: Tensor) -> Tensor:
        """Hidden states `[rows, sequence, hidden]` after this layer."""
        output = self.layer(hidden_states, attention_bias, **carried)
        # Some families, such as MPNet, return a tuple of hidden states and attentions.
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def frozen(self, max_positions: int) -> Block:
        """The same module, with everything that does not depend on the text computed in advance."""
        return self


@dataclass(frozen=True)
class ClassifierParts:
    """The head of a plain classifier of a family (`AutoModelForSequenceClassification`).

    In all families it pools and has a dense layer, an activation, perhaps a layer norm, and a
    linear classifier.

    Attributes:
        dense: name of the dense layer.
        classifier: name of the linear layer that gives the logits.
        activation: after the dense layer, by its name in `transformers`.
        norm: name of the layer norm after the activation; None: there is none.
        pooling: what the dense layer sees: `cls` (the first token) or `mean`.
    """

    dense: str
    classifier: str = "classifier"
    activation: str = "tanh"
    norm: str | None = None
    pooling: str = "cls"


class Backbone:
    """How to reach the parts of one encoder family.

    Args:
        encoder: a Hugging Face encoder of the family.

    Attributes:
        model_type: the name of the family in `config.json`.
        prefix: the prefix of the encoder's weights in a checkpoint.
        encoder: the encoder.
        config: its configuration.
        carried: symbolic shapes, by name, of the tensors that the embeddings make and every layer
            reads. They have no axis `batch`, so all rows of a group share them.
    """

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.config = encoder.config
        self.model_type: str = self.config.model_type
        self.prefix: str = encoder.base_model_prefix
        self.carried: dict[str, tuple[Size, ...]] = {}

    @property
    def token_types(self) -> bool:
        """Whether the embeddings distinguish types of tokens, such as the two texts of a pair."""
        return int(getattr(self.config, "type_vocab_size", 0)) > 1

    @property
    def shared_layers(self) -> bool:
        """Whether several layers are calls of one module (ALBERT)."""
        layers = self.layers()
        return len({id(layer) for layer in layers}) < len(layers)

    def embeddings(self) -> Embeddings:
        """The embeddings, as a module of token ids."""
        return Embeddings(self.encoder.embeddings)

    def layers(self) -> list[nn.Module]:
        """The encoder layers in depth order; a shared layer is listed once for each call."""
        return list(self.encoder.encoder.layer)

    def blocks(self) -> list[Block]:
        """The encoder layers in depth order, as modules with the same arguments in all families."""
        return [Block(layer) for layer in self.layers()]

    def norm(self) -> nn.Module | None:
        """The norm after the last layer, which every exit applies; None: layers end with a norm."""
        return None

    def pooler(self) -> nn.Linear | None:
        """The dense layer of the encoder's pooler, which all exits share; None: there is none."""
        pooler = getattr(self.encoder, "pooler", None)
        dense: nn.Linear | None = getattr(pooler, "dense", pooler)  # ALBERT's is the layer itself
        return dense

    def head_dropout(self) -> float:
        """The dropout before a classifier, in training."""
        dropout = getattr(self.config, "classifier_dropout", None)
        if dropout is None:
            dropout = getattr(self.config, "hidden_dropout_prob", 0.0)
        return float(dropout or 0.0)

    def classifier_parts(self) -> ClassifierParts:
        """The head of a plain classifier of this family."""
        return ClassifierParts(dense="classifier.dense", classifier="classifier.out_proj")

    def max_positions(self) -> int:
        """The longest sequence that the model takes, including special tokens."""
        return int(self.config.max_position_embeddings)
