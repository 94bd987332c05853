"""DeBERTa-v2 and v3: attention over contents and relative positions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .base import Backbone, Block, ClassifierParts, DistanceTable

# From hidden states to the ids of relative positions `[1, sequence, sequence]` int64, and the
# embeddings `[ids, hidden]` of all ids; both are None without relative attention.
_RelativePositions = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


class _RelativePositionsTable(nn.Module):
    """The relative positions in a table, because computing them takes a dozen small operations.

    Args:
        longest: `[1, positions, positions]`, the ids of the longest sequence.
        embeddings: `[ids, hidden]`.
    """

    def __init__(self, longest: Tensor, embeddings: Tensor) -> None:
        super().__init__()
        self.ids = DistanceTable(longest[0])
        self.register_buffer("embeddings", embeddings)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.ids(hidden_states)[None], self.get_buffer("embeddings")


class _DebertaBlock(Block):
    """A layer; the first may be combined with a convolution over the embeddings."""

    def __init__(
        self, layer: nn.Module, positions: _RelativePositions, conv: nn.Module | None
    ) -> None:
        super().__init__(layer)
        self.positions = positions
        self.conv = conv

    def forward(self, hidden_states: Tensor, attention_bias: Tensor, **carried: Tensor) -> Tensor:
        ids, embeddings = self.positions(hidden_states)
        real = attention_bias == 0
        # The layer takes a mask of the real tokens instead of a bias.
        after: Tensor = self.layer(
            hidden_states, real, relative_pos=ids, rel_embeddings=embeddings
        )[0]
        if self.conv is None:
            return after
        mask = real[:, 0, 0, :].to(hidden_states.dtype)
        # The convolution must not see padding, so that its length does not matter.
        convolved: Tensor = self.conv(hidden_states * mask[:, :, None], after, mask)
        return convolved

    def frozen(self, max_positions: int) -> Block:
        with torch.no_grad():
            ids, embeddings = self.positions(torch.zeros(1, max_positions, 1))
        if ids is None or embeddings is None:
            return self
        return _DebertaBlock(self.layer, _RelativePositionsTable(ids, embeddings), self.conv)


class DebertaV2(Backbone):
    """DeBERTa-v2 and v3, which share their model type.

    Relative positions do not limit the length, but the model was trained up to `max_positions`.
    """

    def blocks(self) -> list[Block]:
        """The layers; each has its own copy of the table of relative positions, which is small."""
        encoder = self.encoder.encoder

        # Not a module, so that a segment does not contain the weights of other layers.
        def positions(hidden_states: Tensor) -> tuple[Tensor | None, Tensor | None]:
            return encoder.get_rel_pos(hidden_states), encoder.get_rel_embedding()

        first, *others = self.layers()
        return [
            _DebertaBlock(first, positions, encoder.conv),
            *(_DebertaBlock(layer, positions, None) for layer in others),
        ]

    def classifier_parts(self) -> ClassifierParts:
        """Its pooler is not part of the encoder."""
        return ClassifierParts(dense="pooler.dense", activation=self.config.pooler_hidden_act)
