#!/usr/bin/env python
"""Compare all exit rules as the F-PABEE paper does: scores at 25, 50 and 75 % of layers saved.

    python scripts/reproduce.py --data DATA --work WORK [--only mini-sst2]

For each dataset and seed, one multi-exit model is trained, exported and traced on dev and test. For
each kind of rule, the setting with the least drop among those that save enough is chosen on dev and
evaluated on test. Models are trained with the loss of the paper; those named `-exit-0` have exit 0,
and are trained with self-distillation. DATA holds a folder for each dataset, with train, dev and
test as `.jsonl.gz`; `descriptions.py` makes one of longer texts. Finished steps are not
repeated, so the script can be stopped at any time. A model that was trained elsewhere is used if it
is in WORK/NAME-SEED, and an encoder if it is in WORK/all-MiniLM-L6-v2 or WORK/all-mpnet-base-v2.
The results of each run are stored in WORK/rules, and their table in WORK/rules.md;
`scripts/results/rules.md` is that of all runs.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from fpabee.calibration.choose import Search
from fpabee.calibration.costs import StoppingCosts
from fpabee.calibration.scoring import METRICS, LabelledLogits, Scorer
from fpabee.calibration.settings import exits_of, settings_lists
from fpabee.calibration.trace import trace_rows
from fpabee.commands.command import exits_with_one_line
from fpabee.commands.console import step_progress
from fpabee.exporter import ExportOptions, export
from fpabee.exporter.training import TrainOptions, train
from fpabee.exporter.training.options import REPORT_NAME
from fpabee.exporter.training.workflow import has_fast_bf16
from fpabee.runtime import Engine, ExitRule, Goal, InputError, ProblemType
from fpabee.runtime.files import read_rows
from fpabee.runtime.rules.measures import Measure
from fpabee.runtime.rules.rules import RULES

RESULTS = Path(__file__).parent / "results"
MINILM = "all-MiniLM-L6-v2"
MPNET = "all-mpnet-base-v2"
SAVINGS = (0.25, 0.5, 0.75)
EXIT_0 = "-exit-0"
"""Suffix of the names of runs with exit 0 and self-distillation."""
PER_EXIT = " per exit"
"""Suffix of the kinds of rules with a threshold for each exit, as calibration makes them."""
COMPARED = ("pabee", "entropy", "confidence", "pcee", "fpabee per exit", "entropy per exit")


@dataclass(frozen=True)
class Run:
    """One model on one dataset.

    Attributes:
        backbone: which encoder is trained.
        data: folder of the dataset.
        seeds: number of seeds.
        options: of the training, where they differ from the loss of the paper and three epochs.
    """

    backbone: str
    data: str
    seeds: int = 3
    options: dict[str, Any] = field(default_factory=dict)


_MULTI = {"problem_type": ProblemType.MULTI_LABEL}
_PAPER = {"distill": 0.0, "exit_0": False, "epochs": 3.0}
RUNS = {
    "mini-sst2": Run(MINILM, "sst2"),
    "mini-mrpc": Run(MINILM, "mrpc"),
    "mini-trec": Run(MINILM, "trec"),
    "mini-mixsnips": Run(MINILM, "mixsnips", 3, {"epochs": 2.0} | _MULTI),
    "mini-mixatis": Run(MINILM, "mixatis", 3, _MULTI),
    "mpnet-sst2": Run(MPNET, "sst2", 1, {"epochs": 2.0, "lr": 3e-5}),
    "mpnet-mixsnips": Run(MPNET, "mixsnips", 1, {"epochs": 0.5, "lr": 3e-5} | _MULTI),
}
_EXIT_0 = {
    "mini-sst2": Run(MINILM, "sst2"),
    "mini-trec": Run(MINILM, "trec"),
    "mini-mrpc": Run(MINILM, "mrpc", 3, {"epochs": 2.0}),
    "mini-snips": Run(MINILM, "snips", 1, {"epochs": 1.0}),
    "mini-mixsnips": Run(MINILM, "mixsnips", 1, {"epochs": 0.5} | _MULTI),
    "mini-mixatis": Run(MINILM, "mixatis", 1, {"epochs": 1.0} | _MULTI),
    "mpnet-sst2": RUNS["mpnet-sst2"],
    "mini-descriptions": Run(MINILM, "descriptions", 1, {"max_length": 192}),
}
for _name, _run in _EXIT_0.items():
    _options = _run.options | {"distill": 0.5, "exit_0": True}
    RUNS[_name + EXIT_0] = replace(_run, options=_options)


def backbone_of(name: str, work: Path) -> str:
    """The encoder of a name: its folder in `work`, or else its place on the Hugging Face hub."""
    folder = work / name
    return str(folder) if folder.is_dir() else f"sentence-transformers/{name}"


def train_run(run: Run, seed: int, data: Path, backbone: str, folder: Path) -> Path:
    """Train the model of a run in a folder, unless that is done; returns the folder."""
    if not (folder / REPORT_NAME).is_file():
        files: Any = {
            part: str(data / run.data / f"{part}.jsonl.gz") for part in ("train", "dev", "test")
        }
        options = TrainOptions(
            **files, backbone=backbone, seed=seed, bf16=has_fast_bf16(), **_PAPER | run.options
        )
        with step_progress(quiet=False) as progress:
            train(folder, options, progress)
    return folder


def engines_of(model: Path, exits: tuple[int, ...] | None = None) -> Path:
    """The engines folder of a model_dir with some or all exits, exported unless that is done."""
    suffix = "-".join(["-engines", *map(str, exits or ())])
    engines = model.with_name(model.name + suffix)
    if not (engines / "manifest.json").is_file():
        export(model, engines, ExportOptions(exits=exits))
    return engines


def without_exit_0(model: Path) -> Path:
    """A copy of a model_dir without exit 0."""
    copy = model.with_name(f"{model.name}-without-exit-0")
    shutil.copytree(model, copy, dirs_exist_ok=True)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["fpabee"].pop("exit_0", None)
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def trace(engines: Path, data: Path) -> tuple[LabelledLogits, list[int]]:
    """The trace of a file, which is stored in the engines folder, and the layer of each exit."""
    with Engine.load(engines) as engine, step_progress(quiet=False) as progress:
        place = engines / "calibration"
        rows = trace_rows(engine, list(read_rows(data)), place, progress=progress)
        return rows, list(engine.manifest.exit_layers)


def search_by_layers(
    rows: LabelledLogits, layers: Sequence[int], lists: Sequence[Sequence[ExitRule]]
) -> Search:
    """Settings of rules, to choose by the number of layers instead of measured times.

    Args:
        rows: the rows that choose.
        layers: the layer of each exit.
        lists: the settings, see `settings_lists`.
    """
    costs = np.repeat(np.array(layers, float)[:, None], len(rows), axis=1)
    return Search(StoppingCosts(rows, METRICS[rows.problem_type][0], costs), lists)


def lists_by_kind(rows: LabelledLogits) -> dict[str, list[list[ExitRule]]]:
    """The settings of each kind of rule, with all measures of F-PABEE.

    Rules have one threshold for all exits, as in the paper; those of `PER_EXIT` have one for each.
    """
    lists = {}
    for name in RULES:
        every = settings_lists(rows, [name], measures=tuple(Measure))
        lists[name] = [[*map(with_one_threshold, settings)] for settings in every]
        per_exit = [each for each in every if each[0].stop_thresholds.ndim]
        if name + PER_EXIT in COMPARED:
            lists[name + PER_EXIT] = per_exit
    return lists


def with_one_threshold(rule: ExitRule) -> ExitRule:
    """The rule with the threshold of the last exit at all exits."""
    return rule.with_stop_threshold(rule.stop_thresholds.flat[-1])


def choose(search: Search, goal: Goal) -> ExitRule | None:
    """The best setting; None if no setting but full depth meets the goal."""
    try:
        return search.choose(goal)
    except InputError:  # No setting is as fast.
        return None


def compare(dev: LabelledLogits, test: LabelledLogits, layers: Sequence[int]) -> dict[str, Any]:
    """Every kind of rule at every saving: chosen on dev, evaluated on test."""
    scorer = Scorer(test, METRICS[dev.problem_type][0])
    settings = []
    for kind, lists in lists_by_kind(dev).items():
        search = search_by_layers(dev, layers, lists)
        for saving in SAVINGS:
            chosen = choose(search, Goal(speedup=1 / (1 - saving)))
            if chosen is None:
                continue
            exits = exits_of(chosen, test)
            depth = np.asarray(layers)[test.at(exits)[0]].mean()
            saved = float(1 - depth / layers[-1])
            score = scorer.score(exits)
            settings.append({"kind": kind, "wished": saving, "saving": saved, "score": score})
    full = scorer.full_depth
    return {"metric": scorer.metric, "rows": len(test), "full_depth": full, "settings": settings}


def table(results: Path) -> str:
    """The stored results as Markdown.

    Args:
        results: their folder.
    """
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")]
    stored.sort(key=lambda run: run["seed"])
    runs = {name: [run for run in stored if run["name"] == name] for name in RUNS}
    return "\n".join(_lines({name: mine for name, mine in runs.items() if mine})) + "\n"


def _lines(runs: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    yield "# Scores at 25, 50 and 75 % of layers saved\n"
    yield "Made by `scripts/reproduce.py`. Settings are chosen on dev and evaluated on test. The"
    yield "share of layers saved is in brackets. Means and standard deviations over the seeds.\n"
    yield "## F-PABEE and other rules\n"
    yield "Score of `fpabee` minus that of the other rule on the same model, in points, where"
    yield "25 / 50 / 75 % of the layers are saved.\n"
    yield f"| model | {' | '.join(COMPARED)} |"
    yield "|---|" + "---|" * len(COMPARED)
    for name, mine in runs.items():
        yield f"| {name} | " + " | ".join(_difference(mine, kind) for kind in COMPARED) + " |"
    for name, mine in runs.items():
        seeds = ", ".join(str(run["seed"]) for run in mine)
        full = _with_deviation([run["full_depth"] for run in mine])
        yield f"\n## {name}\n"
        yield f"Seeds {seeds}; {mine[0]['metric']} at full depth {full}; {mine[0]['rows']} rows.\n"
        yield "| rule | 25 % | 50 % | 75 % |"
        yield "|---|---|---|---|"
        for kind in dict.fromkeys(setting["kind"] for run in mine for setting in run["settings"]):
            cells = [_cell(_settings_at(mine, kind, saving), len(mine)) for saving in SAVINGS]
            yield f"| {kind} | " + " | ".join(cells) + " |"


def _settings_at(runs: Sequence[dict[str, Any]], kind: str, saving: float) -> list[dict[str, Any]]:
    """The setting of a kind of rule in each run."""
    settings = [setting for run in runs for setting in run["settings"]]
    return [each for each in settings if (each["kind"], each["wished"]) == (kind, saving)]


def _cell(settings: Sequence[dict[str, Any]], runs: int) -> str:
    """The score at a saving, and what is saved."""
    if len(settings) < runs:
        return "-"
    saved = statistics.mean(100 * setting["saving"] for setting in settings)
    return f"{_with_deviation([setting['score'] for setting in settings])} ({saved:.0f} %)"


def _difference(runs: Sequence[dict[str, Any]], kind: str) -> str:
    """Mean difference between F-PABEE and another kind of rule at each saving, in points."""
    differences = []
    for saving in SAVINGS:
        both = [_settings_at(runs, each, saving) for each in ("fpabee", kind)]
        means = [statistics.mean(one["score"] for one in each) for each in both if each]
        complete = all(len(each) == len(runs) for each in both)
        differences.append(f"{100 * (means[0] - means[1]):+.2f}" if complete else "-")
    return " / ".join(differences)


def _with_deviation(scores: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(scores):.2f}"
    return f"{mean} ± {100 * statistics.stdev(scores):.2f}" if len(scores) > 1 else mean


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Models and results.")
@click.option("--only", multiple=True, type=click.Choice(list(RUNS)), help="Default: all.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Default: 42, 43, ...")
@exits_with_one_line
def main(data: Path, work: Path, only: tuple[str, ...], seeds: tuple[int, ...]) -> None:
    """Train, export, trace and compare; then write the table."""
    results = work / "rules"
    results.mkdir(parents=True, exist_ok=True)
    for name in only or RUNS:
        run = RUNS[name]
        for seed in seeds or range(42, 42 + run.seeds):
            path = results / f"{name}-{seed}.json"
            if path.is_file():
                continue
            model = work / f"{name}-{seed}"
            engines = engines_of(train_run(run, seed, data, backbone_of(run.backbone, work), model))
            (dev, layers), (test, _) = (
                trace(engines, data / run.data / f"{part}.jsonl.gz") for part in ("dev", "test")
            )
            content = {"name": name, "seed": seed} | compare(dev, test, layers)
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            click.echo(f"{path} is written", err=True)
    (work / "rules.md").write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
