"""The multi-exit model: an encoder with a classifier after chosen layers.

The state dict has the layout of PABEE, F-PABEE, PCEE-BERT and EPEE training code: the encoder under
its usual prefix, with the pooler (which only `Pooling.CLS` uses), and
`classifiers.{i}.weight/bias` for exit i from 0. Our additions are `pooler.dense`, for families
whose encoder has no pooler, `hidden.{i}.dense`, for exits with a hidden layer,
`queries.{i}`, for exits with `Pooling.ATTENTION`, and `last_head.dense` and `last_head.norm`, for a
last exit that was the head of a plain classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..calibration.progress import Progress, silent
from ..runtime.artifact.manifest import ATTENTION_BIAS
from ..runtime.encoding import EncodedRow, padded_inputs
from .backbones import family_of
from .backbones.base import Backbone, Block, Embeddings, attention_bias
from .exit_config import MultiExitConfig, Pooling


def new_queries(hidden: int, count: int) -> nn.Linear:
    """Queries of `Pooling.ATTENTION` that have learnt nothing: all tokens count alike.

    From random queries, exits learn to agree with the classifier far less often.

    Args:
        hidden: the size of the states.
        count: how many there are.
    """
    queries = nn.Linear(hidden, count, bias=False)
    nn.init.zeros_(queries.weight)
    return queries


class Transform(nn.Module):
    """The part of a head between pooling and classifier: a dense layer, an activation, a norm.

    Args:
        dense: from the pooled size to that of the result.
        activation: by its name in `transformers`.
        norm: after the activation; None: no norm.
    """

    def __init__(
        self, dense: nn.Linear, activation: str = "tanh", norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        self.dense = dense
        self.activation = ACT2FN[activation]
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, pooled: Tensor) -> Tensor:
        """`[rows, size of the result]` from `[rows, pooled size]`."""
        transformed: Tensor = self.norm(self.activation(self.dense(pooled)))
        return transformed


class Head(nn.Module):
    """The head of an exit: norm, pooling, a transformation, and a linear classifier.

    Args:
        classifier: from the size of what is before it to labels.
        pooling: how hidden states are pooled.
        pooler: between pooling and classifier; None: nothing.
        queries: scores each token for each query, with `Pooling.ATTENTION`; otherwise None.
        norm: before pooling; None: no norm.
        dropout: before the classifier, in training.
    """

    def __init__(
        self,
        classifier: nn.Linear,
        pooling: Pooling,
        pooler: Transform | None = None,
        queries: nn.Linear | None = None,
        norm: nn.Module | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm = nn.Identity() if norm is None else norm
        self.queries = queries
        self.pooler = nn.Identity() if pooler is None else pooler
        self.classifier = classifier
        self.dropout = nn.Dropout(dropout)

    @property
    def weighs(self) -> bool:
        """Whether it pools a weighted sum over the tokens, for which it reads the mask."""
        return self.pooling in (Pooling.MEAN, Pooling.BOTH, Pooling.ATTENTION)

    def forward(self, hidden_states: Tensor, attention_bias: Tensor | None) -> Tensor:
        """Logits `[rows, labels]`.

        Args:
            hidden_states: `[rows, sequence, hidden]`.
            attention_bias: `[rows, 1, 1, sequence]`, 0 on real tokens and MASK_FILL on padding;
                None is allowed unless `weighs`.
        """
        return self.classify(self.pool(hidden_states, attention_bias))

    def pool(self, hidden_states: Tensor, attention_bias: Tensor | None) -> Tensor:
        """`[rows, pooled size]`; for the arguments, see `forward`."""
        pooled = []
        if self.weighs:
            assert attention_bias is not None
            states = self.norm(hidden_states)
            weights = self.token_weights(states, attention_bias.squeeze(1))
            pooled.append((weights @ states).flatten(1))
        if self.pooling in (Pooling.CLS, Pooling.FIRST, Pooling.BOTH):
            pooled.append(self.norm(hidden_states[:, 0]))
        return torch.cat(pooled, dim=-1) if len(pooled) > 1 else pooled[0]

    def token_weights(self, states: Tensor, attention_bias: Tensor) -> Tensor:
        """How much each token counts: `[rows, queries, sequence]`; without queries, all alike.

        Args:
            states: `[rows, sequence, hidden]`.
            attention_bias: `[rows, 1, sequence]`. On padding, the softmax of MASK_FILL is 0 or, on
                some processors, a number next to 0: nothing may ask whether it is 0.
        """
        if self.queries is None:
            return torch.softmax(attention_bias, dim=-1)
        return torch.softmax(self.queries(states).transpose(1, 2) + attention_bias, dim=-1)

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits `[rows, labels]` of `[rows, pooled size]`."""
        logits: Tensor = self.classifier(self.dropout(self.pooler(pooled)))
        return logits


class MultiExitModel(nn.Module):
    """An encoder with one classifier for each exit.

    Args:
        encoder: a Hugging Face encoder (see `backbones`).
        config: exits, labels, task and pooling.

    Attributes:
        exit_config: the same.
        backbone: the adapter of the encoder's family.
        parts: the embeddings, one block for each layer, and one head for each exit.

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
        pooled = hidden * (2 if config.pooling is Pooling.BOTH else max(1, config.queries))
        width = config.hidden_width or hidden
        sizes = [width if n < config.hidden_layers else pooled for n in range(len(config.exits))]
        if config.last_head is not None:
            sizes[-1] = hidden
        self.classifiers = nn.ModuleList(nn.Linear(size, len(config.labels)) for size in sizes)
        own_pooler = config.pooling is Pooling.CLS and self.backbone.pooler() is None
        self.pooler = Transform(nn.Linear(hidden, hidden)) if own_pooler else None
        self.hidden = nn.ModuleList(
            Transform(nn.Linear(pooled, width), "gelu") for _ in range(config.hidden_layers)
        )
        attending = len(config.exits) - (config.last_head is not None) if config.queries else 0
        self.queries = nn.ModuleList(new_queries(hidden, config.queries) for _ in range(attending))
        self.last_head: Transform | None = None
        if (form := config.last_head) is not None:
            norm = None if form.norm_eps is None else nn.LayerNorm(hidden, eps=form.norm_eps)
            self.last_head = Transform(nn.Linear(hidden, hidden), form.activation, norm)
        # Their modules are registered above; tuples keep them out of the state dict.
        self.parts: tuple[Embeddings, tuple[Block, ...], tuple[Head, ...]] = (
            self.backbone.embeddings(),
            tuple(self.backbone.blocks()),
            tuple(self._head(number) for number in range(len(config.exits))),
        )

    def _head(self, number: int) -> Head:
        config = self.exit_config
        pooling = self.exit_config.pooling
        pooler = None
        if config.last_head is not None and number + 1 == len(self.classifiers):
            pooling = config.last_head.pooling
            pooler = self.last_head
        elif number < len(self.hidden):
            pooler = cast(Transform, self.hidden[number])
        elif pooling is Pooling.CLS:
            dense = self.backbone.pooler()
            pooler = self.pooler if dense is None else Transform(dense)
        classifier = cast(nn.Linear, self.classifiers[number])
        queries = cast(nn.Linear, self.queries[number]) if number < len(self.queries) else None
        backbone = self.backbone
        return Head(classifier, pooling, pooler, queries, backbone.norm(), backbone.head_dropout())

    def train(self, mode: bool = True) -> MultiExitModel:
        """Set the mode of the model and of the heads, which are not registered modules."""
        super().train(mode)
        for head in self.parts[2]:
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
        embeddings, blocks, heads = self.parts
        bias = attention_bias(attention_mask)
        types = token_type_ids if self.backbone.token_types else None
        hidden_states, carried = embeddings(input_ids, types)
        head_of = dict(zip(self.exit_config.exits, heads, strict=True))
        logits = []
        for layer, block in enumerate(blocks[: self.exit_config.exits[-1]], start=1):
            hidden_states = block(hidden_states, bias, **carried)
            if layer in head_of:
                logits.append(head_of[layer](hidden_states, bias).float())
        return torch.stack(logits)


def model_inputs(rows: Sequence[EncodedRow], padding: Mapping[str, float]) -> dict[str, Tensor]:
    """The inputs of a model for tokenized rows, by name, padded to the longest of them.

    Args:
        rows: at least one row.
        padding: the value on padding of each input that the model takes, besides its mask.
    """
    wanted = {name: value for name, value in padding.items() if name != ATTENTION_BIAS}
    arrays = padded_inputs(rows, wanted)
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]
    return inputs | {"attention_mask": mask.long()}


@torch.no_grad()
def predict(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    padding: Mapping[str, float],
    read: Callable[[Any], Tensor],
    batch: int = 64,
    progress: Progress = silent,
    what: str = "predict",
) -> NDArray[np.float32]:
    """The outputs of a model for rows, without dropout, in padded batches.

    Args:
        model: takes the inputs of a batch by name.
        rows: tokenized rows.
        padding: see `model_inputs`.
        read: the wanted part of an output, with one entry for each row.
        batch: the largest number of rows in a batch.
        progress: called with (what, rows done, rows).
        what: the name of this step.

    Returns:
        `[rows, ...]`.
    """
    model.eval()
    device = next(model.parameters()).device
    # Rows of similar length share a batch, which saves padding.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    parts = []
    for start in range(0, len(order), batch):
        progress(what, start, len(order))
        chosen = model_inputs([rows[number] for number in order[start : start + batch]], padding)
        output = model(**{name: value.to(device) for name, value in chosen.items()})
        parts.append(read(output).float().cpu().numpy())
    return np.asarray(np.concatenate(parts)[np.argsort(order)], np.float32)


def by_row(logits: Tensor) -> Tensor:
    """Logits `[rows, exits, labels]` from those of a `MultiExitModel`."""
    return logits.transpose(0, 1)
