"""Compare exits with what people would do instead, and run them on texts of another kind.

`reproduce.py` calls this. Settings are chosen on dev. All systems then classify the same rows of
test, tokenization included: some texts one by one, and the whole file. The systems take turns, so
that a machine whose speed drifts treats them alike; only model2vec runs in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
import venv
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fpabee.calibration import Calibration, CalibrationOptions, calibrate
from fpabee.calibration.choose import Selector
from fpabee.calibration.families import CASCADE, DEFAULT_MEASURES, DEFAULT_RULES
from fpabee.calibration.goals import DEFAULT_GOALS
from fpabee.calibration.outcome import exits_of
from fpabee.calibration.scoring import METRICS, LabelledLogits
from fpabee.calibration.stopping_costs import StoppingCosts
from fpabee.calibration.trace import expected_labels
from fpabee.exporter.merge import write_one_graph
from fpabee.exporter.staging import staging
from fpabee.runtime import Budget, Engine, ExitRule, Goal, InputError
from fpabee.runtime.artifact.folder import read_manifest, write_manifest
from fpabee.runtime.artifact.manifest import with_operating_points
from fpabee.runtime.backends.onnxruntime_session import usable_cores
from fpabee.runtime.encoding import Text
from fpabee.runtime.environment import cpu_name
from fpabee.runtime.files import Row, read_rows
from fpabee.runtime.metrics import encode_labels, evaluate
from fpabee.runtime.rules.measures import Measure

POINT = "balanced"
FULL_DEPTH, WITHOUT_EXIT_0 = "full depth", f"{POINT}, without exit 0"
MODEL2VEC = "model2vec==0.10.0"

_FULL = Budget(exit=1)  # of engines with one segment
_NO_CALIBRATION = shutil.ignore_patterns("calibration")
_SINGLE_ROWS = 200
_REPEATS = 3


@dataclass(frozen=True)
class System:
    """A way to classify: its name in tables, its engine, and the rule of the engine."""

    name: str
    engine: Engine
    rule: ExitRule


def compare_alternatives(
    folder: Path,
    dev: Path,
    test: Path,
    cuts: dict[int, Path],
    shifted: dict[str, Path],
    threads: int | None,
) -> dict[str, Any]:
    """Score, layers and times of exits and of what people would do instead.

    Args:
        folder: the engines folder of a model with exit 0.
        dev: the file of rows that choose settings.
        test: the file of rows that are timed and scored.
        cuts: engines folders of encoders that were cut, by their number of layers.
        shifted: files whose texts are of another kind, or of the same; of pairs, the first ones.
        threads: CPU threads; None: all cores.
    """
    # Both copies are made before the calibration, because its points do not fit one graph.
    plain, whole = without_exit_0(folder), _one_graph(folder)
    calibration = calibrate_default(folder, dev, threads)
    plain_rule = calibrate_default(plain, dev, threads).points[0].rule
    selector = selector_by_layers(
        calibration.rows, calibration.layers, DEFAULT_RULES, DEFAULT_MEASURES
    )
    cascade = choose(selector, DEFAULT_GOALS[POINT], [CASCADE])
    limit = cascade.exit_0_threshold if cascade else None
    others = {source: [row.text for row in read_rows(path)] for source, path in shifted.items()}
    with ExitStack() as stack:

        def load(path: Path) -> Engine:
            return stack.enter_context(Engine.load(path, threads=threads, preload=True))

        engine, single = load(folder), load(whole)
        systems = [
            System(FULL_DEPTH, single, _FULL),
            System(POINT, engine, calibration.points[0].rule),
            System(WITHOUT_EXIT_0, load(plain), plain_rule),
            System(CASCADE, single, dataclasses.replace(_FULL, exit_0_threshold=limit)),
            System("exit 0 alone", engine, Budget(exit=0)),
        ]
        for layers, cut in cuts.items():
            systems.append(System(f"cut to {layers}", load(cut), _FULL))
            goal = Goal(speedup=calibration.layers[-1] / layers)
            rule = choose(selector, goal, selector.search.kinds)
            if rule is not None:
                systems.append(System(f"exits, {layers} on average", engine, rule))
        return {
            "hardware": f"{cpu_name()}, {threads or usable_cores()} threads, {platform.system()}",
            "metric": METRICS[engine.manifest.task.problem_type][0],
            "layers": calibration.layers[-1],
            "rule": systems[1].rule.to_dict(),
            "systems": measured(systems, list(read_rows(test))),
            "shift": [
                {"rule": name, "texts": source, **shift(engine, rule, calibration.rows, texts)}
                for name, rule in ((POINT, systems[1].rule), (CASCADE, cascade))
                for source, texts in others.items()
                if rule
            ],
        }


def calibrate_default(folder: Path, dev: Path, threads: int | None) -> Calibration:
    """The calibration of `balanced`, with the default options."""
    goals = {POINT: DEFAULT_GOALS[POINT]}
    return calibrate(folder, dev, CalibrationOptions(goals=goals, threads=threads))


def without_exit_0(folder: Path) -> Path:
    """A copy of an engines folder that has neither exit 0 nor operating points."""
    copy = folder.with_name(f"{folder.name}-without-exit-0")
    if not copy.is_dir():
        with staging(copy) as new:  # a copy that was interrupted would still have exit 0
            shutil.copytree(folder, new, ignore=_NO_CALIBRATION, dirs_exist_ok=True)
            old = read_manifest(new)
            targets = {
                name: with_operating_points(target, {}, "") for name, target in old.targets.items()
            }
            write_manifest(new, msgspec.structs.replace(old, exit_0=None, targets=targets))
    return copy


def _one_graph(folder: Path) -> Path:
    """An engines folder with one graph, the usual way, and exit 0."""
    whole = folder.with_name(f"{folder.name}-one-graph")
    if not whole.is_dir():
        with staging(whole) as new:
            write_one_graph(folder, new)
    return whole


def selector_by_layers(
    rows: LabelledLogits,
    layers: Sequence[int],
    rules: Sequence[str],
    measures: Sequence[Measure],
) -> Selector:
    """Chooses settings by the number of layers instead of measured times.

    Args:
        rows: the rows that choose.
        layers: the layer of each exit.
        rules: names of the rules that compete.
        measures: similarity measures that compete.
    """
    costs = np.repeat(np.array(layers, float)[:, None], len(rows), axis=1)
    metric = METRICS[rows.problem_type][0]
    return Selector(StoppingCosts(rows, metric, costs), rules, measures)


def choose(selector: Selector, goal: Goal, kinds: Collection[str]) -> ExitRule | None:
    """The best setting of some kinds; None if no setting but full depth meets the goal."""
    try:
        return selector.search.choose(goal, kinds)
    except InputError:  # No setting is as fast.
        return None


def measured(systems: Sequence[System], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What each system scores, runs and takes on the same rows."""
    task = systems[0].engine.manifest.task
    texts, expected = [row.content for row in rows], expected_labels(rows, task)
    some = min(_SINGLE_ROWS, len(texts))
    alone = [_by_turns(systems, [texts[n * len(texts) // some]])[0] for n in range(some)]
    whole, answers = _by_turns(systems, texts)
    found = []
    for number, system in enumerate(systems):
        mine, milliseconds = answers[number], [1e3 * times[number] for times in alone]
        labels = [answer.labels for answer in mine]
        scores = evaluate(
            encode_labels(labels, task.labels, task.problem_type), expected, len(task.labels)
        )
        found.append(
            {
                "name": system.name,
                "score": scores[METRICS[task.problem_type][0]],
                "layers": statistics.mean(answer.layer for answer in mine),
                "exit_0": statistics.mean(answer.layer == 0 for answer in mine),
                "median_ms": statistics.median(milliseconds),
                "mean_ms": statistics.mean(milliseconds),
                "rows_per_s": len(texts) / whole[number],
            }
        )
    return found


def _by_turns(systems: Sequence[System], texts: Sequence[Text]) -> tuple[list[float], list[Any]]:
    """The median of the seconds of each system over its turns, and its answers."""
    seconds: list[list[float]] = [[] for _ in systems]
    answers: list[Any] = [None for _ in systems]
    for _ in range(_REPEATS):
        for number, system in enumerate(systems):
            started = time.perf_counter()
            answers[number] = system.engine.predict(texts, rule=system.rule)
            seconds[number].append(time.perf_counter() - started)
    return [statistics.median(each) for each in seconds], answers


def static_model(backbone: str, work: Path, data: Path, threads: int | None) -> dict[str, Any]:
    """The same for model2vec with logistic regression, see `reproduce_static.py`.

    Args:
        backbone: the encoder that is distilled.
        work: gets the environment and the static model.
        data: the folder of the dataset.
        threads: CPU threads; None: all cores.
    """
    place = work / "model2vec"
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not (place / "installed").is_file():
        venv.create(place, with_pip=True)
        packages = [MODEL2VEC.replace("==", "[distill]=="), "scikit-learn"]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (place / "installed").touch()
    script = Path(__file__).with_name("reproduce_static.py")
    static = work / f"static-{Path(backbone).name}"
    command = [str(word) for word in (python, script, backbone, static, data)]
    variables = os.environ | {"OMP_NUM_THREADS": str(threads or usable_cores())}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=variables, text=True, check=True)
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def shift(
    engine: Engine, rule: ExitRule, dev: LabelledLogits, texts: Sequence[Text]
) -> dict[str, float]:
    """How a rule does on texts, compared with the last exit.

    Args:
        engine: a single-label model with exit 0.
        rule: the rule.
        dev: the rows that chose the rule.
        texts: the texts; they need no labels.

    Returns:
        `rows`; `exit_0`, the share that exit 0 answers; `agreement_at_exit_0` with the last exit
        on these rows, and that of exit 1 on the same rows; `agreement` on all rows; `drift` from
        the exits on dev, and about how much there would be by chance.
    """
    engine.reset_tally()
    exits = np.array([answer.exit for answer in engine.predict(texts, rule=rule)])
    expected = np.bincount(exits_of(rule, dev), minlength=len(dev.exits)).tolist()
    drift = engine.tally.drift(expected)
    answers = engine.trace(texts).logits.argmax(axis=-1)
    same, early = answers == answers[-1], exits == 0
    there = [float(one[early].sum() / max(1, early.sum())) for one in same[:2]]
    return {
        "rows": len(texts),
        "exit_0": float(early.mean()),
        "agreement_at_exit_0": there[0],
        "agreement_of_exit_1": there[1],
        "agreement": float(same[exits, np.arange(len(texts))].mean()),
        "drift": drift,
        "by_chance": float(np.sqrt(len(dev.exits) / len(texts))),
    }
