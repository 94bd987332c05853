#!/usr/bin/env python
"""The parts of `scripts/quickstart` that are not commands of fpabee.

    python scripts/demo.py classifier ENCODER demo/classifier --texts demo/texts.jsonl
    python scripts/demo.py compare demo/classifier demo/engines

`classifier` fine-tunes a plain classifier on half of the synthetic training data, and writes the
other half and dev, without labels, as the texts of its conversion. `compare` runs the test data
through the classifier in PyTorch, as people run it, and through the engines: in turns, in one
process, after a warm-up. Rates are medians of the turns, and the time of one text is a mean, as in
speed-ups, because a median would hide the texts that use all layers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from fpabee.commands.command import exits_with_one_line

DATA = Path(__file__).parent / "demo_data"
EPOCHS = 3
LEARNING_RATE = 2e-4
TURNS = 5
SINGLE_TEXTS = 50
PIPELINE_BATCH = 32

Classify = Callable[[Sequence[str]], list[str]]
"""Texts in, one label for each out."""


@dataclass
class Variant:
    """One way to classify, and what was measured of it.

    Attributes:
        name: in the table.
        classify: answers texts.
        answers: the labels of all texts.
        rates: texts a second over the file, one for each turn.
        milliseconds: of each text that was classified alone.
    """

    name: str
    classify: Classify
    answers: list[str] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Texts a second over the file, the median of the turns."""
        return statistics.median(self.rates)

    def take_turn(self, texts: Sequence[str], alone: Sequence[str]) -> None:
        """Classify all texts together, then some of them one by one."""
        started = time.perf_counter()
        self.answers = self.classify(texts)
        self.rates.append(len(texts) / (time.perf_counter() - started))
        for text in alone:
            started = time.perf_counter()
            self.classify([text])
            self.milliseconds.append(1e3 * (time.perf_counter() - started))


def rows_of(part: str) -> tuple[list[str], list[str]]:
    """The texts and labels of a part of the demo data."""
    from fpabee.runtime import read_rows

    rows = list(read_rows(DATA / f"{part}.jsonl.gz"))
    return [row.text for row in rows], [str(*(row.labels or ())) for row in rows]


def in_pytorch(folder: Path) -> Classify:
    """The classifier in PyTorch, through the pipeline of Transformers."""
    from transformers import pipeline

    pipe: Any = pipeline("text-classification", model=str(folder), device="cpu")

    def classify(texts: Sequence[str]) -> list[str]:
        answers = pipe(list(texts), batch_size=min(len(texts), PIPELINE_BATCH), truncation=True)
        return [answer["label"] for answer in answers]

    return classify


def measure(variants: Sequence[Variant], texts: Sequence[str]) -> None:
    """Let all variants classify the texts in turns; the first turn warms up."""
    alone = texts[:: max(1, len(texts) // SINGLE_TEXTS)]
    for turn in range(1 + TURNS):
        for place in range(len(variants)):
            variants[(turn + place) % len(variants)].take_turn(texts, alone)
        if turn == 0:
            for variant in variants:
                variant.rates.clear()
                variant.milliseconds.clear()


def heads(texts: int, width: int) -> list[str]:
    """The heads of the table of a number of texts, whose first column has a width."""
    what = f"{texts} test texts"
    return [
        f"{'':{width}}  texts per  times as  one text,  answers",
        f"{what:{width}}     second      fast    mean ms  changed  accuracy",
    ]


def table(variants: Sequence[Variant], labels: Sequence[str]) -> list[str]:
    """The lines of the comparison; the first variant is what the others are compared with."""
    reference = variants[0]
    width = max(len(variant.name) for variant in variants)
    lines = heads(len(labels), width)
    for variant in variants:
        changed = sum(map(str.__ne__, variant.answers, reference.answers))
        right = statistics.mean(map(str.__eq__, variant.answers, labels))
        lines.append(
            f"{variant.name:{width}} {variant.rate:>10,.0f} {variant.rate / reference.rate:>9.1f}"
            f" {statistics.mean(variant.milliseconds):>10.2f} {changed:>8} {right:>9.3f}"
        )
    return lines


@click.group()
def main() -> None:
    """The parts of the quickstart that are not commands of fpabee."""
    from transformers.utils import logging

    # Its bars and warnings are about weights that the fine-tuning makes.
    of_transformers: Any = logging
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()


@main.command()
@click.argument("encoder")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--texts", "file", required=True, type=click.Path(path_type=Path))
@exits_with_one_line
def classifier(encoder: str, folder: Path, file: Path) -> None:
    """Fine-tune ENCODER to a classifier in FOLDER, and write texts without labels."""
    from fine_tune import fine_tune

    texts, labels = rows_of("train")
    others = [*texts[1::2], *rows_of("dev")[0]]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in others), encoding="utf-8")
    fine_tune(
        encoder,
        texts[::2],
        [(label,) for label in labels[::2]],
        folder,
        epochs=EPOCHS,
        lr=LEARNING_RATE,
    )


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("engines", type=click.Path(exists=True, path_type=Path))
@exits_with_one_line
def compare(folder: Path, engines: Path) -> None:
    """Compare the classifier in FOLDER with its conversion in ENGINES on the test data."""
    from fpabee.runtime import Engine

    texts, labels = rows_of("test")
    with Engine.load(engines) as engine:

        def classify(texts: Sequence[str], *, full_depth: bool) -> list[str]:
            return [row.labels[0] for row in engine.predict(texts, full_depth=full_depth)]

        point = f"fpabee, {engine.operating_point} in {engine.target}"
        variants = [
            Variant("PyTorch (transformers.pipeline)", in_pytorch(folder)),
            Variant("fpabee, all layers", lambda texts: classify(texts, full_depth=True)),
            Variant(point, lambda texts: classify(texts, full_depth=False)),
        ]
        measure(variants, texts)
    click.echo("\n".join(table(variants, labels)))


if __name__ == "__main__":
    main()
