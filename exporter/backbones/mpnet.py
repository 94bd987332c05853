"""MPNet: a relative position bias, computed once, that every layer adds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import CarryingEmbeddings, DistanceTable, Embeddings
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


class MPNet(Roberta):
    """MPNet: the first segment computes a relative position bias that every layer adds."""

    model_type = "mpnet"
    prefix = "mpnet"

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        heads = int(self.config.num_attention_heads)
        self.carried = {_BIAS: (1, heads, "sequence", "sequence")}

    def embeddings(self) -> Embeddings:
        """The embeddings, and the position bias `[1, heads, sequence, sequence]`.

        An export reads it from a table, because computing it takes forty small operations.
        """
        bias = _PositionBias(self.encoder.encoder)
        return CarryingEmbeddings(self.encoder.embeddings, _BIAS, bias, DistanceTable)
