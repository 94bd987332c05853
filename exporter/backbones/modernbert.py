"""ModernBERT: rotary positions, and layers with local attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.artifact.manifest import MASK_FILL
from ...runtime.errors import ModelError
from .base import Backbone, Block, ClassifierParts, Embeddings

ROTARY = "rotary"

# Types of rotary positions that depend on the length of the text.
_BY_LENGTH = ("dynamic", "longrope")


class _RotaryTable(nn.Module):
    """Cosines and sines from a table, because 16-bit floats are too coarse to compute them.

    Args:
        longest: the cosines and sines of the longest sequence.
    """

    def __init__(self, longest: Tensor) -> None:
        super().__init__()
        self.register_buffer("longest", longest)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.get_buffer("longest")[:, torch.arange(hidden_states.shape[1])]


class _ModernBertBlock(Block):
    """A layer.

    Args:
        layer: the layer.
        kind: the number of its kind of rotary positions.
        reach: how far it attends in either direction; None: over the whole text.
    """

    def __init__(self, layer: nn.Module, kind: int, reach: int | None) -> None:
        super().__init__(layer)
        self.kind = kind
        self.reach = reach

    def forward(self, hidden_states: Tensor, attention_bias: Tensor, **carried: Tensor) -> Tensor:
        cosine, sine = carried[ROTARY][2 * self.kind :][:2, None]
        bias = attention_bias
        if self.reach is not None:
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            near = (positions[:, None] - positions[None, :]).abs() <= self.reach
            # Not a sum of two biases, which could overflow in fp16.
            bias = torch.where(near, bias, MASK_FILL)
        hidden: Tensor = self.layer(
            hidden_states, attention_mask=bias, position_embeddings=(cosine, sine)
        )
        return hidden


class ModernBert(Backbone):
    """ModernBERT: the first segment computes rotary positions; every exit has the final norm."""

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        self._kinds = tuple(sorted(set(self.config.layer_types)))
        for kind in self._kinds:
            rope = self.config.rope_parameters[kind]["rope_type"]
            if rope in _BY_LENGTH:
                raise ModelError(
                    f"the rotary positions of this model are of type {rope!r}, which depend on "
                    "the length of the text",
                    "use a model whose rope_parameters in config.json have another rope_type",
                )
        size = int(self.config.hidden_size) // int(self.config.num_attention_heads)
        self.carried = {ROTARY: (2 * len(self._kinds), "sequence", size)}

    def embeddings(self) -> Embeddings:
        """The embeddings, and the rotary positions `[2 * kinds, sequence, head size]`.

        They are a cosine and a sine for each kind of layers.
        """
        rotate = self.encoder.rotary_emb

        def rotary(hidden: Tensor) -> Tensor:
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            parts = [rotate(hidden, positions, kind) for kind in self._kinds]
            return torch.cat([each for part in parts for each in part])

        return Embeddings(self.encoder.embeddings, None, ROTARY, rotary, _RotaryTable)

    def layers(self) -> list[nn.Module]:
        """The layers of the model itself."""
        return list(self.encoder.layers)

    def blocks(self) -> list[Block]:
        """The layers, some of which have local attention, as the configuration says."""
        return [
            _ModernBertBlock(
                layer,
                self._kinds.index(kind),
                int(self.config.sliding_window) if kind == "sliding_attention" else None,
            )
            for layer, kind in zip(self.layers(), self.config.layer_types, strict=True)
        ]

    def norm(self) -> nn.Module | None:
        """The final norm: layers only add to the hidden states, so exits must scale them."""
        norm: nn.Module = self.encoder.final_norm
        return norm

    def classifier_parts(self) -> ClassifierParts:
        """Its head, for which the configuration names activation and pooling."""
        return ClassifierParts(
            dense="head.dense",
            activation=self.config.classifier_activation,
            norm="head.norm",
            pooling=self.config.classifier_pooling,
        )
