"""Heads learn what the classifier predicts, and the form that suits the texts is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fpabee.calibration.progress import silent
from fpabee.exporter.convert.classifier import Classifier
from fpabee.exporter.convert.heads import (
    choose_form,
    cost_of_heads,
    logits_of,
    store,
    train_heads,
)
from fpabee.exporter.convert.options import Form
from fpabee.exporter.exit_config import Pooling

from ...closeness import assert_exported

Make = Callable[..., Path]


def made_up(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States in which only the first token says what the classifier decides, and its logits."""
    torch.manual_seed(0)
    states = 3 + 5 * torch.randn(rows, 2, 2, 32)
    logits = states[:, 0, 1, :3] - 3
    states[:, 1, 1, :3] = states[:, 0, 1, :3]
    return states, logits


def test_the_form_whose_exits_agree_is_chosen(make: Make, quick: None) -> None:
    classifier = Classifier(make("bert"))
    states, logits = made_up(900)
    given = states.numpy(), logits.numpy(), 600, 0.01, ()
    chosen = choose_form(classifier, *given, silent)
    assert chosen.form is not None
    assert chosen.form.pooling in (Pooling.FIRST, Pooling.BOTH)
    assert min(chosen.agreement) > 0.85
    assert 0 < chosen.saved < 2 / 3


def test_what_heads_cost_is_counted_and_not_timed(make: Make) -> None:
    classifier = Classifier(make("bert"))
    costs = [cost_of_heads(Form(Pooling.BOTH, width), classifier) for width in (0, 8, 64)]
    assert costs == [cost_of_heads(Form(Pooling.BOTH, width), classifier) for width in (0, 8, 64)]
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 32 + 64 + 4 * 32
    linear = 2 * (50_000 + (64 * 3 + 3) / 3)
    assert costs[0] == pytest.approx(linear / (3 * layer))
    assert costs == sorted(costs)
    shared = Classifier(make("albert"))  # it runs one layer three times
    assert cost_of_heads(Form(Pooling.MEAN), shared) == pytest.approx(costs[0], rel=0.01)


def test_heads_that_cost_too_much_are_not_chosen(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpabee.exporter.convert.heads._MOST_COST", 0.0)
    states, logits = made_up(60)
    given = states.numpy(), logits.numpy(), 40, 0.01, ()
    chosen = choose_form(Classifier(make("bert")), *given, silent)
    assert chosen.form is not None
    assert (chosen.form.pooling, chosen.form.width) == (Pooling.MEAN, 0)


@pytest.mark.parametrize("form", [Form(Pooling.MEAN), Form(Pooling.BOTH, 8, every=2)])
def test_stored_heads_give_the_same_logits(form: Form, make: Make, quick: None) -> None:
    classifier = Classifier(make("bert"))
    states, logits = made_up(200)
    heads = train_heads(form, classifier, states, logits)
    expected = logits_of(heads, states)
    config = classifier.exit_config(form.exits(classifier.layers), form.pooling)
    hidden = len(config.exits) - 1 if form.width else 0
    config = replace(config, hidden_layers=hidden, hidden_width=form.width)
    model = classifier.multi_exit(config).eval()
    store(heads, form, model)
    with torch.no_grad():
        for number, layer in enumerate(config.exits[:-1]):
            taken = states[:, layer - 1]
            inputs = taken.flatten(1) if form.pooling is Pooling.BOTH else taken[:, 0]
            found = model.parts[2][number].classify(inputs)
            assert_exported(found, expected[layer - 1])


@pytest.mark.parametrize("width", [0, 8])
def test_a_state_that_hardly_varies_costs_no_precision(width: int, make: Make, quick: None) -> None:
    """The first token after an early layer of MPNet: a mean 11,000 times its deviation."""
    classifier = Classifier(make("bert"))
    states, logits = made_up(200)
    states[:, :, 1, 5:9] = 1 + 1e-4 * states[:, :, 1, 5:9]
    heads = train_heads(Form(Pooling.FIRST, width), classifier, states, logits)
    found = logits_of(heads, states)
    exact = logits_of([head.double() for head in heads], states.double())
    assert_exported(found, exact)


def test_exits_are_counted_from_the_last_layer() -> None:
    assert Form(Pooling.MEAN).exits(4) == (1, 2, 3)
    assert Form(Pooling.MEAN, every=2).exits(6) == (2, 4)
    assert Form(Pooling.MEAN, every=2).exits(7) == (1, 3, 5)
    assert Form(Pooling.MEAN, every=2).exits(2) == ()
