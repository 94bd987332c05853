"""The tables of `reproduce.py`, from the runs that it stored."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import render

SAVINGS = (0.25, 0.5, 0.75)
JUDGED = ("fpabee", "entropy")
"""Rules with which self-distillation is evaluated."""
COMPARED = ("pabee", "entropy", "confidence", "pcee", "fpabee per exit", "entropy per exit")
DISTILLED = "-distill"
"""Suffix of the names of runs with self-distillation."""
EXIT_0 = "-exit-0"
"""Suffix of the names of runs with exit 0 and self-distillation."""
TARGETS = {"mini-trec": 3.9, "mini-snips": 8.0, "mini-sst2": 2.5, "mpnet-sst2": 3.0}
"""How many times fewer layers `balanced` should run."""

Run = dict[str, Any]


def tables(results: Path, names: Iterable[str]) -> str:
    """The content of `table.md`: for each model, a table of rules and savings.

    Args:
        results: the folder of the stored runs.
        names: the runs in the order of the table.
    """
    runs = _stored(results, names)
    distilled = {}
    for name, mine in runs.items():
        plain = {run["seed"]: run for run in runs.get(name.removesuffix(DISTILLED), ())}
        if name.endswith(DISTILLED) and all(run["seed"] in plain for run in mine):
            distilled[name] = mine, [plain[run["seed"]] for run in mine]
    return render(
        "table",
        runs=runs,
        distilled=distilled,
        savings=SAVINGS,
        judged=JUDGED,
        compared=COMPARED,
        cell=_cell,
        differences=_differences,
        exit_gains=_exit_gains,
        full_depth=_full_depth,
        names=_names,
    )


def alternatives(results: Path, names: Iterable[str]) -> str:
    """The content of `alternatives.md`: exits with exit 0, and what people would do instead.

    Args:
        results: the folder of the stored comparisons.
        names: the runs in the order of the tables.
    """
    return render(
        "alternatives",
        runs=_stored(results, names),
        targets={name + EXIT_0: target for name, target in TARGETS.items()},
        columns=_COLUMNS,
        mean=_mean,
        names=_names,
        saved=_saved,
        systems=_systems,
    )


def _stored(results: Path, names: Iterable[str]) -> dict[str, list[Run]]:
    """The stored runs by name, each in the order of its seeds; names without any are left out."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")]
    found.sort(key=lambda run: run["seed"])
    runs = {name: [run for run in found if run["name"] == name] for name in names}
    return {name: mine for name, mine in runs.items() if mine}


def _names(runs: Sequence[Run], what: str, key: str) -> list[str]:
    """The different values of a key in the lists of some runs, in their order."""
    return list(dict.fromkeys(one[key] for run in runs for one in run[what]))


def _full_depth(runs: Sequence[Run]) -> str:
    return _with_deviation([100 * run["exits"][-1] for run in runs])


def _found(runs: Sequence[Run], kind: str, saving: float) -> list[Run]:
    """The setting of a kind of rule in each run."""
    return [
        setting
        for run in runs
        for setting in run["settings"]
        if (setting["kind"], setting["wished"]) == (kind, saving)
    ]


def _cell(runs: Sequence[Run], kind: str, saving: float) -> str:
    """The score of a kind of rule at a saving, and what it saves."""
    found = _found(runs, kind, saving)
    if len(found) < len(runs):
        return "-"
    saved = statistics.mean(100 * setting["saving"] for setting in found)
    return f"{_with_deviation([100 * setting['score'] for setting in found])} ({saved:.0f} %)"


def _differences(runs: Sequence[Run], others: Sequence[Run], kind: str, other_kind: str) -> str:
    """Mean difference between a kind of rule and one in other runs at each saving, in points."""
    found = []
    for saving in SAVINGS:
        mine, theirs = _found(runs, kind, saving), _found(others, other_kind, saving)
        if len(mine) < len(runs) or len(theirs) < len(runs):
            found.append("-")
            continue
        scores = [a["score"] - b["score"] for a, b in zip(mine, theirs, strict=True)]
        found.append(f"{100 * statistics.mean(scores):+.2f}")
    return " / ".join(found)


def _exit_gains(runs: Sequence[Run], others: Sequence[Run]) -> str:
    """Mean difference between the scores of each exit in some runs and in others, in points."""
    gains = [
        np.subtract(run["exits"], other["exits"]) for run, other in zip(runs, others, strict=True)
    ]
    return " ".join(f"{100 * gain:+.2f}" for gain in np.mean(gains, axis=0))


_COLUMNS = {
    "score": "{:.4f}",
    "layers": "{:.2f}",
    "exit_0": "{:.0%}",
    "median_ms": "{:.2f}",
    "mean_ms": "{:.2f}",
    "rows_per_s": "{:.0f}",
}


def _mean(found: Sequence[Run], key: str, form: str) -> str:
    return form.format(statistics.mean(one.get(key, 0) for one in found))


def _systems(runs: Sequence[Run], name: str) -> list[Run]:
    return [system for run in runs for system in run["systems"] if system["name"] == name]


def _saved(runs: Sequence[Run], name: str) -> str:
    """How many times fewer layers a system runs, and the points that it loses: two cells."""
    pairs = list(zip(_systems(runs, "full depth"), _systems(runs, name), strict=True))
    times = statistics.mean(
        full["layers"] / mine["layers"] if mine["layers"] else math.inf for full, mine in pairs
    )
    loss = statistics.mean(full["score"] - mine["score"] for full, mine in pairs)
    return f"{'no layer runs' if math.isinf(times) else f'{times:.2f}x'} | {100 * loss:+.2f}"


def _with_deviation(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
