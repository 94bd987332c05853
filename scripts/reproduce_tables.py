"""The table and the figures of `reproduce.py`, from the runs that it stored."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fpabee.calibration.families import PER_EXIT

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


def stored(results: Path, name: str) -> list[dict[str, Any]]:
    """The stored runs of a name, ordered by seed."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")]
    return sorted((run for run in runs if run["name"] == name), key=lambda run: run["seed"])


def tables(results: Path, names: Iterable[str]) -> Iterator[str]:
    """The lines of `table.md`: for each model, a table of rules and savings.

    Args:
        results: the folder of the stored runs.
        names: the runs in the order of the table.
    """
    of = {name: stored(results, name) for name in names}
    of = {name: mine for name, mine in of.items() if mine}
    yield "# Scores at 25, 50 and 75 % of layers saved"
    yield ""
    yield "Made by `scripts/reproduce.py`. Settings are chosen on dev and evaluated on test, where"
    yield "the share of layers saved is in brackets. Means and standard deviations over the seeds."
    yield "`scripts/train.py` in some commands is now `fpabee-train`, with the same options."
    yield ""
    yield from _gains({name: mine for name, mine in of.items() if not name.endswith(DISTILLED)})
    yield ""
    yield from _distillation(of)
    for name, mine in of.items():
        full = [100 * run["exits"][-1] for run in mine]
        seeds = ", ".join(str(run["seed"]) for run in mine)
        yield ""
        yield f"## {name}"
        yield ""
        yield f"`{mine[0]['command']}`; seeds {seeds}; {mine[0]['metric']} at full depth "
        yield f"{_mean(full)}, {mine[0]['rows']['test']} test rows."
        yield ""
        yield "| rule | 25 % | 50 % | 75 % |"
        yield "|---|---|---|---|"
        for kind in dict.fromkeys(s["kind"] for run in mine for s in run["settings"]):
            cells = [_cell(mine, kind, saving) for saving in SAVINGS]
            yield f"| {kind} | {' | '.join(cells)} |"


def _gains(of: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """F-PABEE compared with the other rules of the paper, on the same model."""
    yield from _head(
        "F-PABEE and other rules",
        "Score of `fpabee` minus that of the other rule on the same model, in points, where\n"
        "25 / 50 / 75 % of the layers are saved.",
        ["model", *COMPARED],
    )
    for name, mine in of.items():
        cells = (_differences(mine, mine, "fpabee", kind) for kind in COMPARED)
        yield f"| {name} | {' | '.join(cells)} |"


def _distillation(of: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Models with self-distillation compared with those without."""
    yield from _head(
        "The effect of self-distillation",
        "Score of a model trained with `--distill 0.5` minus that of the one with the same seed\n"
        "without it, in points: at each exit, and with a rule where 25 / 50 / 75 % of the layers\n"
        "are saved. Means over the seeds.",
        ["model", "seeds", "exits, from the first", *JUDGED],
    )
    for name, mine in of.items():
        plain = {run["seed"]: run for run in of.get(name.removesuffix(DISTILLED), ())}
        if not name.endswith(DISTILLED) or any(run["seed"] not in plain for run in mine):
            continue
        before = [plain[run["seed"]] for run in mine]
        gains = [
            np.subtract(run["exits"], other["exits"])
            for run, other in zip(mine, before, strict=True)
        ]
        exits = " ".join(f"{100 * gain:+.2f}" for gain in np.mean(gains, axis=0))
        cells = (_differences(mine, before, kind, kind) for kind in JUDGED)
        yield f"| {name} | {len(mine)} | {exits} | {' | '.join(cells)} |"


def alternatives(results: Path, names: Iterable[str]) -> Iterator[str]:
    """The lines of `alternatives.md`: exits with exit 0, and what people would do instead.

    Args:
        results: the folder of the stored comparisons.
        names: the runs in the order of the tables.
    """
    of = {name: stored(results, name) for name in names}
    of = {name: mine for name, mine in of.items() if mine}
    yield "# Exits, and what people would do instead"
    yield ""
    yield "Made by `scripts/reproduce.py`. Settings are chosen on dev and evaluated on test. Times"
    yield "include tokenization. Means over the seeds."
    yield ""
    yield from _head(
        "Targets of `balanced`",
        "How many times fewer layers run than at full depth, and what the score loses, in points.",
        ["model", "seeds", "target", "layers", "loss", "layers without exit 0", "loss"],
    )
    for name, mine in of.items():
        target = TARGETS.get(name.removesuffix(EXIT_0))
        cells = [name, f"{len(mine)}", f"{target}x" if target else "-"]
        cells += _saved(mine, "balanced") + _saved(mine, "balanced, without exit 0")
        yield f"| {' | '.join(cells)} |"
    for name, mine in of.items():
        yield ""
        yield from _head(
            name,
            f"`{mine[0]['command']}`, and so on; seeds "
            f"{', '.join(str(run['seed']) for run in mine)}.\n"
            f"{mine[0]['hardware']}; {_versions(mine[0])}.",
            [
                *("system", mine[0]["metric"], f"layers of {mine[0]['layers']}"),
                *("at exit 0", "one text, median ms", "mean ms", "file, rows/s"),
            ],
        )
        for system in dict.fromkeys(s["name"] for run in mine for s in run["systems"]):
            part = _systems(mine, system)
            cells = [
                form.format(statistics.mean(s.get(key, 0) for s in part))
                for key, form in _COLUMNS.items()
            ]
            few = "" if len(part) == len(mine) else f" ({len(part)} seeds)"
            yield f"| {system}{few} | {' | '.join(cells)} |"
        shifts = [(run["seed"], found) for run in mine for found in run["shift"]]
        if shifts:
            yield ""
            yield from _head(
                f"{name}, on other texts",
                "What two rules do on texts of other data sets. Agreement is with the last exit.",
                [
                    *("seed", "rule", "texts", "rows", "at exit 0", "agreement there"),
                    *("of exit 1 there", "agreement on all", "drift", "drift by chance"),
                ],
            )
        for seed, found in shifts:
            cells = [f"{x:.3f}" if isinstance(x, float) else f"{x}" for x in found.values()]
            yield f"| {seed} | {' | '.join(cells)} |"


_COLUMNS = {
    "score": "{:.4f}",
    "layers": "{:.2f}",
    "exit_0": "{:.0%}",
    "median_ms": "{:.2f}",
    "mean_ms": "{:.2f}",
    "rows_per_s": "{:.0f}",
}


def _systems(runs: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [system for run in runs for system in run["systems"] if system["name"] == name]


def _saved(runs: Sequence[dict[str, Any]], name: str) -> list[str]:
    """How many times fewer layers a system runs, and the points that it loses; seed means."""
    mine, full = _systems(runs, name), _systems(runs, "full depth")
    times = statistics.mean(
        a["layers"] / b["layers"] if b["layers"] else math.inf
        for a, b in zip(full, mine, strict=True)
    )
    loss = statistics.mean(a["score"] - b["score"] for a, b in zip(full, mine, strict=True))
    return ["no layer runs" if math.isinf(times) else f"{times:.2f}x", f"{100 * loss:+.2f}"]


def _versions(run: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in run["versions"].items())


def _head(title: str, what: str, columns: Sequence[str]) -> Iterator[str]:
    """The beginning of a section with one table."""
    yield f"## {title}"
    yield ""
    yield what
    yield ""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"


def _differences(
    runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], kind: str, other_kind: str
) -> str:
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


def _found(runs: Sequence[dict[str, Any]], kind: str, saving: float) -> list[dict[str, Any]]:
    """The setting of a kind in each run."""
    return [
        setting
        for run in runs
        for setting in run["settings"]
        if (setting["kind"], setting["wished"]) == (kind, saving)
    ]


def _cell(runs: Sequence[dict[str, Any]], kind: str, saving: float) -> str:
    found = _found(runs, kind, saving)
    if len(found) < len(runs):
        return "-"
    saved = statistics.mean(100 * setting["saving"] for setting in found)
    return f"{_mean([100 * setting['score'] for setting in found])} ({saved:.0f} %)"


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def draw(results: Path, name: str, path: Path) -> None:
    """A figure for a model: score over the share of layers saved, for every kind of rule."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    runs = stored(results, name)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="layers saved (%)", ylabel=f"{runs[0]['metric']} (%)")
    axes.set_title(name)
    markers = "os^Dv<>Pp*Xhd"
    kinds = dict.fromkeys(setting["kind"] for run in runs for setting in run["settings"])
    rules = list(dict.fromkeys(kind.removesuffix(PER_EXIT) for kind in kinds))
    for number, kind in enumerate(kinds):
        points = []
        for saving in SAVINGS:
            mine = _found(runs, kind, saving)
            if len(mine) == len(runs):
                points.append(
                    [100 * statistics.mean(s[key] for s in mine) for key in ("saving", "score")]
                )
        if points:
            axes.plot(
                *zip(*points, strict=True),
                marker=markers[number % len(markers)],
                color=f"C{rules.index(kind.removesuffix(PER_EXIT))}",
                linestyle="--" if kind.endswith(PER_EXIT) else "-",
                label=kind,
            )
    full = 100 * statistics.mean(run["exits"][-1] for run in runs)
    axes.axhline(full, color="black", linestyle=":", label="full depth")
    axes.legend(fontsize="x-small", ncols=2)
    # Without this, the same figure would have other bytes each time.
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(path, metadata={"Date": None})
