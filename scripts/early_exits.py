#!/usr/bin/env python
"""Try other ways to train the early exits, and compare how many layers they save at half a point.

    python scripts/early_exits.py --data DATA --work WORK --only trec --seed 42

Each way trains a model without exit 0 and stores its logits in WORK/DATA-WAY-SEED.npz. A JSON file
beside RESULTS keeps what is known of each model, and finished models are not trained again. The
table has means over seeds of

- the score of each exit on test,
- the layers in % that `balanced`, chosen on dev, saves on test, and its score there,
- the layers in % that one threshold of entropy could save on dev and test together, if the score
  may be half a point below the last exit of `plain` (for ways with half of the rows: of `half`),
- the seconds of the training.

With `--rows N`, only N of the training rows are used, other ones for each seed. The ways are:

- `plain`: as `fpabee-train` does it by default, but without hidden layers, and with a fixed number
  of epochs: the one in `EPOCHS`, or 3 with `--rows`.
- `default-epochs`: the same with as many epochs as `fpabee-train` takes by default.
- `longer`: the same with twice as many epochs as `plain`, since two phases take as long.
- `two-phase`: first the last exit alone. Then all exits, the early ones half on the labels and half
  on what that last exit predicted ("mixed" training, arXiv 2407.14320).
- `separated`: each layer learns from the next exit only (SWEET, arXiv 2306.02307).
- `hidden`: the first two exits have one hidden layer.
- `longer-hidden`: the same with twice as many epochs.
- `half`: `plain` with half of the labelled rows.
- `longer-half`: the same with three times as many epochs, which are the steps of `unlabelled`.
- `unlabelled`: `two-phase` with that half, and in the second phase also with the other half, whose
  targets are what the last exit predicted.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DataCollatorWithPadding, set_seed

from fpabee.calibration.choose import Selector
from fpabee.calibration.families import DEFAULT_MEASURES, DEFAULT_RULES
from fpabee.calibration.outcome import exits_of
from fpabee.calibration.scoring import METRICS, LabelledLogits, Scorer
from fpabee.calibration.stopping_costs import StoppingCosts
from fpabee.exporter.model import MultiExitModel
from fpabee.exporter.training import TrainOptions
from fpabee.exporter.training.pipeline import build_model, features, has_fast_bf16
from fpabee.exporter.training.predictions import predict
from fpabee.exporter.training.rows import encoded_rows, label_names, load_rows
from fpabee.exporter.training.trainer import Features, MultiExitTrainer
from fpabee.runtime import Goal, ProblemType
from fpabee.runtime.rules.rules import Entropy

# How many times as many epochs each way has as `plain`; 0: those of `fpabee-train`.
WAYS = {
    "plain": 1,
    "default-epochs": 0,
    "longer": 2,
    "two-phase": 1,
    "separated": 1,
    "hidden": 1,
    "longer-hidden": 2,
    "half": 1,
    "longer-half": 3,
    "unlabelled": 1,
}
HALF = ("half", "longer-half", "unlabelled")
EPOCHS = {"trec": 3.0, "sst2": 3.0, "mrpc": 2.0, "snips": 1.0}
GOAL = 0.5  # points
METRIC = METRICS[ProblemType.SINGLE_LABEL][0]
RESULTS = Path(__file__).parent / "results" / "early-exits.md"


class TargetTrainer(MultiExitTrainer):
    """Trains on the targets of a row: one for its last exit, and one for all other exits."""

    last_alone = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss over all exits as in `exit_loss`, or that of the last exit."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs)
        inputs.pop("labels")
        early, last = inputs.pop("early"), inputs.pop("last")
        logits = model(**inputs)
        losses = [functional.cross_entropy(row, early) for row in logits[:-1]]
        losses.append(functional.cross_entropy(logits[-1], last))
        if self.last_alone:
            return losses[-1]
        weights = torch.arange(1, len(losses) + 1, dtype=torch.float32)
        return (torch.stack(losses) * weights).sum() / weights.sum()


def train_way(
    way: str, data: Path, name: str, seed: int, backbone: str, most: int | None
) -> dict[str, Any]:
    """Train one model on at most `most` rows.

    Returns:
        Logits `[exits, rows, labels]` and labels of dev and test.
    """
    files = {part: str(data / name / f"{part}.jsonl.gz") for part in ("train", "dev", "test")}
    options = TrainOptions(
        train=files["train"],
        dev=files["dev"],
        backbone=backbone,
        seed=seed,
        bf16=has_fast_bf16(),
        epochs=(3.0 if most else EPOCHS[name]) * WAYS[way] or None,
        exit_0=False,
    )
    set_seed(seed)
    rows = {part: load_rows(path, True, options.reading) for part, path in files.items()}
    usual, tokenizer = build_model(options, label_names(rows["train"], files["train"]))
    config = replace(usual.exit_config, hidden_layers=2 if "hidden" in way else 0)
    model = MultiExitModel(usual.backbone.encoder, config)
    length = min(options.max_length, model.backbone.max_positions())
    parts = {
        part: features(found, encoded_rows(found, tokenizer, length), tokenizer, config)
        for part, found in rows.items()
    }
    others: Features = []
    if way in HALF or most:
        order = np.random.default_rng(seed).permutation(len(parts["train"]))[:most]
        parts["train"] = [parts["train"][number] for number in order]
    if way in HALF:
        middle = len(parts["train"]) // 2
        parts["train"], others = parts["train"][:middle], parts["train"][middle:]
    if way == "separated":
        separate(model)

    def fit(kind: type[MultiExitTrainer], train: Features, alone: bool = False) -> None:
        with tempfile.TemporaryDirectory() as folder:
            given = {"train": train, "dev": parts["dev"]}
            trainer = kind(model, options, Path(folder), given, tokenizer, report)
            if isinstance(trainer, TargetTrainer):
                trainer.last_alone = alone
            trainer.train()

    collate, started = DataCollatorWithPadding(tokenizer), time.perf_counter()

    def logits_of(found: Features) -> Any:
        return predict(model, found, collate, lambda output: output.transpose(0, 1))

    if way in ("two-phase", "unlabelled"):
        labelled, labels = parts["train"], len(config.labels)
        hard = np.eye(labels, dtype=np.float32)[[row["labels"] for row in labelled]]
        fit(TargetTrainer, with_targets(labelled, hard, hard), alone=True)
        model.train()
        every = labelled + (others if way == "unlabelled" else [])
        taught = torch.tensor(logits_of(every)[:, -1]).softmax(-1).numpy()
        early, last = taught.copy(), taught.copy()
        early[: len(hard)] = (early[: len(hard)] + hard) / 2
        last[: len(hard)] = hard
        fit(TargetTrainer, with_targets(every, early, last))
    else:
        fit(MultiExitTrainer, parts["train"])
    content: dict[str, Any] = {"seconds": time.perf_counter() - started}
    for part in ("dev", "test"):
        content[f"{part}_logits"] = logits_of(parts[part]).swapaxes(0, 1)
        content[f"{part}_labels"] = np.array([row["labels"] for row in parts[part]])
    return content


def with_targets(rows: Features, early: Any, last: Any) -> Features:
    """Rows with the targets `[rows, labels]` of their early exits and of their last one."""
    return [row | {"early": early[n], "last": last[n]} for n, row in enumerate(rows)]


def separate(model: MultiExitModel) -> None:
    """Keep the gradient of an exit from the layers before the exit before it."""

    def detach(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].detach(), *inputs[1:])

    for block in model.parts[1][1:]:
        block.register_forward_pre_hook(detach)


def report(what: str, done: int, total: int) -> None:
    """Print what is done after each epoch."""
    if "loss" not in what:
        click.echo(f"{what} {done}/{total}", err=True)


def judge(stored: Any) -> dict[str, Any]:
    """Scores of all exits on test, and the layers that `balanced` saves there."""
    rows = {}
    for part in ("dev", "test"):
        logits, labels = stored[f"{part}_logits"], stored[f"{part}_labels"]
        lengths = np.ones(len(labels), np.intp)
        rows[part] = LabelledLogits(logits, lengths, labels, ProblemType.SINGLE_LABEL)
    dev, test = rows["dev"], rows["test"]
    layers = len(dev.logits)
    costs = np.repeat(np.arange(1.0, layers + 1)[:, None], len(dev), axis=1)
    selector = Selector(StoppingCosts(dev, METRIC, costs), DEFAULT_RULES, list(DEFAULT_MEASURES))
    rule = selector.search.choose(Goal(max_drop=GOAL), selector.search.kinds)
    exits = exits_of(rule, test) if rule else np.full(len(test), layers)
    scorer, every = Scorer(test, METRIC), dev_and_test(stored)
    return {
        "seconds": float(stored["seconds"]),
        "exits": [100 * scorer.score(np.full(len(test), n)) for n in test.exits],
        "saving": 100 * (1 - exits.mean() / layers),
        "score": 100 * scorer.score(exits),
        "full": Scorer(every, METRIC).score(np.full(len(every), layers)),
    }


def dev_and_test(stored: Any) -> LabelledLogits:
    """The rows of dev and of test, together."""
    logits, labels = (
        np.concatenate([stored[f"dev_{what}"], stored[f"test_{what}"]], axis=axis)
        for what, axis in (("logits", 1), ("labels", 0))
    )
    return LabelledLogits(logits, np.ones(len(labels), np.intp), labels, ProblemType.SINGLE_LABEL)


def possible_saving(rows: LabelledLogits, full: float) -> float:
    """The most that a threshold of entropy saves, chosen on the rows it is for.

    Args:
        rows: the rows.
        full: the score may be half a point below this one.
    """
    scorer, layers, best = Scorer(rows, METRIC), len(rows.logits), 0.0
    floor = full - GOAL / 100
    for threshold in np.geomspace(1e-4, 1, 400):
        exits = exits_of(Entropy(threshold=float(threshold)), rows)
        if scorer.score(exits) >= floor - 1e-12:
            best = max(best, float(1 - exits.mean() / layers))
    return best


def judged(work: Path, stored: Path) -> dict[str, Any]:
    """What is known of all models, by DATA-WAY-SEED; it is stored, so that logits can go."""
    known: dict[str, Any] = json.loads(stored.read_text()) if stored.is_file() else {}
    logits = {path.stem: np.load(path) for path in sorted(work.glob("*.npz"))}
    known |= {key: judge(content) for key, content in logits.items()}
    for key, content in logits.items():
        name, rest = key.split("-", 1)
        way, seed = rest.rsplit("-", 1)
        usual = "half" if way in HALF else "plain"
        full = known[f"{name}-{usual}-{seed}"]["full"]
        known[key]["possible"] = 100 * possible_saving(dev_and_test(content), full)
    stored.write_text(json.dumps(known, indent=1) + "\n")
    return known


def table(known: dict[str, Any]) -> list[str]:
    """Means over seeds for each data set and way."""
    lines = []
    for name in sorted({key.split("-")[0] for key in known}):
        titles = "way", "seeds", "each exit", "balanced saves", "its score", "possible", "seconds"
        lines += ["", f"## {name}", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for way in WAYS:
            found = [
                each for key, each in known.items() if key.rsplit("-", 1)[0] == f"{name}-{way}"
            ]
            if found:
                mean = {key: np.mean([one[key] for one in found], axis=0) for key in found[0]}
                exits = " ".join(f"{score:.1f}" for score in mean["exits"])
                figures = (f"{mean[key]:.1f}" for key in ("saving", "score", "possible", "seconds"))
                lines.append(f"| {way} | {len(found)} | {exits} | {' | '.join(figures)} |")
    return lines


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Logits.")
@click.option("--only", multiple=True, type=click.Choice(list(EPOCHS)), help="Default: all.")
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="Default: all.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(42, 43, 44))
@click.option("--rows", type=click.IntRange(min=64), help="Training rows. Default: all.")
@click.option("--minilm", default="sentence-transformers/all-MiniLM-L6-v2")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(
    data: Path,
    work: Path,
    only: tuple[str, ...],
    ways: tuple[str, ...],
    seeds: tuple[int, ...],
    rows: int | None,
    minilm: str,
    results: Path,
) -> None:
    """Train what is missing, and write the table."""
    work.mkdir(parents=True, exist_ok=True)
    stored = results.with_suffix(".json")
    known = judged(work, stored)
    for name in only or EPOCHS:
        label = f"{name}_{rows}" if rows else name
        for seed in seeds:
            for way in ways or WAYS:
                path = work / f"{label}-{way}-{seed}.npz"
                if path.stem not in known:
                    click.echo(path.stem, err=True)
                    np.savez_compressed(path, **train_way(way, data, name, seed, minilm, rows))
    known = judged(work, stored)
    results.write_text("\n".join(["# Ways to train early exits", *table(known), ""]))
    click.echo(results.read_text())


if __name__ == "__main__":
    main()
