"""The loss over all exits, the optimizer, and the scores of each exit."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fpabee.calibration.progress import silent
from fpabee.exporter.exit_config import Pooling
from fpabee.exporter.training import TrainOptions, trainer
from fpabee.exporter.training.examples import Examples, encoded_rows
from fpabee.exporter.training.trainer import exit_loss, make_optimizer, train_exits
from fpabee.exporter.training.workflow import build_model
from fpabee.runtime.artifact.manifest import ProblemType
from fpabee.runtime.files import Row

SINGLE = ProblemType.SINGLE_LABEL
MULTI = ProblemType.MULTI_LABEL
HARD = torch.eye(4, dtype=torch.float64)[[0, 3, 1, 2, 2]]


@pytest.mark.parametrize("distill", [0.0, 0.3])
@pytest.mark.parametrize(
    ("task", "targets"),
    [(SINGLE, HARD.argmax(-1)), (SINGLE, HARD * 0.7 + 0.075), (MULTI, HARD.long()), (MULTI, HARD)],
)
def test_exits_learn_from_the_targets_and_the_last_exit(
    task: ProblemType, targets: torch.Tensor, distill: float
) -> None:
    """Exit j counts j times; the last exit learns from the targets alone."""
    generator = torch.manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    hard = HARD if targets.ndim == 1 else targets.double()
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
    found = exit_loss(logits, targets, task, distill)
    assert found.item() == pytest.approx(expected.item())
    # No gradient flows through the role of the last exit as a teacher.
    gradients, wanted = (
        torch.autograd.grad(value, logits)[0]
        for value in (found, loss(logits[-1], hard) * counts[-1] / sum(counts))
    )
    torch.testing.assert_close(gradients[-1], wanted[-1])


@pytest.mark.parametrize(("pooling", "weights"), [(Pooling.MEAN, 8), (Pooling.ATTENTION, 12)])
def test_exits_have_their_own_learning_rate_and_biases_do_not_decay(
    pooling: Pooling, weights: int, options: Callable[..., TrainOptions]
) -> None:
    settings = options(lr=0.25, pooling=pooling)
    rows = [Row("x", labels=(label,)) for label in "abc"]
    model, _ = build_model(settings, rows)
    groups = make_optimizer(model, settings).param_groups
    group_of = {id(value): group for group in groups for value in group["params"]}
    by_name = {name: group_of[id(value)] for name, value in model.named_parameters()}
    exits = {name for name in by_name if re.search("pooler|classifiers|hidden|queries", name)}
    assert len(exits) == weights
    assert {by_name[name]["lr"] for name in exits} == {5e-3}
    assert {by_name[name]["lr"] for name in by_name.keys() - exits} == {0.25}
    assert sum(len(group["params"]) for group in groups) == len(by_name)
    assert by_name["classifiers.0.weight"]["weight_decay"] > 0
    undecayed = {name for name, group in by_name.items() if group["weight_decay"] == 0}
    assert undecayed == {name for name in by_name if name.endswith("bias") or "LayerNorm" in name}


def test_the_loop_warms_up_decays_clips_and_takes_fractions_of_epochs(
    options: Callable[..., TrainOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = options(epochs=1.5, batch_size=2, lr=1.0)
    named = [Row("x", labels=(label,)) for label in "ab"]
    model, tokenizer = build_model(settings, named)
    rows = encoded_rows([Row(f"film {n}") for n in range(40)], tokenizer, 8)
    data = Examples(rows, np.arange(40) % 2)
    rates = []
    norms = []

    def step(optimizer: torch.optim.AdamW, *_: object) -> None:
        assert model.training
        rates.append(optimizer.param_groups[0]["lr"])
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(trainer, "_LARGEST_GRADIENT", 1e-3)
    train_exits(model, data, data, {"input_ids": 0}, settings, silent)
    assert rates == pytest.approx([1 / 2, 1, *(left / 28 for left in range(28, 0, -1))])
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters()), "they do not add up"
    assert not model.training, "dev is scored without dropout"
