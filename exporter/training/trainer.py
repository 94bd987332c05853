"""The training loop, the loss over all exits, and the scores of each exit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from ...calibration.progress import Progress
from ...runtime.artifact.manifest import ProblemType
from ...runtime.quality import evaluate
from ..model import MultiExitModel, by_row, model_inputs, predict
from .examples import Examples
from .options import TrainOptions


class _OneLabel:
    """How one label for each row is learned: what `label_losses` and others do."""

    @staticmethod
    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits, targets, reduction="none")

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)

    @staticmethod
    def answers(logits: NDArray[np.float32]) -> NDArray[np.int64]:
        classes: NDArray[np.int64] = logits.argmax(axis=-1)
        return classes


class _AnyLabels:
    """The same for any number of labels."""

    @staticmethod
    def losses(logits: Tensor, targets: Tensor) -> Tensor:
        losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return losses.mean(dim=-1)

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        return logits.sigmoid()

    @staticmethod
    def answers(logits: NDArray[np.float32]) -> NDArray[np.int64]:
        return (logits > 0).astype(np.int64)


_LABELS: dict[ProblemType, type[_OneLabel] | type[_AnyLabels]] = {
    ProblemType.SINGLE_LABEL: _OneLabel,
    ProblemType.MULTI_LABEL: _AnyLabels,
}
_EXIT_LR = 5e-3
_WEIGHT_DECAY = 0.01
_LARGEST_GRADIENT = 1.0
_WARMUP = 0.06  # the share of all steps that it takes


def train_exits(
    model: MultiExitModel,
    train: Examples,
    dev: Examples,
    padding: Mapping[str, float],
    options: TrainOptions,
    progress: Progress,
) -> None:
    """Train the encoder and all exits together.

    Args:
        model: the model to train, on its device.
        train: the rows to train on.
        dev: the rows that are scored after every epoch.
        padding: see `model_inputs`.
        options: of the training.
        progress: called with (loss and scores, steps done, steps in total).
    """
    device = next(model.parameters()).device
    problem_type = model.exit_config.problem_type
    starts = range(0, len(train.rows), options.batch_size)
    steps = math.ceil(len(starts) * options.epochs_for(len(train.rows)))
    warmup = math.ceil(_WARMUP * steps)
    optimizer = make_optimizer(model, options)
    schedule = LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup)),
    )
    done = 0
    dev_text = ""
    progress("train", done, steps)
    while done < steps:
        model.train()
        order = torch.randperm(len(train.rows)).numpy()
        for start in starts[: steps - done]:
            numbers = order[start : start + options.batch_size]
            inputs = model_inputs([train.rows[number] for number in numbers], padding)
            targets = torch.from_numpy(train.targets[numbers]).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
                logits = model(**{name: value.to(device) for name, value in inputs.items()})
                loss = exit_loss(logits, targets, problem_type, options.distill)
            torch.autograd.backward(loss)
            clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            progress(f"train, loss {loss.item():.3f}{dev_text}", done, steps)
        scores = exit_scores(predict(model, dev.rows, padding, by_row), dev.targets, problem_type)
        metric = next(iter(scores[0]))
        values = " ".join(f"{row[metric]:.3f}" for row in scores)
        dev_text = f", dev {metric} by exit: {values}"
        progress(f"train{dev_text}", done, steps)


def make_optimizer(model: MultiExitModel, options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW, with a learning rate of their own for the weights of exits, see `is_head`."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        # Biases and norms, which have one dimension, do not decay.
        groups.setdefault((is_head(name), parameter.ndim > 1), []).append(parameter)
    settings = [
        {
            "params": parameters,
            "lr": _EXIT_LR if in_head else options.lr,
            "weight_decay": _WEIGHT_DECAY if decays else 0.0,
        }
        for (in_head, decays), parameters in groups.items()
    ]
    # The fused version passes over the weights once per step. Most of them are embeddings, of
    # which a batch uses few.
    return torch.optim.AdamW(settings, fused=True)


def is_head(name: str) -> bool:
    """Whether a weight belongs to the exits and not to the encoder."""
    return name.startswith(("classifiers.", "pooler.", "hidden.", "queries.")) or ".pooler." in name


def exit_loss(
    logits: Tensor,
    labels: Tensor,
    problem_type: ProblemType,
    distill: float = 0.0,
) -> Tensor:
    """Weighted mean of the losses of the exits (F-PABEE, eq. 13: weight j for exit j).

    Args:
        logits: `[exits, rows, labels]`.
        labels: the targets, see `Examples`.
        problem_type: the task, which has its own loss, see `label_loss`.
        distill: share of the targets of the earlier exits that is the prediction of the last
            exit instead of the labels (self-distillation as in FastBERT, arXiv 2004.02178).

    Returns:
        A scalar.
    """
    hard = as_probabilities(labels, logits.shape[-1]).to(logits.dtype)
    soft = probabilities(logits[-1].detach(), problem_type)
    # The loss is linear in its target.
    mixed = (1 - distill) * hard + distill * soft
    targets = [mixed] * (len(logits) - 1) + [hard]
    losses = [
        label_loss(at_exit, target, problem_type)
        for at_exit, target in zip(logits, targets, strict=True)
    ]
    weight = torch.arange(1, len(losses) + 1).to(logits)
    return (torch.stack(losses) * weight).sum() / weight.sum()


def label_loss(logits: Tensor, targets: Tensor, problem_type: ProblemType) -> Tensor:
    """The mean of `label_losses`, whose arguments these are."""
    return label_losses(logits, targets, problem_type).mean()


def label_losses(logits: Tensor, targets: Tensor, problem_type: ProblemType) -> Tensor:
    """The cross-entropy of rows, or for multi-label the mean binary cross-entropy of their labels.

    Args:
        logits: `[rows, labels]`.
        targets: probabilities `[rows, labels]`.
        problem_type: the task.

    Returns:
        `[rows]`.
    """
    return _LABELS[problem_type].losses(logits, targets)


def as_probabilities(targets: Tensor, labels: int) -> Tensor:
    """Targets `[rows, labels]` from any that `Examples` may have."""
    return functional.one_hot(targets, labels) if targets.ndim == 1 else targets


def probabilities(logits: Tensor, problem_type: ProblemType) -> Tensor:
    """The probabilities `[..., labels]` of logits `[..., labels]`."""
    return _LABELS[problem_type].probabilities(logits)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute with one thread, which trains small models no slower.

    Beside other work, several threads would wait for each other most of the time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def exit_scores(
    logits: NDArray[np.float32], labels: NDArray[np.int64], problem_type: ProblemType
) -> list[dict[str, float]]:
    """Scores of every exit, see `evaluate`.

    Args:
        logits: `[rows, exits, labels]`.
        labels: `[rows]`, or `[rows, labels]` of 0 and 1.
        problem_type: a row has the label with the largest logit, or for multi-label all
            labels with a logit above 0.
    """
    answers = _LABELS[problem_type].answers(logits)
    return [evaluate(row, labels, logits.shape[-1]) for row in answers.swapaxes(0, 1)]
