"""The heads of the early exits: trained on stored states, in a form that suits the classifier.

A choice among forms by some hundred texts would be a matter of chance, so a head attends with as
many queries as it may cost. Whether every layer has an exit, or every second one, is judged on
texts that trained nothing. Training sees pooled states as standardised, which becomes part of the
weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...calibration.progress import Progress, silent
from ..exit_config import QUERIES, Pooling, attending_width
from ..model import Head, MultiExitModel, Transform, new_queries
from ..training.trainer import one_thread
from .classifier import Classifier
from .options import Chosen, Form
from .states import States

# The first that costs little enough.
_QUERIES = (QUERIES, 1)
_LR = 2e-3
_WEIGHT_DECAY = 0.02
_DROPOUT = 0.2
_BATCH = 128
PASSES = 25
_FEWEST_STEPS = 250
_MOST_STEPS = 2000
# Batches of a group have rows of similar length, which saves padding.
_GROUP = 4
# All heads together may cost this share of what the layers of the classifier cost, for one text.
_MOST_COST = 0.05
# What a head costs, in weights of a layer. Each of these is multiplied by all tokens, so a weight
# of a head costs less; but each head is called. Fitted to times of a MiniLM with one thread and 32
# tokens: four queries and a hidden layer of 64 take 1 to 3 %, a linear layer 0 to 2 %.
_COST_OF_CALL = 50_000
_COST_OF_WEIGHT = 1 / 3
# The inputs of heads are standardised by at most so many texts.
_MEASURED = 2000
# A mean divided by its deviation counts as at most so much. Where it is thousands, as for the first
# token after a layer or two, the folded layer would subtract large numbers, and lose precision.
_MOST_RATIO = 20.0

Numbers = NDArray[np.intp]

Judge = Callable[[NDArray[np.float32], NDArray[np.float64]], "Judged"]
"""Judges early exits by their logits and costs, see `choose_exits`."""


@dataclass(frozen=True)
class Lesson:
    """What heads learn from rows.

    Attributes:
        targets: `[rows, labels]` what they should give, in the terms of the loss.
        weights: `[rows]` how much each row counts.
        loss: the losses `[rows]` of outputs `[rows, labels]` for targets `[rows, labels]`.
        mean: of the logits that outputs stand for: outputs are standardised logits.
        deviation: of the logits.
        passes: how often heads learn from each row, unless that is less than 250 or more than 2,000
            steps.
    """

    targets: Tensor
    weights: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    mean: float = 0.0
    deviation: float = 1.0
    passes: float = PASSES

    def loss_of(self, outputs: Tensor, numbers: Numbers) -> Tensor:
        """The mean loss of outputs `[numbers, labels]` for some rows."""
        weights = self.weights[numbers]
        losses = self.loss(outputs, self.targets[numbers])
        return (losses * weights).sum() / weights.sum()


@dataclass(frozen=True)
class Judged:
    """How heads do on rows that did not train them; the attributes are those of `Chosen`."""

    agreement: tuple[float, ...]
    saved: float
    errors: tuple[float, ...] = ()


def form_for(classifier: Classifier) -> Form:
    """The form with the most queries that costs at most 5 % of the layers, or else linear heads."""
    width = attending_width(int(classifier.model.config.hidden_size))
    attending = (Form(Pooling.ATTENTION, width, queries) for queries in _QUERIES)
    fit = (form for form in attending if cost_of_heads(form, classifier) <= _MOST_COST)
    return next(fit, Form(Pooling.BOTH))


def make_heads(form: Form, classifier: Classifier) -> list[Head]:
    """New heads without the norm of the encoder, one for each layer but the last."""
    hidden = int(classifier.model.config.hidden_size)
    inputs = hidden * (2 if form.pooling is Pooling.BOTH else max(1, form.queries))

    def make() -> Head:
        dense = Transform(nn.Linear(inputs, form.width), "gelu") if form.width else None
        last = nn.Linear(form.width or inputs, len(classifier.labels))
        queries = new_queries(hidden, form.queries) if form.queries else None
        return Head(last, form.pooling, dense, queries, dropout=_DROPOUT)

    return [make() for _ in range(classifier.layers - 1)]


class _Scaled(nn.Module):
    """Weights of inputs as they would be for inputs that are scaled.

    Args:
        scale: `[inputs]` what the inputs would be multiplied by.
    """

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """`[outputs, inputs]` from weights of this shape."""
        return weight * self.scale


@one_thread()
def train_heads(
    form: Form,
    classifier: Classifier,
    states: States,
    lesson: Lesson,
    count: int,
    progress: Progress = silent,
) -> list[Head]:
    """Train the heads of all layers but the last on what the classifier predicts.

    Args:
        form: their form.
        classifier: the classifier.
        states: of rows, see `run_classifier`.
        lesson: of these rows.
        count: how many of the rows train, from the first on.
        progress: called with (what, done, total).
    """
    torch.manual_seed(0)
    heads = make_heads(form, classifier)
    hidden = int(classifier.model.config.hidden_size)
    # Heads that have not learnt anything pool the means.
    some = np.arange(0, count, -(-count // _MEASURED))
    with torch.no_grad():
        pooled = torch.cat([_pool(heads, states, part) for part in _parts(some)])
    center = pooled.mean(dim=0)
    scale = 1 / torch.maximum(pooled.std(dim=0), center.abs() / _MOST_RATIO).clamp_min(1e-6)
    for head, factor in zip(heads, scale, strict=True):
        parametrize.register_parametrization(_first(head), "weight", _Scaled(factor))
        if head.queries is not None:
            by_token = _Scaled(factor[:hidden])
            parametrize.register_parametrization(head.queries, "weight", by_token)
    wanted = math.ceil(lesson.passes * -(-count // _BATCH))
    steps = min(_MOST_STEPS, max(_FEWEST_STEPS, wanted))
    own = [weight for head in heads for weight in head.parameters()]
    optimizer = torch.optim.AdamW(own, lr=_LR, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=steps)
    batches = _batches(states.lengths[:count])
    for step in range(steps):
        progress("train heads", step, steps)
        numbers = next(batches)
        every = _pool(heads, states, numbers) - center
        losses = [
            lesson.loss_of(head.classify(each), numbers)
            for head, each in zip(heads, every.unbind(1), strict=True)
        ]
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for head, middle in zip(heads, center, strict=True):
        head.eval()
        for linear in filter(None, (head.queries, _first(head))):
            parametrize.remove_parametrizations(linear, "weight")
        with torch.no_grad():
            first = _first(head)
            first.bias.sub_(first.weight @ middle)
            last = head.classifier
            last.weight.mul_(lesson.deviation)
            last.bias.mul_(lesson.deviation).add_(lesson.mean)
    return heads


def _first(head: Head) -> nn.Linear:
    """The first linear layer after pooling."""
    return head.pooler.dense if isinstance(head.pooler, Transform) else head.classifier


def _pool(heads: Sequence[Head], states: States, numbers: Numbers) -> Tensor:
    """What heads pool: `[rows, layers - 1, pooled size]`."""
    tokens, bias = states.batch(numbers)
    every = zip(heads, tokens, strict=True)
    return torch.stack([head.pool(each, bias) for head, each in every], dim=1)


def _parts(numbers: Numbers) -> list[Numbers]:
    """Numbers of rows in their order, in batches."""
    return np.array_split(numbers, range(_BATCH, len(numbers), _BATCH))


def _batches(lengths: NDArray[np.int64]) -> Iterator[Numbers]:
    """Numbers of rows in random batches, each row once in a pass, without end."""
    while True:
        order = torch.randperm(len(lengths)).numpy()
        for group in range(0, len(order), _GROUP * _BATCH):
            some = order[group : group + _GROUP * _BATCH]
            some = some[np.argsort(lengths[some], kind="stable")]
            batches = range(0, len(some), _BATCH)
            for number in torch.randperm(len(batches)).tolist():
                yield some[batches[number] : batches[number] + _BATCH]


@torch.no_grad()
def logits_of(heads: Sequence[Head], states: States, numbers: Numbers) -> NDArray[np.float32]:
    """The logits `[exits, numbers, labels]` of heads for some rows of the states."""
    parts = [
        torch.stack([head.classify(each) for head, each in zip(heads, every, strict=True)])
        for every in (_pool(heads, states, some).unbind(1) for some in _parts(numbers))
    ]
    return torch.cat(parts, dim=1).numpy()


def choose_exits(
    classifier: Classifier,
    states: States,
    lesson: Lesson,
    trained: int,
    judge: Judge,
    progress: Progress,
) -> Chosen:
    """Train heads on some rows, and let the other rows choose which layers have an exit.

    Args:
        classifier: the classifier, with at least two layers.
        states: of rows, see `run_classifier`.
        lesson: of these rows.
        trained: how many rows train; the rows after them choose.
        judge: judges early exits by their logits `[exits, rows, labels]` for the rows that choose,
            and by what they and full depth cost, `[exits + 1]`, as shares of all layers.
        progress: called with (what, done, total).
    """
    form = form_for(classifier)
    cost = cost_of_heads(form, classifier)
    heads = train_heads(form, classifier, states, lesson, trained, progress)
    logits = logits_of(heads, states, np.arange(trained, len(states)))
    candidates = []
    for every in (1, 2):
        own = replace(form, every=every)
        layers = np.array([*own.exits(classifier.layers), classifier.layers])
        # A row pays for the heads that it meets.
        heads_met = np.arange(1, len(layers) + 1).clip(max=len(layers) - 1)
        costs = layers / classifier.layers + heads_met * cost / (classifier.layers - 1)
        judged = judge(logits[layers[:-1] - 1], costs)
        candidates.append(
            Chosen(
                agreement=judged.agreement,
                form=own,
                heads_cost=cost,
                saved=judged.saved,
                errors=judged.errors,
            )
        )
    return max(candidates, key=lambda each: each.saved)


def cost_of_heads(form: Form, classifier: Classifier) -> float:
    """What all heads of a form cost, as a share of what the layers of the classifier cost.

    It is counted and not timed, so that the same texts give the same heads.

    Args:
        form: their form.
        classifier: the classifier.
    """
    # A layer that is shared counts each time.
    layers = sum(_weights(layer) for layer in classifier.backbone.layers())
    heads = make_heads(form, classifier)
    weights = sum(map(_weights, heads))
    return (len(heads) * _COST_OF_CALL + weights * _COST_OF_WEIGHT) / layers


def _weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def store(heads: Sequence[Head], form: Form, model: MultiExitModel) -> None:
    """Copy heads of all layers but the last into those of a model of this form."""
    for number, layer in enumerate(model.exit_config.exits[:-1]):
        head = heads[layer - 1]
        model.classifiers[number].load_state_dict(head.classifier.state_dict())
        if form.width:
            model.hidden[number].load_state_dict(head.pooler.state_dict())
        if head.queries is not None:
            model.queries[number].load_state_dict(head.queries.state_dict())
