"""The training loop: the loss over all exits, in the trainer of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from ...runtime.artifact.manifest import ProblemType
from ...runtime.files.labels import evaluate
from ...runtime.progress import Progress
from ..model import MultiExitModel
from .options import TrainOptions

Features = list[dict[str, Any]]

_WEIGHT_DECAY = 0.01
# Shares of all steps: the length of the warm-up, and the distance between means of the loss.
_WARMUP = 0.06
_REPORTS = 0.02


class MultiExitTrainer(Trainer):
    """Trains all exits together; the exits have a learning rate of their own.

    Args:
        model: the model to train.
        options: of the training.
        folder: the output folder, in which the trainer writes nothing.
        data: rows with labels, by name: `train`, `dev` and perhaps others.
        tokenizer: knows how to pad.
        progress: called with (loss and scores, steps done, steps in total).
    """

    def __init__(
        self,
        model: MultiExitModel,
        options: TrainOptions,
        folder: Path,
        data: dict[str, Features],
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
    ) -> None:
        rows = len(data["train"])
        epochs = options.epochs_for(rows)
        steps = -(-rows // options.batch_size) * epochs
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=epochs,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=64,
            warmup_steps=int(_WARMUP * steps),
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
            label_names=["labels"],
            remove_unused_columns=False,
        )
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=cast(Any, data["train"]),
            eval_dataset=cast(Any, data["dev"]),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        self.remove_callback(PrinterCallback)
        self.options = options
        self.problem_type = model.exit_config.problem_type
        self.progress = progress
        self.loss = self.dev_scores = ""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss over all exits; the outputs are logits `[rows, exits, labels]`."""
        labels = inputs.pop("labels")
        logits = model(**inputs)
        loss = exit_loss(logits, labels, self.problem_type, self.options.distill)
        self._report()
        return (loss, {"logits": logits.transpose(0, 1)}) if return_outputs else loss

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
        found = cast(Any, self.predict(cast(Any, self.eval_dataset)))
        scores = exit_scores(found.predictions, found.label_ids, self.problem_type)
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
        labels: `[rows]` int64, or `[rows, labels]` of 0 and 1 for multi-label; for either also
            probabilities `[rows, labels]`.
        problem_type: single-label takes the cross-entropy, multi-label the binary
            cross-entropy of every label.
        distill: share of the targets of the earlier exits that is the prediction of the last
            exit instead of the labels (self-distillation as in FastBERT, arXiv 2004.02178).

    Returns:
        A scalar.
    """
    if problem_type is ProblemType.SINGLE_LABEL:
        loss: Any = functional.cross_entropy
        is_soft = labels.dtype.is_floating_point
        hard = labels if is_soft else functional.one_hot(labels, logits.shape[-1])
        soft = logits[-1].detach().softmax(dim=-1)
    else:
        loss = functional.binary_cross_entropy_with_logits
        hard, soft = labels, logits[-1].detach().sigmoid()
    hard = hard.to(logits.dtype)
    # Both losses are linear in their target.
    mixed = (1 - distill) * hard + distill * soft
    losses = torch.stack([*(loss(row, mixed) for row in logits[:-1]), loss(logits[-1], hard)])
    weight = torch.arange(1, len(losses) + 1).to(losses)
    return (losses * weight).sum() / weight.sum()


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
