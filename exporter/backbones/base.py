"""What an adapter is: how to reach the embeddings, layers and head of an encoder family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ...runtime.artifact.manifest import MASK_FILL, Size


def attention_bias(attention_mask: Tensor) -> Tensor:
    """Additive attention bias `[rows, 1, 1, sequence]` float32 of a 0/1 mask `[rows, sequence]`."""
    return (1.0 - attention_mask[:, None, None, :].float()) * MASK_FILL


class Embeddings(nn.Module):
    """Token ids to the first hidden states, and to what the layers need besides them."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states `[rows, sequence, hidden]`, and carried tensors by name."""
        return self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids), {}

    def frozen(self, max_positions: int) -> Embeddings:
        """The same with what no text changes computed ahead: less to do in a segment."""
        return self


class Block(nn.Module):
    """One encoder layer: hidden states in, hidden states out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, attention_bias: Tensor, **carried: Tensor) -> Tensor:
        """Hidden states `[rows, sequence, hidden]` after this layer."""
        output = self.layer(hidden_states, attention_bias, **carried)
        # Which of the two depends on the family: MPNet's layers give (hidden, attentions...).
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def frozen(self, max_positions: int) -> Block:
        """The same with what no text changes computed ahead: less to do in a segment."""
        return self


@dataclass(frozen=True)
class ClassifierParts:
    """Where a plain classifier of a family (`AutoModelForSequenceClassification`) has its head.

    What they all do: pool, dense layer, activation, perhaps a norm, linear classifier.

    Attributes:
        dense: name of the dense layer.
        classifier: name of the linear layer that gives the logits.
        activation: after the dense layer, as `transformers` calls it.
        norm: name of the layer norm after the activation, if there is one.
        pooling: what the dense layer sees: `cls`, the first token, or `mean`.
    """

    dense: str
    classifier: str = "classifier"
    activation: str = "tanh"
    norm: str | None = None
    pooling: str = "cls"


class Backbone:
    """How to reach the parts of one encoder family.

    Attributes:
        model_type: the family as `config.json` calls it.
        prefix: the prefix of the encoder's weights in a checkpoint.
        carried: tensors that the embeddings make and every layer takes: name to symbolic
            shape. They travel with their rows.
        token_types: whether the embeddings take `token_type_ids`.
        shared_layers: whether several layers are calls of one module.
    """

    model_type: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.config = encoder.config
        self.carried: dict[str, tuple[Size, ...]] = {}

    @property
    def token_types(self) -> bool:
        """Whether there is more than one type of token, as in the texts of a pair."""
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
        """The encoder layers in depth order; a shared layer is listed once per call."""
        return list(self.encoder.encoder.layer)

    def blocks(self) -> list[Block]:
        """The encoder layers in depth order, as modules that all take the same."""
        return [Block(layer) for layer in self.layers()]

    def norm(self) -> nn.Module | None:
        """The norm that follows the last layer, where layers end without one: every exit has it."""
        return None

    def pooler(self) -> nn.Linear | None:
        """The dense layer of the pooler that all exits share; None: the family has no pooler."""
        return None

    def head_dropout(self) -> float:
        """The dropout before a classifier, in training."""
        dropout = getattr(self.config, "classifier_dropout", None)
        if dropout is None:
            dropout = getattr(self.config, "hidden_dropout_prob", 0.0)
        return float(dropout or 0.0)

    def classifier_parts(self) -> ClassifierParts:
        """Where a plain classifier of this family has its head."""
        return ClassifierParts(dense="classifier.dense", classifier="classifier.out_proj")

    def max_positions(self) -> int:
        """The longest sequence that the model was made for, special tokens included."""
        return int(self.config.max_position_embeddings)
