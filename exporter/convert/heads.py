"""The heads of the early exits: trained on stored states, in a form that suits the texts.

Which form is best depends on the data: with few texts, a hidden layer is certain where it should
not be. So every form is trained on one part of the texts, and another part chooses. The inputs are
standardised, which becomes part of the first linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...calibration.progress import Progress
from ...calibration.scoring import AGREEMENT, LabelledLogits, Scorer
from ...calibration.settings import StopScores, settings_lists
from ..exit_config import Pooling
from ..model import Head, MultiExitModel, Transform
from ..training.trainer import label_loss, probabilities
from .classifier import Classifier
from .options import Chosen, Form

_WIDTHS = (0, 64, 192, 384)
_LR = 2e-3
_WEIGHT_DECAY = 0.02
_DROPOUT = 0.2
_BATCH = 128
_EPOCHS = 25
_MOST_STEPS = 2000
# All heads together may cost this share of what the layers of the classifier cost, for one text.
_MOST_COST = 0.05
# What a head costs, in weights of a layer. Each of these is multiplied by all tokens, so a weight
# of a head costs less; but each head is called. Fitted to times of a MiniLM with one thread and 32
# tokens: a hidden layer of 384 on the mean and the first token takes 7 %, a linear layer 1 to 3 %.
_COST_OF_CALL = 50_000
_COST_OF_WEIGHT = 1 / 3
# Forms are compared at these multiples of the share of decisions that may change.
_AT = (0.5, 1.0, 2.0)
# A mean divided by its deviation counts as at most so much. Where it is thousands, as for the first
# token after a layer or two, the folded layer would subtract large numbers, and lose precision.
_MOST_RATIO = 20.0
# What of the mean and the first token each pooling takes.
_TAKEN = {Pooling.MEAN: slice(0, 1), Pooling.FIRST: slice(1, 2), Pooling.BOTH: slice(0, 2)}


def make_heads(form: Form, classifier: Classifier) -> list[Head]:
    """New heads, one for each layer but the last."""
    inputs = int(classifier.model.config.hidden_size) * (1 + (form.pooling is Pooling.BOTH))

    def make() -> Head:
        hidden = Transform(nn.Linear(inputs, form.width), "gelu") if form.width else None
        last = nn.Linear(form.width or inputs, len(classifier.labels))
        return Head(last, form.pooling, hidden, classifier.backbone.norm(), _DROPOUT)

    return [make() for _ in range(classifier.layers - 1)]


def train_heads(form: Form, classifier: Classifier, states: Tensor, logits: Tensor) -> list[Head]:
    """Train the heads of all layers but the last on what the classifier predicts.

    Args:
        form: their form.
        classifier: the classifier.
        states: `[rows, layers - 1, 2, hidden]`, see `run_classifier`.
        logits: `[rows, labels]` of the classifier.
    """
    torch.manual_seed(0)
    heads = make_heads(form, classifier)
    taken = _TAKEN[form.pooling]
    center = states.mean(dim=0)[:, taken].flatten(1)
    spread = states.std(dim=0)[:, taken].flatten(1)
    scale = 1 / torch.maximum(spread, center.abs() / _MOST_RATIO).clamp_min(1e-6)
    targets = probabilities(logits, classifier.problem_type)
    steps = min(_MOST_STEPS, _EPOCHS * -(-len(states) // _BATCH))
    # The norm belongs to the encoder.
    own = [
        w for head in heads for part in (head.pooler, head.classifier) for w in part.parameters()
    ]
    optimizer = torch.optim.AdamW(own, lr=_LR, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=steps)
    done = 0
    while done < steps:
        for numbers in torch.split(torch.randperm(len(states)), _BATCH)[: steps - done]:
            inputs = (states[numbers][:, :, taken].flatten(2) - center) * scale
            every = [
                head.classify(part) for head, part in zip(heads, inputs.unbind(1), strict=True)
            ]
            losses = [label_loss(each, targets[numbers], classifier.problem_type) for each in every]
            torch.autograd.backward(torch.stack(losses).sum())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
    for head, middle, factor in zip(heads, center, scale, strict=True):
        head.eval()
        first = head.pooler.dense if isinstance(head.pooler, Transform) else head.classifier
        with torch.no_grad():
            first.weight.mul_(factor)
            first.bias.sub_(first.weight @ middle)
    return heads


@torch.no_grad()
def logits_of(heads: Sequence[Head], states: Tensor) -> NDArray[np.float32]:
    """The logits `[exits, rows, labels]` of heads, for the states of as many layers."""
    inputs = states[:, :, _TAKEN[heads[0].pooling]].flatten(2)
    return np.stack([head.classify(inputs[:, n]).numpy() for n, head in enumerate(heads)])


def choose_form(
    classifier: Classifier,
    states: NDArray[np.float32],
    logits: NDArray[np.float32],
    trained: int,
    share: float,
    decision_thresholds: tuple[float, ...],
    progress: Progress,
) -> Chosen:
    """Train every form on some rows, and choose by the other rows.

    Args:
        classifier: the classifier, with at least two layers.
        states: `[rows, layers - 1, 2, hidden]`, see `run_classifier`.
        logits: `[rows, labels]` of the classifier.
        trained: how many rows train; the rows after them choose.
        share: of the decisions that may change.
        decision_thresholds: see `LabelledLogits`.
        progress: called with (what, done, total).
    """
    forms = [Form(pooling, width) for pooling in _TAKEN for width in _WIDTHS]
    shares = {form: cost_of_heads(form, classifier) for form in forms}
    fit = [form for form in forms if shares[form] <= _MOST_COST or form == forms[0]]
    every_state = torch.from_numpy(states)
    every_logit = torch.from_numpy(logits)
    candidates = []
    for number, form in enumerate(fit):
        progress("choose heads", number, len(fit))
        heads = train_heads(form, classifier, every_state[:trained], every_logit[:trained])
        exits = logits_of(heads, every_state[trained:])
        for every in (1, 2):
            own = replace(form, every=every)
            layers = np.array([*own.exits(classifier.layers), classifier.layers])
            rows = LabelledLogits(
                np.concatenate([exits[layers[:-1] - 1], logits[None, trained:]]),
                np.ones(len(states) - trained, np.intp),
                None,
                classifier.problem_type,
                decision_thresholds=decision_thresholds,
            )
            # A text pays for the heads that it meets.
            heads_met = np.arange(1, len(layers) + 1).clip(max=len(layers) - 1)
            costs = layers / classifier.layers + heads_met * shares[form] / (classifier.layers - 1)
            scorer = Scorer(rows, AGREEMENT)
            agreement = tuple(float(share) for share in 1 - scorer.changed[:-1].mean(axis=1))
            saved = _saved(scorer, costs, share)
            candidates.append(Chosen(agreement, own, shares[form], saved))
    return max(candidates, key=lambda each: each.saved)


def _saved(scorer: Scorer, costs: NDArray[np.float64], share: float) -> float:
    """How much less than full depth rows cost, where about that share of decisions changes."""
    rows = scorer.rows
    places = rows.at(StopScores(rows).exits(settings_lists(rows)[0]))
    changed = scorer.changed[places].mean(axis=1)
    saved = 1 - costs[places[0]].mean(axis=1)
    return float(np.mean([saved[changed <= at * share].max(initial=0.0) for at in _AT]))


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
    weights = sum(_weights(head.pooler) + _weights(head.classifier) for head in heads)
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
