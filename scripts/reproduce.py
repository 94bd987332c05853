#!/usr/bin/env python
"""Compare all exit rules as the F-PABEE paper does: scores at 25, 50 and 75 % of layers saved.

    python scripts/reproduce.py --data DATA --work WORK [--only mini-sst2]

For each dataset and seed, one multi-exit model is trained, exported and traced on dev and test. For
each kind of rule, the setting with the least drop among those that save enough is chosen on dev
and evaluated on test. Models are trained with the loss of the paper; those named `-distill` also
use self-distillation, and are compared with the others. DATA holds a folder for each dataset, with
train, dev and test as `.jsonl.gz`. Finished steps are not repeated, so the script can be stopped at
any time. A model that was trained elsewhere is used if it is in WORK/NAME-SEED. Results are in
`scripts/results/`: a JSON file for each run, and tables.

Models named `-exit-0` also have exit 0, and are trained with the default options. They are compared
with what people would do instead: the cascade, encoders that are cut after the first layers, and
model2vec. For this, nothing else should run on the machine.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np
from reproduce_alternatives import (
    choose,
    compare_alternatives,
    selector_by_layers,
    static_model,
)
from reproduce_tables import DISTILLED, EXIT_0, SAVINGS, alternatives, tables
from transformers import AlbertConfig, AutoTokenizer

from fpabee.calibration.outcome import exits_of
from fpabee.calibration.scoring import METRICS, LabelledLogits, Scorer
from fpabee.calibration.trace import trace_rows
from fpabee.exporter import export
from fpabee.exporter.exit_0 import EXIT_0_FILE
from fpabee.exporter.training import TrainOptions, train
from fpabee.exporter.training.pipeline import has_fast_bf16
from fpabee.exporter.training.report import REPORT_NAME
from fpabee.exporter.training.resume import last_checkpoint
from fpabee.runtime import Engine, ProblemType
from fpabee.runtime.artifact.operating_point import Goal
from fpabee.runtime.backends.onnxruntime_session import session_options
from fpabee.runtime.cli.errors import exits_with_one_line
from fpabee.runtime.cli.progress import step_progress
from fpabee.runtime.files import read_rows
from fpabee.runtime.rules.measures import Measure
from fpabee.runtime.rules.rules import RULES

RESULTS = Path(__file__).parent / "results"
MINILM, MPNET, ALBERT = "minilm", "mpnet", "albert"


@dataclass(frozen=True)
class Run:
    """One model on one dataset.

    Attributes:
        backbone: which encoder is trained.
        data: folder of the dataset.
        seeds: number of seeds.
        options: of the training, where they differ from the defaults. Epochs are 3 unless they are
            among them.
        problem_type: the task.
        distill: the option of that name; 0 gives the loss of the paper.
        exit_0: whether the model has exit 0.
        shifted: folders of datasets whose first texts are of another kind.
    """

    backbone: str
    data: str
    seeds: int = 3
    options: dict[str, Any] = field(default_factory=dict)
    problem_type: ProblemType = ProblemType.SINGLE_LABEL
    distill: float = 0.0
    exit_0: bool = False
    shifted: tuple[str, ...] = ()


_MULTI = ProblemType.MULTI_LABEL
_PLAIN = {
    "mini-sst2": Run(MINILM, "sst2"),
    "mini-mrpc": Run(MINILM, "mrpc"),
    "mini-trec": Run(MINILM, "trec"),
    "mini-mixsnips": Run(MINILM, "mixsnips", 3, {"epochs": 2.0}, _MULTI),
    "mini-mixatis": Run(MINILM, "mixatis", problem_type=_MULTI),
    "mpnet-sst2": Run(MPNET, "sst2", 1, {"epochs": 2.0, "lr": 3e-5}),
    "mpnet-mixsnips": Run(MPNET, "mixsnips", 1, {"epochs": 0.5, "lr": 3e-5}, _MULTI),
    "albert-snips": Run(ALBERT, "snips", 1, {"random_init": True, "lr": 3e-4}),
}
# The number of seeds with which self-distillation is evaluated.
_DISTILLED = {
    "mini-sst2": 3,
    "mini-mrpc": 3,
    "mini-trec": 3,
    "mini-mixsnips": 1,
    "mini-mixatis": 1,
    "mpnet-sst2": 1,
}
_EXIT_0 = {
    "mini-sst2": Run(MINILM, "sst2", shifted=("mrpc", "cola")),
    "mini-trec": Run(MINILM, "trec"),
    "mini-mrpc": Run(MINILM, "mrpc", options={"epochs": 2.0}),
    "mini-snips": Run(MINILM, "snips", 1, {"epochs": 1.0}),
    "mini-mixsnips": Run(MINILM, "mixsnips", 1, {"epochs": 0.5}, _MULTI),
    "mini-mixatis": Run(MINILM, "mixatis", 1, {"epochs": 1.0}, _MULTI),
    "mpnet-sst2": _PLAIN["mpnet-sst2"],
}
RUNS = (
    _PLAIN
    | {
        name + DISTILLED: replace(_PLAIN[name], seeds=seeds, distill=0.5)
        for name, seeds in _DISTILLED.items()
    }
    | {name + EXIT_0: replace(run, distill=0.5, exit_0=True) for name, run in _EXIT_0.items()}
)
# Options that differed between runs.
_REPORTED = ("epochs", "lr", "distill", "bf16")
# The numbers of layers after which encoders are cut, to compare them with exits.
_CUTS = (1, 2, 3)


def train_run(run: Run, seed: int, data: Path, backbone: str, folder: Path, command: str) -> Any:
    """Train the model of a run, unless that is done, and return its report.

    An interrupted training is resumed, and a model gets exit 0 if that alone is missing.
    """
    report = folder / REPORT_NAME
    files: Any = {part: str(path) for part, path in files_of(run, data).items()}
    with step_progress(quiet=False) as progress:
        if not report.is_file():
            options = TrainOptions(
                **files,
                backbone=backbone,
                problem_type=run.problem_type,
                distill=run.distill,
                seed=seed,
                bf16=has_fast_bf16(),
                exit_0=run.exit_0,
                resume=last_checkpoint(folder) is not None,
                **{"epochs": 3.0} | run.options,
            )
            train(folder, options, progress, command)
        elif run.exit_0 and not (folder / EXIT_0_FILE).is_file():
            train(folder, TrainOptions(**files, exit_0_only=True, seed=seed), progress)
    return json.loads(report.read_text(encoding="utf-8"))


def engines_of(folder: Path) -> Path:
    """The engines folder of a model_dir, which is exported unless that is done."""
    engines = folder.with_name(f"{folder.name}-engines")
    if not (engines / "manifest.json").is_file():
        export(folder, engines)
    return engines


def cut_encoders(
    name: str, seed: int, data: Path, backbone: str, work: Path, is_trained: bool
) -> dict[int, Path]:
    """Models of encoders that are cut after the first layers, by their number.

    Args:
        name: of the run, whose options the training has.
        seed: of the training.
        data: the folder of the datasets.
        backbone: the encoder.
        work: the folder of the models.
        is_trained: whether encoders are trained; otherwise only those in `work` count.
    """
    found = {}
    for layers in _CUTS:
        run = RUNS[name]
        run = replace(run, options={**run.options, "exits": (layers,)}, distill=0.0, exit_0=False)
        folder = work / f"{name.removesuffix(EXIT_0)}-cut-{layers}-{seed}"
        if is_trained:
            train_run(run, seed, data, backbone, folder, _command(name, seed))
        if (folder / REPORT_NAME).is_file():
            found[layers] = folder
    return found


def _command(name: str, seed: int) -> str:
    return f"python scripts/reproduce.py --data DATA --work WORK --only {name} --seed {seed}"


def files_of(run: Run, data: Path) -> dict[str, Path]:
    """The files of a dataset by part."""
    return {part: data / run.data / f"{part}.jsonl.gz" for part in ("train", "dev", "test")}


def trace(folder: Path, data: Path, threads: int | None) -> tuple[LabelledLogits, list[int]]:
    """The trace of a file, which is stored in the engines folder, and the layer of each exit."""
    with Engine.load(folder, threads=threads) as engine, step_progress(quiet=False) as progress:
        place = folder / "calibration"
        rows = trace_rows(engine, list(read_rows(data)), place, progress=progress)
        return rows, list(engine.manifest.exit_layers)


def store_logits(path: Path, dev: LabelledLogits, test: LabelledLogits) -> None:
    """Store the logits of two parts in 16 bits, with their labels and without their texts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {}
    for part, rows in (("dev", dev), ("test", test)):
        assert rows.expected is not None
        content[f"{part}_logits"] = rows.logits.astype(np.float16)
        content[f"{part}_labels"] = rows.expected.astype(np.int8)
    np.savez_compressed(path, **content)


def compare(dev: LabelledLogits, test: LabelledLogits, layers: Sequence[int]) -> dict[str, Any]:
    """Every kind of rule at every saving: chosen on dev, evaluated on test."""
    metric = METRICS[dev.problem_type][0]
    selector = selector_by_layers(dev, layers, list(RULES), list(Measure))
    scorer = Scorer(test, metric)
    found = []
    for kind in selector.search.kinds:
        for saving in SAVINGS:
            chosen = choose(selector, Goal(speedup=1 / (1 - saving)), [kind])
            if chosen is None:
                continue
            exits = exits_of(chosen, test)
            depth = np.asarray(layers)[test.at(exits)[0]].mean()
            found.append(
                {
                    "kind": kind,
                    "wished": saving,
                    "rule": chosen.to_dict(),
                    "saving": float(1 - depth / layers[-1]),
                    "score": scorer.score(exits),
                }
            )
    every = test.exits
    return {
        "metric": metric,
        "rows": {"dev": len(dev), "test": len(test)},
        "layers": list(layers),
        "exits": [scorer.score(np.full(len(test), number)) for number in every],
        "settings": found,
    }


def small_albert(tokenizer: str, folder: Path) -> str:
    """Write the configuration of an ALBERT with 12 layers of width 256; returns the folder."""
    if not (folder / "config.json").is_file():
        words = AutoTokenizer.from_pretrained(tokenizer)
        words.save_pretrained(folder)
        AlbertConfig(
            vocab_size=len(words),
            embedding_size=128,
            hidden_size=256,
            num_hidden_layers=12,
            num_attention_heads=4,
            intermediate_size=1024,
            max_position_embeddings=128,
            pad_token_id=words.pad_token_id,
        ).save_pretrained(folder)
    return str(folder)


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Models and traces.")
@click.option("--only", multiple=True, type=click.Choice(list(RUNS)), help="Default: all.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Default: 42, 43, ...")
@click.option("--minilm", default="sentence-transformers/all-MiniLM-L6-v2")
@click.option("--mpnet", default="sentence-transformers/all-mpnet-base-v2")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--logits", type=click.Path(path_type=Path), help="Also store logits there.")
@click.option(
    "--train-cuts/--no-train-cuts",
    default=True,
    help="Train encoders that are cut, or use only those in WORK/NAME-cut-LAYERS-SEED.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all cores.")
@exits_with_one_line
def main(
    data: Path,
    work: Path,
    only: tuple[str, ...],
    seeds: tuple[int, ...],
    minilm: str,
    mpnet: str,
    results: Path,
    logits: Path | None,
    train_cuts: bool,
    threads: int | None,
) -> None:
    """Train, export, trace and compare; then write the tables."""
    # First, because an export would set up the process's thread pool with all cores.
    session_options(threads)
    backbones = {MINILM: minilm, MPNET: mpnet, ALBERT: small_albert(minilm, work / ALBERT)}
    runs, others = results / "runs", results / "alternatives"
    for name in only or RUNS:
        run = RUNS[name]
        for seed in seeds or range(42, 42 + run.seeds):
            model, backbone = work / f"{name}-{seed}", backbones[run.backbone]
            path, other = (folder / f"{name}-{seed}.json" for folder in (runs, others))
            if path.is_file() and (not run.exit_0 or _is_compared(other, train_cuts)):
                continue
            report = train_run(run, seed, data, backbone, model, _command(name, seed))
            folder, files = engines_of(model), files_of(run, data)
            head = {
                "name": name,
                "seed": seed,
                "command": _command(name, seed),
                "training": {key: report["options"][key] for key in _REPORTED},
                "train_seconds": report["train_seconds"],
                "hardware": f"{platform.machine()}, {platform.system()}",
                "versions": {n: metadata.version(n) for n in ("torch", "onnxruntime", "fpabee")},
            }
            if not path.is_file():
                (dev, layers), (test, _) = (
                    trace(folder, files[part], threads) for part in ("dev", "test")
                )
                if logits is not None:
                    store_logits(logits / f"{name}-{seed}.npz", dev, test)
                _store(path, head | compare(dev, test, layers))
            if run.exit_0:
                models = cut_encoders(name, seed, data, backbone, work, train_cuts)
                cuts = {layers: engines_of(model) for layers, model in models.items()}
                sources = (run.data, *run.shifted) if run.shifted else ()
                shifted = {source: data / source / "test.jsonl.gz" for source in sources}
                parts = files["dev"], files["test"]
                found = compare_alternatives(folder, *parts, cuts, shifted, threads)
                found["systems"].append(static_model(backbone, work, data / run.data, threads))
                _store(other, head | found)
    (results / "table.md").write_text(tables(runs, RUNS), encoding="utf-8")
    (results / "alternatives.md").write_text(alternatives(others, RUNS), encoding="utf-8")
    click.echo(f"{results / 'table.md'} covers {len(list(runs.glob('*.json')))} runs")


def _is_compared(path: Path, with_cuts: bool) -> bool:
    """Whether a comparison is stored; without cut encoders it may not be complete."""
    if not path.is_file():
        return False
    systems = json.loads(path.read_text(encoding="utf-8"))["systems"]
    return not with_cuts or any(system["name"].startswith("cut") for system in systems)


def _store(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    click.echo(f"{path} is written")


if __name__ == "__main__":
    main()
