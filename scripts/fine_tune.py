"""Fine-tune a sequence classifier as anybody would, with plain Transformers code."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from systems import Text
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_scheduler

from fpabee.exporter.training.workflow import has_fast_bf16

BATCH = 32


def tokenized(tokenizer: Any, texts: Sequence[Text], max_length: int | None = None) -> Any:
    """A padded batch of texts or pairs, by default cut to what the encoder takes."""
    return tokenizer(
        list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )


def fine_tune(
    encoder: str | Path,
    texts: Sequence[Text],
    labels: Sequence[Sequence[str]],
    folder: Path,
    *,
    epochs: int,
    lr: float = 5e-5,
    seed: int = 42,
    max_length: int = 128,
    layers: int | None = None,
) -> None:
    """Train a classifier and save it with its tokenizer.

    Args:
        encoder: what `AutoModelForSequenceClassification` loads.
        texts: texts or pairs.
        labels: the labels of each; a text with several makes the task multi-label.
        folder: gets the model.
        epochs: how often each text is seen.
        lr: highest learning rate.
        seed: of the order and of the new weights.
        max_length: number of tokens to which texts are cut.
        layers: number of first layers that are kept; None: all.
    """
    names = sorted({label for each in labels for label in each})
    multi = any(len(each) > 1 for each in labels)
    hot = torch.tensor([[float(name in each) for name in names] for each in labels])
    targets = hot if multi else hot.argmax(1)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    more: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        encoder,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        problem_type="multi_label_classification" if multi else "single_label_classification",
        **more,
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    steps = epochs * -(-len(texts) // BATCH)
    schedule = get_scheduler("linear", optimizer, steps // 10, steps)
    shuffle = random.Random(seed).shuffle
    order = list(range(len(texts)))
    for epoch in range(1, 1 + epochs):
        shuffle(order)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = tokenized(tokenizer, [texts[row] for row in rows], max_length)
            with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16()):
                loss = model(**batch, labels=targets[rows]).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        click.echo(f"epoch {epoch} of {epochs}, loss of the last batch {loss.item():.3f}", err=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
