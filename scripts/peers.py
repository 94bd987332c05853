#!/usr/bin/env python
"""Compare fpabee with what a user would choose instead.

    python scripts/peers.py --data DATA --work WORK [--only mini-trec-exit-0] [--kind openvino-int8]

DATA has a folder for each dataset, with train, dev and test as `.jsonl.gz`.
All systems classify the same test texts on the same machine and threads, each in a fresh process,
tokenization included. Each one is exported, quantized or trained as its documentation recommends,
in an environment of its own in WORK, because their requirements conflict. Systems that only run a
model run the plain classifier of `conversions.py`, which was trained on half of the rows. Its
conversion takes part with all targets that have an operating point, if it is in WORK. Models with
exits are those of `reproduce.py` with exit 0, trained for the default number of epochs unless they
are in WORK. The graph of the last exit also runs bare in ONNX Runtime and OpenVINO, without a
library around it and with the texts in the order of the file. Besides the operating points of
fpabee there are one file with `balanced` inside, full depth as one graph, `balanced` without exit
0, exit 0 alone, the cascade (exit 0 answers the rows of which it is certain, and one graph all
others), an encoder that is cut after three layers, and exits that run as many layers on average.

All systems are measured in rounds: each round runs every system once, in rotating order. Results
are medians over the rounds, and ratios are medians of the ratios to `pipeline` in the same round,
so a slower hour of the machine changes little. *Changed* counts the answers that are not those of
the classifier. Finished rounds are kept, so the script can be stopped at any time; rounds of
another CPU, target or version are refused. A system that fails is listed with its error, and is
tried again the next time. `picture.py` draws the results. Nothing else should run
on the machine. All cores that this process may use are used; `taskset -c 0,1 python ...` takes two.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import conversions
import reproduce
from reproduce import EXIT_0, RUNS, engines_of, train_run
from systems import ENVIRONMENTS, OTHERS, System, chain, measure, read

from fpabee.calibration import DEFAULT_GOALS, Bound, CalibrationOptions, Goal, calibrate
from fpabee.calibration.settings import settings_lists
from fpabee.commands.command import exits_with_one_line
from fpabee.exporter.targets import build_targets
from fpabee.exporter.targets.builders import INT8_TARGETS, OPENVINO_TARGETS, buildable
from fpabee.exporter.targets.check import FP32_TARGET
from fpabee.runtime import Budget, ExitRule, InputError, read_manifest
from fpabee.runtime.machine import cpu_name, usable_cores
from fpabee.runtime.rules.rules import Pabee
from fpabee.runtime.targets import rule_alone

COMPARED = [
    f"{name}{EXIT_0}"
    for name in (
        "mpnet-sst2",
        "mini-sst2",
        "mini-trec",
        "mini-snips",
        "mini-mrpc",
        "mini-descriptions",
    )
]
CUT = 3
"""The number of layers after which an encoder is cut."""
FIRST_LAYERS = f"first-{CUT}-layers"
BALANCED = Goal(max_drop=0.5)
INT8_TARGET = "openvino-int8"
PABEE = "pabee"
REFERENCE = "pipeline"
"""The system that all others are compared with: the pipeline of Transformers, in fp32."""
CONVERTED = "fpabee-converted"
IN_SHORT = {
    REFERENCE: "PyTorch fp32, `transformers.pipeline`",
    "openvino-int8": "OpenVINO int8, sentence-transformers",
    CONVERTED: "**fpabee, converted**",
    "fpabee-balanced": "**fpabee, trained with exits**",
}
"""The systems of the short table, and their names there."""


def systems(
    model: Path,
    data: Path,
    cut: Path | None,
    target: str | None = None,
    converted: Path | None = None,
) -> Iterator[System]:
    """All systems, those of fpabee first; targets and points are made unless that is done.

    Args:
        model: the model_dir.
        data: the folder of the dataset.
        cut: the model that was cut after `CUT` layers; None: it does not take part.
        target: the target of fpabee; None: the fastest one.
        converted: the engines folder of a conversion by `conversions.py`.
    """
    last = read_manifest(engines_of(model)).exits[-1]
    dev = data / "dev.jsonl.gz"
    without_exit_0 = reproduce.without_exit_0(model)
    engines = engines_of(model)
    plain = engines_of(without_exit_0)
    whole = engines_of(model, (last,))
    bare = engines_of(without_exit_0, (last,))
    short = None if cut is None else engines_of(cut)
    for folder in filter(None, (engines, plain, whole, bare, short)):
        add_targets(folder, data, target)
    if target is None:
        targets = read_manifest(engines).targets
        target = max(targets, key=lambda name: targets[name].relative_speed or 0)

    def runs(name: str, folder: Path, rule: ExitRule | None) -> System:
        return chain(name, folder, target, rule=rule.to_dict() if rule else None)

    yield runs("fpabee-full-depth", engines, None)
    for name, rule in rules_of(engines, dev, target, DEFAULT_GOALS).items():
        yield runs(f"fpabee-{name}", engines, rule)
    patience = rules_of(plain, dev, target, {"balanced": BALANCED}, (PABEE,))["balanced"]
    settings = {
        "engines": str(engines),
        "patience": patience.patience if isinstance(patience, Pabee) else None,
    }
    yield System(PABEE, PABEE, settings=settings)
    yield from OTHERS

    def packed(
        name: str, folder: Path, runtime: str, batch: int, point: str | None, graphs: str
    ) -> System:
        settings = {"engines": str(folder), "runtime": runtime, "batch": batch}
        return System(name, "file", settings=settings | {"point": point, "graphs": graphs})

    yield packed("onnxruntime-bare", bare, "onnxruntime", 32, None, FP32_TARGET)
    yield packed("openvino-bare", bare, "openvino", 32, None, FP32_TARGET)
    if INT8_TARGET in read_manifest(bare).targets:
        yield packed("openvino-int8-bare", bare, "openvino", 32, None, INT8_TARGET)
    rules_of(engines, dev, FP32_TARGET, {"balanced": BALANCED})
    yield packed("fpabee-single-file", engines, "onnxruntime", 32, "balanced", FP32_TARGET)
    if converted is not None and converted.is_dir():
        manifest = read_manifest(converted)
        for name, each in manifest.targets.items():
            if each.operating_points:
                usual = each.default_operating_point
                yield chain(f"{CONVERTED}-{name}", converted, name, usual)
        point, _ = rule_alone(manifest, FP32_TARGET, None)
        yield packed(
            "fpabee-single-file-converted", converted, "onnxruntime", 32, point, FP32_TARGET
        )
    rows, layers = reproduce.trace(engines, dev)
    # The last list of the last exit: exit 0 answers, or else all layers run.
    cascades = settings_lists(rows, ["budget"])[-1:]
    cascade = reproduce.choose(reproduce.search_by_layers(rows, layers, cascades), BALANCED)
    limit = cascade.exit_0_threshold if cascade else None
    yield runs("one-graph", whole, None)
    yield runs(
        "without-exit-0", plain, rules_of(plain, dev, target, {"balanced": BALANCED})["balanced"]
    )
    yield runs("exit-0-alone", engines, Budget(exit=0))
    yield runs("cascade", whole, Budget(exit=1, exit_0_threshold=limit))
    if short is not None:
        yield runs(FIRST_LAYERS, short, None)
    search = reproduce.search_by_layers(rows, layers, settings_lists(rows))
    as_fast = reproduce.choose(search, Goal(speedup=layers[-1] / CUT))
    if as_fast is not None:
        yield runs(f"exits-{CUT}-layers", engines, as_fast)


def decisions_of(classifier: Path, data: Path, place: Path) -> Path:
    """The file with the answers of a classifier to the test texts, in PyTorch and fp32."""
    file = place / f"{classifier.name}-decisions.json"
    if not file.is_file():
        answers = conversions.decisions(classifier, read(str(data), "test")[0])
        file.write_text(json.dumps([sorted(each) for each in answers]), encoding="utf-8")
    return file


def add_targets(engines: Path, data: Path, target: str | None) -> None:
    """Build a target, or those for CPUs in all precisions, unless that is done."""
    wanted = (target,) if target else (*OPENVINO_TARGETS, *INT8_TARGETS)
    built = read_manifest(engines).targets
    # Not all of them can be built everywhere; int8 is built last.
    is_done = target in built if target else any("int8" in name for name in built)
    if not is_done:
        build_targets(engines, buildable(wanted), read(str(data), "train")[0])


def rules_of(
    engines: Path,
    dev: Path,
    target: str,
    goals: Mapping[str, Goal | Bound],
    rules: tuple[str, ...] = CalibrationOptions.rules,
) -> dict[str, ExitRule]:
    """The rules that meet goals on a target, by name."""
    options = CalibrationOptions(goals=goals, rules=rules, target=target)
    return {point.name: point.rule for point in calibrate(engines, dev, options).points}


def check_same(name: str, stored: dict[str, Any], now: dict[str, Any], results: Path) -> None:
    """Refuse to mix rounds of different machines, targets or versions.

    Raises:
        InputError: the system was measured with something else.
    """
    for key, value in now.items():
        if stored["rounds"] and stored.get(key) != value:
            raise InputError(
                f"{results} has rounds of {name} with the {key} {stored.get(key)}, but this run "
                f"measures with {value}",
                "repeat what was measured, or give another file as `results`",
            )


def short_table(name: str, results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table of the README: of the conversion, the target that is fastest over the file."""
    rounds = {system: row["rounds"] for system, row in results.items() if row["rounds"]}
    by_rate = sorted(rounds, key=lambda system: -_median(rounds[system], "rows_per_s"))
    fastest = next((system for system in by_rate if system.startswith(CONVERTED)), CONVERTED)
    texts = rounds[REFERENCE][0]["rows"]
    heads = [f"{name}, {texts:,} texts", "accuracy", "answers changed", "texts per second"]
    yield f"| {' | '.join([*heads, 'times PyTorch', 'one text, median'])} |"
    yield "|---|---|---|---|---|---|"
    for system, words in IN_SHORT.items():
        shown = fastest if system == CONVERTED else system
        measured = rounds.get(shown)
        if not measured:
            continue
        target = results[shown].get("target")
        words += f", `{target}`" if target else ""
        ratio = statistics.median(_ratios(rounds, measured, "rows_per_s"))
        # A model of its own has other answers.
        changed = f"{_median(measured, 'changed'):.0f}" if system != "fpabee-balanced" else ""
        yield (
            f"| {words} | {100 * _median(measured, 'score'):.1f} % | {changed} "
            f"| {_median(measured, 'rows_per_s'):,.0f} | {ratio:.1f} "
            f"| {_median(measured, 'median_ms'):.1f} ms |"
        )
    yield ""


def table(name: str, results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The results of a model as Markdown, the fastest over the file first."""
    yield f"## {name}\n"
    heads = ["", "rounds", "accuracy", "changed", "layers"]
    heads += ["texts per second", "times the reference", "one text, ms", "times the reference"]
    heads += ["p99 ms", "MiB", "start-up s"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    rounds = {name: row["rounds"] for name, row in results.items()}
    for name in sorted(results, key=lambda name: -_median(rounds[name], "rows_per_s")):
        mine = rounds[name]
        if not mine:
            yield f"| {name} | 0 | failed: {results[name]['failed']} | | | | | | | | | |"
            continue
        layers = f"{_median(mine, 'layers'):.2f}" if mine[0].get("layers") is not None else ""
        yield (
            f"| {name} | {len(mine)} | {_median(mine, 'score'):.4f} "
            f"| {_median(mine, 'changed'):.0f} | {layers} "
            f"| {_median(mine, 'rows_per_s'):,.0f} | {_ratio(rounds, name, 'rows_per_s')} "
            f"| {_median(mine, 'median_ms'):.2f} | {_ratio(rounds, name, 'median_ms')} "
            f"| {_median(mine, 'p99_ms'):.2f} | {_median(mine, 'memory_mib'):.0f} "
            f"| {_median(mine, 'start_up_s'):.1f} |"
        )
    where = {
        f"{row['hardware']}; {row['rounds'][0]['rows']} texts"
        for row in results.values()
        if row["rounds"]
    }
    targets = {f"fpabee in {row['target']}" for row in results.values() if "target" in row}
    yield from ["", f"The reference is {REFERENCE}.", *sorted(where), *sorted(targets), ""]


def _median(rounds: list[dict[str, Any]], key: str) -> float:
    return statistics.median(each[key] for each in rounds) if rounds else 0.0


def _ratios(
    rounds: dict[str, list[dict[str, Any]]], mine: list[dict[str, Any]], key: str
) -> list[float]:
    """The ratios to the reference in the same round."""
    reference = {each["round"]: each[key] for each in rounds.get(REFERENCE, [])}
    values = {each["round"]: each[key] for each in mine}
    return [values[number] / reference[number] for number in values.keys() & reference.keys()]


def _ratio(rounds: dict[str, list[dict[str, Any]]], name: str, key: str) -> str:
    """The median of the ratios to the reference in the same round, and their range."""
    ratios = _ratios(rounds, rounds[name], key)
    if not ratios:
        return ""
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{spread}"


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([name for name in RUNS if name.endswith(EXIT_0)]),
    default=COMPARED,
)
@click.option("--kind", "kinds", multiple=True, help="Names of systems. Default: all.")
@click.option("--target", help="The target of fpabee. Default: the fastest.")
@click.option("--rounds", default=5)
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
    rounds: int,
    seed: int,
    results: Path,
) -> None:
    """Measure all systems, and write a table of them beside the RESULTS."""
    hardware = f"{cpu_name()}, {usable_cores()} threads, {platform.system()}"
    stored = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    for name in only:
        run = RUNS[name]
        own_name = name.removesuffix(EXIT_0)
        place = work / "peers"
        run = dataclasses.replace(run, options=run.options | {"epochs": None})
        backbone = reproduce.backbone_of(run.backbone, work)
        model = train_run(run, seed, data, backbone, place / f"{name}-{seed}")
        cut_model = None
        if not kinds or FIRST_LAYERS in kinds:  # otherwise it is not trained
            options = run.options | {"exits": (CUT,), "distill": 0.0, "exit_0": False}
            cut = dataclasses.replace(run, options=options)
            cut_model = train_run(cut, seed, data, backbone, place / f"{name}-cut-{seed}")
        plain = conversions.teach(conversions.RUNS[own_name], seed, data, work)
        inputs = {
            "classifier": str(plain),
            "decisions": str(decisions_of(plain, data / run.data, place)),
            "model": str(model),
            "backbone": backbone,
            "data": str(data / run.data),
        }
        converted = work / "conversions" / f"{own_name}-{seed}-all"
        mine = stored.setdefault(model.name, {})
        asked = [
            system
            for system in systems(model, data / run.data, cut_model, target, converted)
            if not kinds or system.name in kinds
        ]
        for number in range(1, rounds + 1):
            first = number % max(1, len(asked))
            for system in (*asked[first:], *asked[:first]):
                row = mine.setdefault(system.name, {"rounds": []})
                if any(each["round"] == number for each in row["rounds"]):
                    continue
                head = {"packages": ENVIRONMENTS.get(system.environment), "hardware": hardware}
                if chosen := system.settings.get("target"):
                    head["target"] = chosen
                check_same(system.name, row, head, results)
                try:
                    measured = measure(system, inputs, work)
                except RuntimeError as error:
                    row["failed"] = str(error)
                else:
                    head["versions"] = measured.pop("versions")
                    check_same(system.name, row, head, results)
                    row.pop("failed", None)
                    row |= head
                    row["rounds"].append({"round": number} | measured)
                click.echo(f"{model.name}, round {number}, {system.name}: {row}", err=True)
                new = results.with_suffix(".new")  # the script may be stopped while it writes
                new.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
                new.replace(results)
    lines = [line for name, mine in stored.items() for line in table(name, mine)]
    for name, mine in stored.items():
        if mine.get(REFERENCE, {}).get("rounds"):
            lines += short_table(name, mine)
    results.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
