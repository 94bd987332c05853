"""MPNet: a relative position bias, computed once, that every layer adds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import DistanceTable, Embeddings
from .bert import Roberta

_BIAS = "position_bias"


class MPNet(Roberta):
    """MPNet: the first segment computes a relative position bias that every layer adds."""

    def __init__(self, encoder: Any) -> None:
        super().__init__(encoder)
        heads = int(self.config.num_attention_heads)
        self.carried = {_BIAS: (1, heads, "sequence", "sequence")}

    def embeddings(self) -> Embeddings:
        """The embeddings, and the position bias `[1, heads, sequence, sequence]`.

        An export reads it from a table, because computing it takes many small operations.
        """

        # Not a module, so that segment 1 does not contain the weights of the layers.
        def bias(hidden_states: Tensor) -> Tensor:
            position_bias: Tensor = self.encoder.encoder.compute_position_bias(hidden_states[:1])
            return position_bias

        return Embeddings(self.encoder.embeddings, None, _BIAS, bias, DistanceTable)
