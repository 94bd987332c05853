#!/usr/bin/env python
"""Compare fpabee with what a user would choose instead.

    python scripts/peers.py --data DATA --work WORK [--only trec] [--kind openvino-int8]

All alternatives classify the same test texts on the same machine and threads, each in a fresh
process, tokenization included. Each one is exported, quantized or trained as its documentation
recommends, in an environment of its own in WORK, because their requirements conflict. Models are
those of `reproduce.py`, which trains missing ones; their last exit is the classifier of those
alternatives that only run a model. Results are in `scripts/results/peers/`: a JSON file for each
data set and alternative, and a table; `picture.py` draws them. Finished ones are not repeated, so
the script can be stopped at any time. One that fails is listed with its error, and is tried again
the next time. Nothing else should run on the machine.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from reproduce import MINILM, MPNET, RESULTS, RUNS, cut_encoders, engines_of, train_run
from reproduce_alternatives import without_exit_0

from fpabee.calibration import DEFAULT_GOALS, CalibrationOptions, Goal, calibrate
from fpabee.exporter.add_targets import AddTargetsOptions, add_targets
from fpabee.runtime import read_manifest
from fpabee.runtime.backends.onnxruntime_session import usable_cores
from fpabee.runtime.cli.errors import exits_with_one_line
from fpabee.runtime.environment import cpu_name
from fpabee.runtime.files import read_rows
from fpabee.runtime.rules.rules import Pabee

MODELS = {"sst2": "mpnet-sst2-exit-0", "trec": "mini-trec-exit-0", "snips": "mini-snips-exit-0"}
"""By data set, the run of `reproduce.py` whose model is compared."""

ENVIRONMENTS = {
    "torch": ["sentence-transformers==6.2.0"],
    "onnx": ["sentence-transformers[onnx]", "optimum-onnx==0.1.0"],
    "openvino": ["sentence-transformers[openvino]", "optimum-intel==2.2.0", "nncf", "datasets"],
    "setfit": ["setfit==1.2.0"],
    "model2vec": ["model2vec[distill,inference,quantization,train]==0.10.0"],
}
"""What each environment installs. With optimum, pip chooses a sentence-transformers that fits."""

CURVE = {f"drop-{points:g}": Goal(max_drop=points) for points in (0.25, 1.0, 4.0)}
"""Operating points of fpabee besides the default ones."""

PABEE = "pabee"


@dataclass(frozen=True)
class Alternative:
    """What a user could run.

    Attributes:
        name: in files and tables.
        kind: what `peers_child.py` calls it.
        environment: one of `ENVIRONMENTS`; empty: the one of this script.
        settings: what else `peers_child.py` needs to know.
    """

    name: str
    kind: str
    environment: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


OTHERS = [
    Alternative(f"torch-{form}", "torch", "torch", {"form": form})
    for form in ("eager", "compiled", "bf16")
]
for _backend in ("onnx", "openvino"):
    for _name, _int8 in ((_backend, False), (f"{_backend}-int8", True)):
        _settings: dict[str, Any] = {"backend": _backend, "int8": _int8}
        OTHERS.append(Alternative(_name, "backend", _backend, _settings))
OTHERS += [Alternative(name, name, name) for name in ("setfit", "model2vec")]


def alternatives(engines: Path, data: Path, cuts: dict[int, Path]) -> Iterator[Alternative]:
    """All alternatives, those of fpabee first; its targets and points are made unless that is done.

    Args:
        engines: the engines folder.
        data: the folder of the data set.
        cuts: models that were cut after the first layers, by their number of layers.
    """
    dev, target = data / "dev.jsonl.gz", fastest(engines)
    if not CURVE.keys() <= read_manifest(engines).targets[target].operating_points.keys():
        train, backends = data / "train.jsonl.gz", ("openvino", "onnxruntime")
        add_targets(
            engines,
            AddTargetsOptions(
                int8=True, calibration_data=train, verify_data=dev, backends=backends
            ),
        )
        target = fastest(engines)
        options = CalibrationOptions(goals=DEFAULT_GOALS | CURVE, target=target)
        calibrate(engines, dev, options)
    for point in (None, *DEFAULT_GOALS, *CURVE):
        settings: dict[str, Any] = {"target": target, "point": point}
        yield Alternative(f"fpabee-{point or 'full-depth'}", "fpabee", "", settings)
    yield Alternative(PABEE, PABEE, "", {"patience": patience_of_pabee(engines, dev)})
    yield from OTHERS
    for layers, model in cuts.items():
        settings = {"backend": "openvino", "int8": False, "model": str(model)}
        yield Alternative(f"first-{layers}-layers", "backend", "openvino", settings)


def patience_of_pabee(engines: Path, dev: Path) -> int | None:
    """PABEE's patience at the goal of `balanced`; None if every patience loses too much.

    It is chosen without exit 0, which PABEE's loop does not have.
    """
    plain = without_exit_0(engines)
    goals = {PABEE: DEFAULT_GOALS["balanced"]}
    options = CalibrationOptions(goals=goals, rules=(PABEE,), target=fastest(plain))
    rule = calibrate(plain, dev, options).points[0].rule
    return rule.patience if isinstance(rule, Pabee) else None


def fastest(engines: Path) -> str:
    """The fastest target, even if `reproduce.py` has calibrated another one."""
    targets = read_manifest(engines).targets
    return max(targets, key=lambda name: targets[name].relative_speed or 0)


def measure(other: Alternative, given: dict[str, Any], work: Path) -> dict[str, Any]:
    """Prepare an alternative unless that is done, measure it, and score its answers.

    Args:
        other: the alternative.
        given: what all of them need to know, see `peers_child.py`.
        work: gets environments, and what is exported and trained.

    Raises:
        RuntimeError: an environment or a step failed; the message is the last line that it wrote.
    """
    place = work / "peers" / f"{Path(given['model']).name}-{other.name}"
    given = given | {"kind": other.kind, "place": str(place)} | other.settings
    python, done = environment(other.environment, work), place / ".prepared"
    if not done.is_file():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        _child(python, "prepare", given)
        done.touch()
    found: dict[str, Any] = json.loads(_child(python, "measure", given).splitlines()[-1])
    answers, rows = found.pop("answers"), read_rows(Path(given["data"]) / "test.jsonl.gz")
    same = [row.labels == (answer,) for answer, row in zip(answers, rows, strict=False)]
    return {"score": sum(same) / len(answers), "rows": len(answers), **found}


def environment(name: str, work: Path) -> str:
    """The interpreter of an environment, which is created unless that is done.

    Raises:
        RuntimeError: its packages cannot be installed.
    """
    if not name:
        return sys.executable
    place = work / "environments" / name
    python, done = place / ("Scripts" if os.name == "nt" else "bin") / "python", place / "installed"
    if not done.is_file():
        venv.create(place, with_pip=True, clear=True)
        _checked([str(python), "-m", "pip", "install", "-q", *ENVIRONMENTS[name]])
        done.touch()
    return str(python)


def _child(python: str, step: str, given: dict[str, Any]) -> str:
    script = str(Path(__file__).with_name("peers_child.py"))
    return _checked([python, script, step], json.dumps(given | {"begun": time.time()}))


def _checked(command: list[str], text: str | None = None) -> str:
    quiet = {"TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, env=os.environ | quiet
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1].strip() if lines else f"exit code {done.returncode}")
    return done.stdout


def table(folder: Path) -> list[str]:
    """The results of a data set as Markdown, the fastest first."""
    lines = [
        f"## {folder.name}", "",
        "| | accuracy | median ms | p99 ms | texts per second | MiB | start-up s |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    for row in sorted(stored, key=lambda row: row.get("median_ms", float("inf"))):
        if "failed" in row:
            lines.append(f"| {row['name']} | failed: {row['failed']} | | | | | |")
        else:
            lines.append(
                "| {name} | {score:.4f} | {median_ms:.2f} | {p99_ms:.2f} | {rows_per_s:,.0f} "
                "| {memory_mib:.0f} | {start_up_s:.1f} |".format(**row)
            )
    where = {f"{row['hardware']}; {row.get('rows', 0)} texts" for row in stored if "rows" in row}
    return [*lines, "", *sorted(where), ""]


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--work", required=True, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(list(MODELS)), help="Default: all.")
@click.option("--kind", "kinds", multiple=True, help="Names of alternatives. Default: all.")
@click.option("--seed", default=42)
@click.option("--minilm", default="sentence-transformers/all-MiniLM-L6-v2")
@click.option("--mpnet", default="sentence-transformers/all-mpnet-base-v2")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS / "peers")
@click.option("--train-cuts/--no-train-cuts", default=True, help="Train cut encoders.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: all cores.")
@click.option("--max-rows", type=click.IntRange(min=1), help="Test texts at most, for a trial.")
@exits_with_one_line
def main(
    data: Path,
    work: Path,
    only: tuple[str, ...],
    kinds: tuple[str, ...],
    seed: int,
    minilm: str,
    mpnet: str,
    results: Path,
    train_cuts: bool,
    threads: int | None,
    max_rows: int | None,
) -> None:
    """Measure all alternatives, and write the table."""
    threads = threads or usable_cores()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for name in only or MODELS:
        run, model, folder = MODELS[name], work / f"{MODELS[name]}-{seed}", results / name
        backbone = {MINILM: minilm, MPNET: mpnet}[RUNS[run].backbone]
        train_run(RUNS[run], seed, data, backbone, model, "python scripts/peers.py")
        cuts = cut_encoders(run, seed, data, backbone, work, train_cuts)
        folder.mkdir(parents=True, exist_ok=True)
        given = {
            "model": str(model),
            "engines": str(engines_of(model)),
            "backbone": backbone,
            "data": str(data / name),
            "threads": threads,
            "rows": max_rows,
        }
        for other in alternatives(engines_of(model), data / name, cuts):
            path = folder / f"{other.name}.json"
            is_done = path.is_file() and "failed" not in json.loads(path.read_text("utf-8"))
            if is_done or (kinds and other.name not in kinds):
                continue
            try:
                found = measure(other, given, work)
            except RuntimeError as error:
                found = {"failed": str(error)}
            click.echo(f"{name}, {other.name}: {found}", err=True)
            head = {
                "name": other.name,
                "packages": ENVIRONMENTS.get(other.environment, ["fpabee"]),
                "settings": other.settings,
                "hardware": f"{cpu_name()}, {threads} threads, {platform.system()}",
            }
            new = path.with_suffix(".new")  # the script may be stopped while it writes
            new.write_text(json.dumps(head | found, indent=1) + "\n", encoding="utf-8")
            new.replace(path)
    folders = [results / name for name in MODELS if (results / name).is_dir()]
    lines = [line for folder in folders for line in table(folder)]
    (results / "table.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
