#!/usr/bin/env python
"""Compare fpabee with what a user would choose instead.

    python scripts/peers.py --data DATA --work WORK [--only mini-trec-exit-0] [--kind openvino-int8]

All systems classify the same test texts on the same machine and threads, each in a fresh process,
tokenization included. Each one is exported, quantized or trained as its documentation recommends,
in an environment of its own in WORK, because their requirements conflict. Models are those of
`reproduce.py` with exit 0, which are trained unless they are there; their last exit is the
classifier of those systems that only run a model. Besides the operating points of fpabee there are
full depth as one graph, `balanced` without exit 0, exit 0 alone, the cascade (exit 0 answers the
rows of which it is certain, and one graph all others), encoders that are cut after their first
layers, and exits that run as many layers on average. Finished systems are not measured again, so
the script can be stopped at any time. One that fails is listed with its error, and is tried again
the next time. `picture.py` draws the results. Nothing else should run on the machine. All cores
that this process may use are used; `taskset -c 0,1 python ...` takes two of them.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import reproduce
from reproduce import EXIT_0, RUNS, engines_of, train_run
from systems import ENVIRONMENTS, OTHERS, System, measure, read

from fpabee.calibration import DEFAULT_GOALS, CalibrationOptions, Goal, calibrate
from fpabee.calibration.search import CASCADE
from fpabee.exporter.add_targets import AddTargetsOptions, add_targets
from fpabee.runtime import Budget, ExitRule, InputError, read_manifest
from fpabee.runtime.cli.command import exits_with_one_line
from fpabee.runtime.machine import cpu_name, usable_cores
from fpabee.runtime.rules.rules import Pabee

PICTURED = [f"{name}{EXIT_0}" for name in ("mpnet-sst2", "mini-trec", "mini-snips")]
CURVE = {f"drop-{points:g}": Goal(max_drop=points) for points in (0.25, 1.0, 4.0)}
"""Operating points besides the default ones."""
CUTS = (1, 2, 3)
"""The numbers of layers after which encoders are cut."""
BALANCED = {"balanced": DEFAULT_GOALS["balanced"]}
PABEE = "pabee"


def systems(
    model: Path, data: Path, cuts: dict[int, Path], target: str | None = None
) -> Iterator[System]:
    """All systems, those of fpabee first; targets and points are made unless that is done.

    Args:
        model: the model_dir.
        data: the folder of the data set.
        cuts: models that were cut after the first layers, by their number of layers.
        target: the target of fpabee; None: the fastest one.
    """
    last, dev = read_manifest(engines_of(model)).exits[-1], data / "dev.jsonl.gz"
    engines, plain = engines_of(model), engines_of(reproduce.without_exit_0(model))
    whole, cut = engines_of(model, (last,)), {n: engines_of(one) for n, one in cuts.items()}
    if target is None:
        for folder in (engines, plain, whole, *cut.values()):
            add_all_targets(folder, data)
        targets = read_manifest(engines).targets
        target = max(targets, key=lambda name: targets[name].relative_speed or 0)

    def runs(name: str, folder: Path, rule: ExitRule | None) -> System:
        settings = {"engines": str(folder), "target": target, "rule": rule and rule.to_dict()}
        return System(name, "fpabee", settings=settings)

    yield runs("fpabee-full-depth", engines, None)
    goals = DEFAULT_GOALS | CURVE
    for name, rule in rules_of(engines, dev, target, goals).items():
        yield runs(f"fpabee-{name}", engines, rule)
    patience = rules_of(plain, dev, target, BALANCED, (PABEE,))["balanced"]
    settings = {
        "engines": str(engines),
        "patience": patience.patience if isinstance(patience, Pabee) else None,
    }
    yield System(PABEE, PABEE, settings=settings)
    yield from OTHERS
    rows, layers = reproduce.trace(engines, dev)
    search = reproduce.search_by_layers(rows, layers)
    cascade = reproduce.choose(search, BALANCED["balanced"], [CASCADE])
    limit = cascade.exit_0_threshold if cascade else None
    yield runs("one-graph", whole, None)
    yield runs("without-exit-0", plain, rules_of(plain, dev, target, BALANCED)["balanced"])
    yield runs("exit-0-alone", engines, Budget(exit=0))
    yield runs("cascade", whole, Budget(exit=1, exit_0_threshold=limit))
    for count, folder in cut.items():
        yield runs(f"first-{count}-layers", folder, None)
        if found := reproduce.choose(search, Goal(speedup=layers[-1] / count), search.kinds):
            yield runs(f"exits-{count}-layers", engines, found)


def add_all_targets(engines: Path, data: Path) -> None:
    """Build the targets for CPUs in all precisions, unless that is done."""
    if not any("int8" in name for name in read_manifest(engines).targets):
        options = AddTargetsOptions(
            int8=True,
            calibration_data=read(str(data), "train")[0],
            verify_data=read(str(data), "dev")[0],
            backends=("openvino", "onnxruntime"),
        )
        add_targets(engines, options)


def rules_of(
    engines: Path, dev: Path, target: str, goals: dict[str, Goal], rules: tuple[str, ...] = ()
) -> dict[str, ExitRule]:
    """The rules that meet goals on a target, by name."""
    options = CalibrationOptions(goals=goals, rules=rules, target=target)
    return {point.name: point.rule for point in calibrate(engines, dev, options).points}


def check_target(stored: dict[str, dict[str, Any]], target: str, results: Path) -> None:
    """Refuse to mix measurements of fpabee in different targets.

    Raises:
        InputError: a system was measured in another target.
    """
    for name, row in stored.items():
        if row.get("target", target) != target:
            raise InputError(
                f"{results} has {name} in {row['target']}, but this run measures {target}",
                "give the same `target`, or another file as `results`",
            )


def table(name: str, results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The results of a model as Markdown, the fastest first."""
    yield f"## {name}\n"
    yield "| | accuracy | layers | median ms | p99 ms | texts per second | MiB | start-up s |"
    yield "|---|---|---|---|---|---|---|---|"
    order = sorted(results, key=lambda name: results[name].get("median_ms", float("inf")))
    for name in order:
        row = results[name]
        if "failed" in row:
            yield f"| {name} | failed: {row['failed']} | | | | | | |"
            continue
        layers = f"{row['layers']:.2f}" if row.get("layers") is not None else ""
        yield (
            f"| {name} | {row['score']:.4f} | {layers} | {row['median_ms']:.2f} "
            f"| {row['p99_ms']:.2f} | {row['rows_per_s']:,.0f} "
            f"| {row['memory_mib']:.0f} | {row['start_up_s']:.1f} |"
        )
    where = {f"{row['hardware']}; {row['rows']} texts" for row in results.values() if "rows" in row}
    targets = {f"fpabee in {row['target']}" for row in results.values() if "target" in row}
    yield from ["", *sorted(where), *targets, ""]


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([name for name in RUNS if name.endswith(EXIT_0)]),
    default=PICTURED,
)
@click.option("--kind", "kinds", multiple=True, help="Names of systems. Default: all.")
@click.option("--target", help="The target of fpabee. Default: the fastest.")
@click.option("--seed", default=42)
@click.option(
    "--results", type=click.Path(path_type=Path), default=reproduce.RESULTS / "peers.json"
)
@exits_with_one_line
def main(
    data: Path,
    work: Path,
    only: tuple[str, ...],
    kinds: tuple[str, ...],
    target: str | None,
    seed: int,
    results: Path,
) -> None:
    """Measure all systems, and write a table of them beside the RESULTS."""
    hardware = f"{cpu_name()}, {usable_cores()} threads, {platform.system()}"
    stored = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    for name in only:
        run = RUNS[name]
        backbone = reproduce.backbone_of(run, work)
        model = train_run(run, seed, data, backbone, work / f"{name}-{seed}")
        cuts = {}
        for layers in CUTS:
            options = run.options | {"exits": (layers,), "distill": 0.0, "exit_0": False}
            folder = work / f"{name.removesuffix(EXIT_0)}-cut-{layers}-{seed}"
            cut = dataclasses.replace(run, options=options)
            cuts[layers] = train_run(cut, seed, data, backbone, folder)
        given = {
            "model": str(model),
            "backbone": backbone,
            "data": str(data / run.data),
        }
        mine = stored.setdefault(model.name, {})
        for system in systems(model, data / run.data, cuts, target):
            is_done = "score" in mine.get(system.name, {})
            if is_done or (kinds and system.name not in kinds):
                continue
            head = {"packages": ENVIRONMENTS.get(system.environment), "hardware": hardware}
            if chosen := system.settings.get("target"):
                head["target"] = chosen
                check_target(mine, chosen, results)
            try:
                found = measure(system, given, work)
            except RuntimeError as error:
                found = {"failed": str(error)}
            click.echo(f"{model.name}, {system.name}: {found}", err=True)
            mine[system.name] = head | found
            new = results.with_suffix(".new")  # the script may be stopped while it writes
            new.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
            new.replace(results)
    lines = [line for name, mine in stored.items() for line in table(name, mine)]
    results.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
