"""The loss over all exits, the optimizer, and the scores of each exit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from fpabee.exporter.training import TrainOptions
from fpabee.exporter.training.pipeline import build_model
from fpabee.exporter.training.trainer import MultiExitTrainer, exit_loss, exit_scores
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.progress import silent

SINGLE, MULTI = ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL


def random_logits(exits: int, rows: int, labels: int) -> torch.Tensor:
    generator = torch.manual_seed(0)
    return torch.randn(exits, rows, labels, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("distill", [0.0, 0.3])
@pytest.mark.parametrize("task", [SINGLE, MULTI])
def test_exits_learn_from_the_labels_and_the_last_exit(task: ProblemType, distill: float) -> None:
    """Exit j counts j times; the last exit learns from the labels alone."""
    logits = random_logits(3, 5, 4).requires_grad_()
    hard = torch.eye(4, dtype=torch.float64)[[0, 3, 1, 2, 2]]
    labels = torch.tensor([0, 3, 1, 2, 2]) if task is SINGLE else hard
    last = logits[-1].detach()
    soft = last.softmax(-1) if task is SINGLE else last.sigmoid()

    def loss(exit_logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if task is SINGLE:
            return -(target * torch.log_softmax(exit_logits, -1)).sum(-1).mean()
        p = exit_logits.sigmoid()
        return -(target * p.log() + (1 - target) * (1 - p).log()).mean()

    mixed = distill * soft + (1 - distill) * hard
    counts = (1, 2, 3)
    losses = [loss(row, target) for row, target in zip(logits, (mixed, mixed, hard), strict=True)]
    expected = torch.stack(losses) @ torch.tensor(counts).double() / sum(counts)
    found = exit_loss(logits, labels, task, distill)
    assert found.item() == pytest.approx(expected.item())
    # Only the labels train the last exit: no gradient flows through its role as a teacher.
    gradients, wanted = (
        torch.autograd.grad(value, logits)[0]
        for value in (found, loss(logits[-1], hard) * counts[-1] / sum(counts))
    )
    torch.testing.assert_close(gradients[-1], wanted[-1])


def test_probabilities_are_targets_of_the_single_label_loss() -> None:
    logits, target = random_logits(1, 2, 3), torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    expected = functional.cross_entropy(logits[0], target.double()).item()
    assert exit_loss(logits, target, SINGLE).item() == pytest.approx(expected)


def test_exits_have_their_own_learning_rate_and_biases_do_not_decay(
    options: Callable[..., TrainOptions], backbone: Path, tmp_path: Path
) -> None:
    settings = options(lr=0.25, head_lr=0.5)
    model, tokenizer = build_model(settings, ("a", "b", "c"))
    data = {"train": [{"input_ids": [1]}], "dev": []}
    trainer = MultiExitTrainer(model, settings, tmp_path, data, tokenizer, silent)
    groups = trainer.create_optimizer().param_groups
    group_of = {id(value): group for group in groups for value in group["params"]}
    by_name = {name: group_of[id(value)] for name, value in model.named_parameters()}
    exits = {name for name in by_name if re.search("pooler|classifiers|hidden", name)}
    assert len(exits) == 8
    assert {by_name[name]["lr"] for name in exits} == {0.5}
    assert {by_name[name]["lr"] for name in by_name.keys() - exits} == {0.25}
    assert sum(len(group["params"]) for group in groups) == len(by_name)
    assert by_name["classifiers.0.weight"]["weight_decay"] > 0
    undecayed = {name for name, group in by_name.items() if group["weight_decay"] == 0}
    assert undecayed == {name for name in by_name if name.endswith("bias") or "LayerNorm" in name}


def test_every_step_is_reported_and_the_scores_of_dev_after_an_epoch(
    options: Callable[..., TrainOptions], backbone: Path, tmp_path: Path
) -> None:
    settings = options(epochs=1, batch_size=1)
    model, tokenizer = build_model(settings, ("a", "b"))
    rows = [{"input_ids": [1, 2, 3], "labels": number % 2} for number in range(60)]
    data = {"train": rows, "dev": rows[:2]}
    seen: list[tuple[str, int, int]] = []
    trainer = MultiExitTrainer(
        model, settings, tmp_path, data, tokenizer, lambda *report: seen.append(report)
    )
    trainer.train()
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert {done for _, done, _ in seen} == set(range(61))
    assert {total for _, _, total in seen} == {60}
    texts = {re.sub(r"\d\.\d+", "N", what) for what, _, _ in seen}
    assert texts == {"train", "train, loss N", "train, dev accuracy by exit: N N"}


def test_every_exit_has_its_own_scores() -> None:
    right, wrong = [0.0, 2.0], [2.0, 0.0]
    logits = np.array([[right, right], [wrong, right], [wrong, right], [wrong, wrong]], np.float32)
    scores = exit_scores(logits, np.array([1, 1, 1, 1]), SINGLE)
    assert [score["accuracy"] for score in scores] == [0.25, 0.75]


def test_multi_label_predictions_are_the_labels_above_one_half() -> None:
    logits = np.array([[[0.1, -0.1]], [[-0.1, -3.0]]], np.float32)
    (score,) = exit_scores(logits, np.array([[1, 0], [1, 0]]), MULTI)
    assert score["exact_match"] == 0.5
    assert score["micro_f1"] == pytest.approx(2 / 3)
