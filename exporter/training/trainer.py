"""The training loop: the loss over all exits, in the trainer of `transformers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PrinterCallback, Trainer, TrainingArguments

from ...runtime.artifact.manifest import ProblemType
from ...runtime.encoding import EncodedRow
from ...runtime.files.labels import evaluate
from ...runtime.progress import Progress
from ..model import MultiExitModel, by_row, model_inputs, predict
from .options import TrainOptions
from .rows import Examples

_WEIGHT_DECAY = 0.01
# Shares of all steps: the length of the warm-up, and the distance between means of the loss.
_WARMUP = 0.06
_REPORTS = 0.02


class MultiExitTrainer(Trainer):
    """Trains all exits together; the exits have a learning rate of their own.

    Args:
        model: the model to train.
        options: of the training, with the number of `epochs`.
        folder: the output folder, in which the trainer writes nothing.
        train: the rows to train on.
        dev: the rows that are scored after every epoch.
        padding: see `model_inputs`.
        progress: called with (loss and scores, steps done, steps in total).
    """

    def __init__(
        self,
        model: MultiExitModel,
        options: TrainOptions,
        folder: Path,
        train: Examples,
        dev: Examples,
        padding: Mapping[str, float],
        progress: Progress,
    ) -> None:
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=cast(float, options.epochs),
            per_device_train_batch_size=options.batch_size,
            warmup_steps=_WARMUP,
            lr_scheduler_type="linear",
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=_REPORTS,
            report_to="none",
            disable_tqdm=True,
            seed=options.seed,
            bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
        )
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=cast(Any, list(zip(train.rows, train.targets, strict=True))),
            eval_dataset=cast(Any, dev.rows),  # see `evaluate`
            data_collator=cast(Any, self._batch),
        )
        self.remove_callback(PrinterCallback)
        self.options = options
        self.problem_type = model.exit_config.problem_type
        self.dev, self.padding = dev, padding
        self.progress = progress
        self.loss = self.dev_scores = ""

    def _batch(self, chosen: Sequence[tuple[EncodedRow, Any]]) -> dict[str, Tensor]:
        """The padded inputs and the targets of some rows."""
        rows, targets = zip(*chosen, strict=True)
        labels = torch.from_numpy(np.stack(targets))
        return model_inputs(rows, self.padding) | {"labels": labels}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss over all exits."""
        labels = inputs.pop("labels")
        self._report()
        return exit_loss(model(**inputs), labels, self.problem_type, self.options.distill)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, with a learning rate of their own for the weights of exits, see `is_head`."""
        trained = cast(torch.nn.Module, self.model)
        decayed = set(self.get_decay_parameter_names(trained))
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in trained.named_parameters():
            groups.setdefault((is_head(name), name in decayed), []).append(parameter)
        settings = [
            {
                "params": parameters,
                "lr": self.options.exit_lr if in_head else self.options.lr,
                "weight_decay": _WEIGHT_DECAY if decays else 0.0,
            }
            for (in_head, decays), parameters in groups.items()
        ]
        # The fused version passes over the weights once per step. Most of them are embeddings,
        # of which a batch uses few.
        self.optimizer = torch.optim.AdamW(settings, fused=True)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report the mean loss since the last mean, and the scores of the last epoch."""
        super().log(logs, start_time)
        if "loss" in logs:
            self.loss = f", loss {logs['loss']:.3f}"
            self._report()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Report the main metric of every exit on dev; the trainer calls this after every epoch."""
        logits = predict(cast(Any, self.model), self.dev.rows, self.padding, by_row)
        scores = exit_scores(logits, self.dev.targets, self.problem_type)
        metric = next(iter(scores[0]))
        values = " ".join(f"{row[metric]:.3f}" for row in scores)
        self.loss, self.dev_scores = "", f", dev {metric} by exit: {values}"
        self._report()
        self.control.should_evaluate = False
        return {}

    def _report(self) -> None:
        state = self.state
        self.progress(f"train{self.loss}{self.dev_scores}", state.global_step, state.max_steps)


def is_head(name: str) -> bool:
    """Whether a weight belongs to the exits and not to the encoder."""
    return (
        name.startswith(("classifiers.", "pooler.", "hidden.", "last_head.")) or ".pooler." in name
    )


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
    losses = [label_loss(*pair, problem_type) for pair in zip(logits, targets, strict=True)]
    weight = torch.arange(1, len(losses) + 1).to(logits)
    return (torch.stack(losses) * weight).sum() / weight.sum()


def label_loss(logits: Tensor, targets: Tensor, problem_type: ProblemType) -> Tensor:
    """The cross-entropy, or for multi-label the binary cross-entropy of every label.

    Args:
        logits: `[rows, labels]`.
        targets: probabilities `[rows, labels]`.
        problem_type: the task.
    """
    if problem_type is ProblemType.SINGLE_LABEL:
        return functional.cross_entropy(logits, targets)
    return functional.binary_cross_entropy_with_logits(logits, targets)


def as_probabilities(targets: Tensor, labels: int) -> Tensor:
    """Targets `[rows, labels]` from any that `Examples` may have."""
    return functional.one_hot(targets, labels) if targets.ndim == 1 else targets


def probabilities(logits: Tensor, problem_type: ProblemType) -> Tensor:
    """The probabilities `[..., labels]` of logits `[..., labels]`."""
    is_single = problem_type is ProblemType.SINGLE_LABEL
    return logits.softmax(dim=-1) if is_single else logits.sigmoid()


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
    is_single = problem_type is ProblemType.SINGLE_LABEL
    answers = logits.argmax(axis=-1) if is_single else (logits > 0).astype(np.int64)
    return [evaluate(row, labels, logits.shape[-1]) for row in answers.swapaxes(0, 1)]
