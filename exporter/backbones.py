"""One small adapter per encoder family: where its embeddings, layers and pooler are.

An adapter holds no modelling code: it only names the modules of the Hugging Face
implementation. To add a family, subclass `Backbone`, say how its parts are reached, add
it to `_FAMILIES`, and add a tiny model to `tests/conftest.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..runtime.errors import ModelError
from ..runtime.manifest import MASK_FILL


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


class Backbone:
    """How to reach the parts of one encoder family.

    Attributes:
        model_type: the family as `config.json` calls it.
        prefix: the prefix of the encoder's weights in a checkpoint.
        token_types: whether the embeddings take `token_type_ids`.
        carried: tensors that the embeddings make and every layer takes: name to symbolic
            shape. They travel with their rows.
        shared_layers: whether several layers are calls of one module.
    """

    model_type: ClassVar[str]
    prefix: ClassVar[str]
    token_types: ClassVar[bool] = True

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.config = encoder.config
        self.carried: dict[str, tuple[str | int, ...]] = {}

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

    def pooler(self) -> nn.Linear:
        """The dense layer of the pooler that all exits share."""
        dense: nn.Linear = self.encoder.pooler.dense
        return dense

    def max_positions(self) -> int:
        """The longest sequence that the position embeddings allow, special tokens included."""
        return int(self.config.max_position_embeddings)


class Bert(Backbone):
    """BERT."""

    model_type = "bert"
    prefix = "bert"


class _AlbertEmbeddings(Embeddings):
    def __init__(self, embeddings: nn.Module, mapping: nn.Module) -> None:
        super().__init__(embeddings)
        self.mapping = mapping

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.mapping(self.embeddings(input_ids, token_type_ids)), {}


class Albert(Backbone):
    """ALBERT: its layers share their weights, in one group or several."""

    model_type = "albert"
    prefix = "albert"

    def embeddings(self) -> Embeddings:
        """The embeddings and their mapping to the hidden size."""
        mapping = self.encoder.encoder.embedding_hidden_mapping_in
        return _AlbertEmbeddings(self.encoder.embeddings, mapping)

    def layers(self) -> list[nn.Module]:
        """One entry per call: the same group appears several times."""
        groups = self.encoder.encoder.albert_layer_groups
        count = self.config.num_hidden_layers
        return [groups[index * len(groups) // count] for index in range(count)]

    def pooler(self) -> nn.Linear:
        """ALBERT's pooler is the dense layer itself."""
        dense: nn.Linear = self.encoder.pooler
        return dense


class _MPNetEmbeddings(Embeddings):
    def __init__(self, embeddings: nn.Module, position_bias: nn.Module) -> None:
        super().__init__(embeddings)
        self.position_bias = position_bias

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        hidden_states = self.embeddings(input_ids)
        return hidden_states, {"position_bias": self.position_bias(hidden_states)}

    def frozen(self, max_positions: int) -> Embeddings:
        longest = torch.zeros(1, max_positions, 1)
        with torch.no_grad():
            table = _PositionBiasTable(self.position_bias(longest))
        return _MPNetEmbeddings(self.embeddings, table)


class _PositionBias(nn.Module):
    """The relative position bias of MPNet: the same for every row, so computed for one."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        # Registered alone, so that an exported segment does not hold the layers' weights.
        self.relative_attention_bias = encoder.relative_attention_bias
        self._compute = type(encoder).compute_position_bias
        self.relative_position_bucket = type(encoder).relative_position_bucket

    def forward(self, hidden_states: Tensor) -> Tensor:
        bias: Tensor = self._compute(self, hidden_states[:1])
        return bias


class _PositionBiasTable(nn.Module):
    """The same by distance: looked up, where computing it takes forty small operations.

    Args:
        longest: `[1, heads, positions, positions]`, the bias of the longest sequence.
    """

    def __init__(self, longest: Tensor) -> None:
        super().__init__()
        self.positions = longest.shape[-1]
        # Distance key - query, from 1 - positions on: the first column, then the first row.
        by_distance = torch.cat([longest[0, :, 1:, 0].flip(-1), longest[0, :, 0, :]], dim=-1)
        self.register_buffer("by_distance", by_distance)

    def forward(self, hidden_states: Tensor) -> Tensor:
        positions = torch.arange(hidden_states.shape[1])
        distance = positions[None, :] - positions[:, None] + self.positions - 1
        return self.get_buffer("by_distance")[:, distance][None]


class MPNet(Backbone):
    """MPNet: the first segment computes a relative position bias that every layer adds."""

    model_type = "mpnet"
    prefix = "mpnet"
    token_types = False

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        heads = int(self.config.num_attention_heads)
        self.carried = {"position_bias": (1, heads, "sequence", "sequence")}

    def embeddings(self) -> Embeddings:
        """The embeddings, and the position bias `[1, heads, sequence, sequence]`."""
        return _MPNetEmbeddings(self.encoder.embeddings, _PositionBias(self.encoder.encoder))

    def max_positions(self) -> int:
        """Positions start after the padding index, as in RoBERTa."""
        return int(self.config.max_position_embeddings) - int(self.config.pad_token_id) - 1


_FAMILIES: dict[str, type[Backbone]] = {
    family.model_type: family for family in (Bert, Albert, MPNet)
}


def family_of(model_type: str) -> type[Backbone]:
    """The adapter of a family.

    Raises:
        ModelError: no adapter for this family.
    """
    if model_type not in _FAMILIES:
        raise ModelError(
            f"the encoder family {model_type!r} is not supported; "
            f"supported: {', '.join(sorted(_FAMILIES))}",
            "train on a backbone of one of these families, or add an adapter to "
            "exporter/backbones.py",
        )
    return _FAMILIES[model_type]


def build_encoder(config: Any, attention: str | None = "eager") -> Any:
    """A randomly initialised Hugging Face encoder in float32.

    Args:
        config: a `PretrainedConfig` of a supported family.
        attention: Hugging Face's attention implementation; export needs `eager`. None takes
            the fastest that the family has.
    """
    from transformers import AutoModel

    family_of(config.model_type)
    build: Any = AutoModel.from_config
    return build(config, attn_implementation=attention, dtype=torch.float32)
