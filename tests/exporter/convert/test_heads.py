"""Heads learn what the classifier predicts, and the layers that have an exit are chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fpabee.calibration.progress import silent
from fpabee.exporter.convert.classifier import Classifier
from fpabee.exporter.convert.heads import (
    Judged,
    Lesson,
    choose_exits,
    cost_of_heads,
    form_for,
    logits_of,
    store,
    train_heads,
)
from fpabee.exporter.convert.options import Form
from fpabee.exporter.convert.states import States
from fpabee.exporter.exit_config import Pooling, attending_width
from fpabee.exporter.training.trainer import label_losses, probabilities

from ...closeness import assert_exported
from .conftest import SINGLE

Make = Callable[..., Path]


def made_up(rows: int) -> tuple[States, Lesson]:
    """States of tokens of which one says what the classifier decides, and what it decides.

    It may be any token, and differs from the others.
    """
    random = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(random.integers(3, 9, rows))])
    tokens = random.normal(3, 5, (starts[-1], 2, 32))
    telling = random.integers(starts[:-1], starts[1:])
    tokens[:, :, 3] = 0
    tokens[telling, :, 3] = 30
    logits = tokens[telling, 0, :3] - 3
    tokens[telling, 1, :3] = tokens[telling, 0, :3]
    states = States(np.arange(rows), starts, tokens.astype(np.float16))
    targets = probabilities(torch.from_numpy(logits.astype(np.float32)), SINGLE)
    return states, Lesson(targets, torch.ones(rows), partial(label_losses, problem_type=SINGLE))


def judge(lesson: Lesson) -> Callable[[NDArray[np.float32], NDArray[np.float64]], Judged]:
    """Judges exits by how often they agree with a lesson, and by what they save."""

    def judged(exits: NDArray[np.float32], costs: NDArray[np.float64]) -> Judged:
        answers = lesson.targets.numpy()[-exits.shape[1] :].argmax(axis=-1)
        agreement = (exits.argmax(axis=-1) == answers).mean(axis=1)
        return Judged(
            tuple(map(float, agreement)), float(agreement @ (1 - costs[:-1]) / len(exits))
        )

    return judged


def test_heads_that_attend_learn_which_token_counts(classifier: Classifier, quick: None) -> None:
    states, lesson = made_up(900)
    chosen = choose_exits(classifier, states, lesson, 600, judge(lesson), silent)
    assert chosen.form.queries > 0
    assert min(chosen.agreement) > 0.85
    assert 0 < chosen.saved < 2 / 3


@pytest.mark.parametrize("every", [1, 2])
def test_the_exits_that_save_more_are_chosen(
    every: int, classifier: Classifier, quick: None
) -> None:
    states, lesson = made_up(60)
    counts = {1: 2, 2: 1}  # of three layers

    def judged(exits: NDArray[np.float32], costs: NDArray[np.float64]) -> Judged:
        return Judged((0.0,) * len(exits), float(len(exits) == counts[every]))

    assert choose_exits(classifier, states, lesson, 40, judged, silent).form.every == every


def test_heads_have_as_many_queries_as_they_may_cost(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = attending_width(32)
    forms = [Form(Pooling.ATTENTION, width, 4), Form(Pooling.ATTENTION, width, 1)]
    costs = [cost_of_heads(form, classifier) for form in forms]
    assert costs[0] > costs[1]
    for limit, expected in ((costs[0], forms[0]), (costs[1], forms[1]), (0, Form(Pooling.BOTH))):
        monkeypatch.setattr("fpabee.exporter.convert.heads._MOST_COST", limit)
        assert form_for(classifier) == expected


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


FORMS = [Form(Pooling.BOTH), Form(Pooling.MEAN, 8), Form(Pooling.ATTENTION, 8, 3, every=2)]


@pytest.mark.parametrize("form", FORMS)
def test_stored_heads_give_the_same_logits(form: Form, classifier: Classifier, quick: None) -> None:
    states, lesson = made_up(200)
    seen: list[tuple[int, int]] = []
    heads = train_heads(
        form, classifier, states, lesson, 150, lambda _, done, total: seen.append((done, total))
    )
    assert len(seen) > 1
    assert seen == [(step, len(seen)) for step in range(len(seen))]
    numbers = np.arange(200)
    expected = logits_of(heads, states, numbers)
    config = classifier.exit_config(form.exits(classifier.layers), form.pooling)
    config = replace(
        config,
        hidden_layers=len(config.exits) - 1 if form.width else 0,
        hidden_width=form.width,
        queries=form.queries,
    )
    model = classifier.multi_exit(config).eval()
    store(heads, form, model)
    tokens, weights = states.batch(numbers)
    with torch.no_grad():
        for number, layer in enumerate(config.exits[:-1]):
            found = model.parts[2][number](tokens[layer - 1], weights)
            assert_exported(found, expected[layer - 1])


@pytest.mark.parametrize("form", FORMS)
def test_a_state_that_hardly_varies_costs_no_precision(
    form: Form, classifier: Classifier, quick: None
) -> None:
    """The first token after an early layer of MPNet: a mean 11,000 times its deviation."""
    states, lesson = made_up(200)
    states.tokens[:, :, 5:9] = 1 + 1e-4 * states.tokens[:, :, 5:9]
    heads = train_heads(form, classifier, states, lesson, 200)
    numbers = np.arange(200)
    found = logits_of(heads, states, numbers)
    tokens, weights = states.batch(numbers)
    with torch.no_grad():
        exact = [
            head.double()(tokens[n].double(), weights.double()) for n, head in enumerate(heads)
        ]
    assert_exported(found, torch.stack(exact))


@pytest.mark.parametrize("form", FORMS)
def test_heads_give_logits_though_they_learn_standardised_ones(
    form: Form, classifier: Classifier, quick: None
) -> None:
    states, lesson = made_up(200)
    shifted = replace(lesson, mean=-7.0, deviation=3.0)
    numbers = np.arange(200)
    plain, found = (
        logits_of(train_heads(form, classifier, states, each, 200), states, numbers)
        for each in (lesson, shifted)
    )
    assert_exported(found, 3 * plain - 7)


def test_rows_that_weigh_nothing_teach_nothing(classifier: Classifier, quick: None) -> None:
    states, lesson = made_up(200)
    first = torch.arange(200) < 100
    other = replace(
        lesson,
        targets=torch.where(first[:, None], lesson.targets, lesson.targets.flip(-1)),
        weights=first.float(),
    )
    numbers = np.arange(100)
    found, wrong = (
        logits_of(train_heads(FORMS[2], classifier, states, each, 200), states, numbers)
        for each in (other, replace(other, weights=torch.ones(200)))
    )
    right = [
        float((each.argmax(axis=-1) == lesson.targets[:100].argmax(dim=-1).numpy()).mean())
        for each in (found, wrong)
    ]
    assert right[0] > right[1]


def test_training_uses_one_thread_and_gives_the_others_back(make: Make, quick: None) -> None:
    seen: set[int] = set()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)

    class Noting(States):
        def batch(self, places: NDArray[np.intp]) -> tuple[torch.Tensor, torch.Tensor]:
            seen.add(torch.get_num_threads())
            return super().batch(places)

    states, lesson = made_up(60)
    noting = Noting(states.rows, states.starts, states.tokens)
    try:
        train_heads(FORMS[0], Classifier(make("bert")), noting, lesson, 60)
        assert (seen, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(threads)


def test_exits_are_counted_from_the_last_layer() -> None:
    assert Form(Pooling.MEAN).exits(4) == (1, 2, 3)
    assert Form(Pooling.MEAN, every=2).exits(6) == (2, 4)
    assert Form(Pooling.MEAN, every=2).exits(7) == (1, 3, 5)
    assert Form(Pooling.MEAN, every=2).exits(2) == ()
