"""The settings of a multi-exit classifier. Needs no torch: the commands start fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from ..runtime.artifact.manifest import Activation, ProblemType
from ..runtime.errors import ModelError

QUERIES = 4
"""The most queries of an exit of a new model: more gain nothing."""
_NARROWER = 6
COPY_CONFIG = "copy config.json again from where the model was trained"


class Pooling(str, Enum):
    """How the hidden states of a row become one vector for an exit's classifier."""

    CLS = "cls"
    """The first token, through a dense layer with tanh that all exits share (PABEE)."""
    MEAN = "mean"
    """The mean over real tokens: early exits learn far more with it, and cost far less."""
    FIRST = "first"
    """The first token as it is."""
    BOTH = "both"
    """The mean and the first token, one after the other."""
    ATTENTION = "attention"
    """Weighted means over real tokens: each exit learns queries that say which tokens count."""


def attending_width(hidden: int) -> int:
    """The width of the hidden layer of a new exit that attends, which costs little.

    Args:
        hidden: the size of the encoder's states.
    """
    return hidden // _NARROWER


@dataclass(frozen=True)
class LastHead:
    """The last exit's head, if it came from a plain classifier that became a multi-exit model.

    Before the linear classifier it has pooling, a dense layer, an activation and perhaps a layer
    norm.

    Attributes:
        pooling: what the dense layer sees.
        activation: after the dense layer, by its name in `transformers`.
        norm_eps: epsilon of the layer norm after the activation; None: no layer norm.
    """

    pooling: Pooling
    activation: str
    norm_eps: float | None = None


@dataclass(frozen=True)
class MultiExitConfig:
    """The settings that make an encoder a multi-exit classifier.

    Attributes:
        exits: the layer of each exit, counted from 1, ascending.
        labels: label names in the order of the logits.
        problem_type: single-label or multi-label classification, or ranking.
        pooling: what the heads see.
        last_head: the head of the last exit, if it differs from the others.
        hidden_layers: how many exits, from the first on, have a hidden layer before their
            classifier. With `Pooling.CLS`, the pooler is this layer for all of them.
        hidden_width: of these hidden layers; 0 means that of the encoder.
        queries: how many weighted means an exit takes with `Pooling.ATTENTION`; otherwise 0.
        label_thresholds: for multi-label, see `Task.label_thresholds`; empty means 0.5.
        activation: for ranking, see `Task.activation`; None means sigmoid.
    """

    exits: tuple[int, ...]
    labels: tuple[str, ...]
    problem_type: ProblemType = ProblemType.SINGLE_LABEL
    pooling: Pooling = Pooling.CLS
    last_head: LastHead | None = None
    hidden_layers: int = 0
    hidden_width: int = 0
    queries: int = 0
    label_thresholds: tuple[float, ...] = ()
    activation: Activation | None = None

    def with_hidden_layers(self, hidden: int) -> MultiExitConfig:
        """The same for a new model, with queries and hidden layers where they help.

        After means, hidden layers help the first two exits, which see few layers, to tell more than
        two classes apart.

        Args:
            hidden: the size of the encoder's states.
        """
        if self.pooling is Pooling.ATTENTION:
            return replace(
                self,
                queries=QUERIES,
                hidden_layers=len(self.exits),
                hidden_width=attending_width(hidden),
            )
        is_single = self.problem_type is ProblemType.SINGLE_LABEL
        helps = is_single and len(self.labels) > 2 and self.pooling is Pooling.MEAN
        return replace(self, hidden_layers=min(2, len(self.exits) - 1) if helps else 0)

    def validate(self, layers: int) -> None:
        """Check the exits against the depth of an encoder, and their heads.

        Args:
            layers: its number of layers.

        Raises:
            ModelError: the exits are not ascending layers between 1 and `layers`, more of them
                have a hidden layer than there are, or the pooling does not fit the queries or the
                last head.
        """
        check_layers(self.exits, layers)
        if not 0 <= self.hidden_layers <= len(self.exits):
            raise ModelError(
                f"hidden_layers is {self.hidden_layers}, but there are {len(self.exits)} exits",
                COPY_CONFIG,
            )
        if self.queries < 0 or (self.queries > 0) != (self.pooling is Pooling.ATTENTION):
            raise ModelError(
                f"queries is {self.queries}, and pooling is {self.pooling.value!r}; expected at "
                f"least 1 with {Pooling.ATTENTION.value!r}, and 0 with any other pooling",
                COPY_CONFIG,
            )
        if self.last_head and self.last_head.pooling in (Pooling.BOTH, Pooling.ATTENTION):
            raise ModelError(
                f"the last head has pooling {self.last_head.pooling.value!r}; expected one token "
                "or the mean",
                COPY_CONFIG,
            )


def check_layers(exits: Sequence[int], layers: int) -> None:
    """Check the layers of exits against the depth of an encoder.

    Args:
        exits: the layer of each exit, counted from 1.
        layers: how many layers the encoder has.

    Raises:
        ModelError: the exits are not ascending layers between 1 and `layers`.
    """
    inside = [layer for layer in range(1, layers + 1) if layer in exits]
    if not inside or list(exits) != inside:
        raise ModelError(
            f"exits {list(exits)} do not fit an encoder of {layers} layers",
            f"give `exits` as ascending layers between 1 and {layers}",
        )
