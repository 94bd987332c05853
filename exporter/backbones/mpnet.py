"""MPNet: a relative position bias, computed once, that every layer adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import CarryingEmbeddings, Embeddings
from .bert import Roberta

_BIAS = "position_bias"


class _PositionBias(nn.Module):
    """The relative position bias of MPNet; it is the same for every row."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        # Registered one by one, so that a segment does not contain the weights of the layers.
        self.relative_attention_bias = encoder.relative_attention_bias
        self._compute = type(encoder).compute_position_bias
        self.relative_position_bucket = type(encoder).relative_position_bucket

    def forward(self, hidden_states: Tensor) -> Tensor:
        bias: Tensor = self._compute(self, hidden_states[:1])
        return bias


class _PositionBiasTable(nn.Module):
    """The position bias in a table, because computing it takes forty small operations.

    Args:
        longest: `[1, heads, positions, positions]`, the bias of the longest sequence.
    """

    def __init__(self, longest: Tensor) -> None:
        super().__init__()
        self.positions = longest.shape[-1]
        # Distances key - query in ascending order from 1 - positions.
        by_distance = torch.cat([longest[0, :, 1:, 0].flip(-1), longest[0, :, 0, :]], dim=-1)
        self.register_buffer("by_distance", by_distance)

    def forward(self, hidden_states: Tensor) -> Tensor:
        positions = torch.arange(hidden_states.shape[1])
        distance = positions[None, :] - positions[:, None] + self.positions - 1
        return self.get_buffer("by_distance")[:, distance][None]


class MPNet(Roberta):
    """MPNet: the first segment computes a relative position bias that every layer adds."""

    model_type = "mpnet"
    prefix = "mpnet"

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        heads = int(self.config.num_attention_heads)
        self.carried = {_BIAS: (1, heads, "sequence", "sequence")}

    def embeddings(self) -> Embeddings:
        """The embeddings, and the position bias `[1, heads, sequence, sequence]`."""
        bias = _PositionBias(self.encoder.encoder)
        return CarryingEmbeddings(self.encoder.embeddings, _BIAS, bias, _PositionBiasTable)
