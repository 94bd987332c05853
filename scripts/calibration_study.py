#!/usr/bin/env python
"""Does calibration keep its promises? Simulations on populations whose truth is known.

    python scripts/calibration_study.py --work WORK [--population trec-minilm]

A population is a large set of logits: either synthetic, or from a real model on real data
(`scripts/logits/`, dev and test rows together). For a guarantee, a calibration sees rows that are
drawn from it with replacement, and what it chooses is judged on the whole population. For goals on
average it sees rows without replacement, at most half of them, and is judged on the others. The
cost of a row is its number of layers.

WORK holds one file for each population and number of rows. Finished calibrations are not repeated,
so the script can be stopped at any time. The tables of all of them are written to WORK/tables.md;
`scripts/results/calibration-study.md` comes from it. The columns are

- loss: the mean of what is promised, in points or percent; the largest of several promises, as a
  share of its bound,
- refused: calibrations that choose full depth, since no faster setting is confirmed,
- broken: calibrations whose true loss exceeds a guarantee; p is the exact one-sided test of 5 %,
- saving: the mean share of layers that is saved; a refusal saves nothing,
- of best: the saving as a share of that of the best single threshold of confidence within the
  promise, which only somebody who knows the population can choose.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import comb
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from fpabee.calibration import Bound, Goal, LabelledLogits
from fpabee.calibration.choose import Search
from fpabee.calibration.costs import StoppingCosts
from fpabee.calibration.evidence import TextEvidence
from fpabee.calibration.guarantee import certify
from fpabee.calibration.scoring import AGREEMENT, METRICS, Scorer
from fpabee.calibration.settings import StopScores, settings_lists, with_exit_0
from fpabee.commands.command import exits_with_one_line
from fpabee.runtime import Budget, Confidence, ExitRule, ProblemType

LOGITS = Path(__file__).parent / "logits"
REPEATS = 100
SIZES = (600, 1000, 3000)
_SYNTHETIC_ROWS = 20_000
_SINGLE = ProblemType.SINGLE_LABEL
_MULTI = ProblemType.MULTI_LABEL
_LABELS = ("other", "attack")


@dataclass(frozen=True)
class Synthetic:
    """A population of rows whose evidence for their label grows with depth.

    The evidence at an exit is a Brownian motion with drift, sampled at the exit's information, so
    the last exit's logits are log-likelihoods: it is calibrated if `sharpness` is 1, over-confident
    above 1, and under-confident below 1. Earlier exits have some noise of their own. With
    `exit_0`, there is an exit 0 as good as that exit; 0 means that it knows nothing.
    """

    exits: int
    labels: int
    problem_type: ProblemType = _SINGLE
    sharpness: float = 1.0
    flagged: float | None = None
    exit_0: int | None = None

    def rows(self) -> LabelledLogits:
        """The population."""
        generator = np.random.default_rng(0)
        count = _SYNTHETIC_ROWS if self.flagged is None else 5 * _SYNTHETIC_ROWS
        shape = (count, self.labels)
        single = self.problem_type is _SINGLE
        expected: NDArray[np.int64]
        towards: NDArray[np.floating[Any]]
        prior = np.full(self.labels, 1 / self.labels)
        if self.flagged is not None:
            prior = np.array([1 - self.flagged, self.flagged])
        if single:
            expected = generator.choice(self.labels, count, p=prior)
            towards = np.eye(self.labels)[expected]
        else:
            expected = (generator.random(shape) < 0.3).astype(np.int64)
            towards = 2.0 * expected - 1.0
        strength = generator.gamma(2.0, 2.4 if single else 4.8, (count, 1))
        steps = np.diff(np.linspace(0.4, 1.0, self.exits) ** 2, prepend=0.0)
        logits = []
        evidence = np.zeros(shape)
        for number, step in enumerate(steps):
            gained = strength * step
            evidence = evidence + towards * gained
            evidence += np.sqrt(gained) * generator.normal(size=shape)
            own = 0.5 * (1 - number / (self.exits - 1)) * generator.normal(size=shape)
            logits.append(evidence + own if single else 2 * evidence + np.log(3 / 7) + own)
        if self.exit_0 is not None:
            logits.insert(0, logits[self.exit_0 - 1] if self.exit_0 else own)
        total = np.stack(logits) + (np.log(prior) if single else 0.0)
        lengths = np.full(count, 20, np.intp)
        first = 1 if self.exit_0 is None else 0
        stacked = np.asarray(self.sharpness * total, np.float32)
        return LabelledLogits(stacked, lengths, expected, self.problem_type, (), first)


SYNTHETIC = {
    "calibrated, 6 exits": Synthetic(6, 4),
    "over-confident, 6 exits": Synthetic(6, 4, sharpness=2.5),
    "under-confident, 6 exits": Synthetic(6, 4, sharpness=0.4),
    "calibrated, 12 exits": Synthetic(12, 2),
    "over-confident, 12 exits": Synthetic(12, 2, sharpness=2.5),
    "under-confident, 12 exits": Synthetic(12, 2, sharpness=0.4),
    "multi-label, 6 exits": Synthetic(6, 8, _MULTI),
    "multi-label, over-confident": Synthetic(6, 8, _MULTI, sharpness=2.5),
    "useful exit 0": Synthetic(6, 4, exit_0=4),
    "useless exit 0": Synthetic(6, 4, exit_0=0),
}
GUARDS = {
    "guard, 50 % flagged": (Synthetic(6, 2, flagged=0.5), 800),
    "guard, 10 % flagged": (Synthetic(6, 2, flagged=0.1), 4000),
    "guard, 1 % flagged": (Synthetic(6, 2, flagged=0.01), 40_000),
}
"""Populations with one label to flag, and how many rows are drawn."""

GOALS: dict[str, Goal | Bound] = {
    "balanced": Goal(max_drop=0.5),
    "fast": Goal(max_drop=2.0),
    "safe": Bound(drop=0.005),
    "risk 1": Bound(drop=0.01),
    "risk 2": Bound(drop=0.02),
    "changed 1": Bound(changed_answers=0.01),
    "changed 2": Bound(changed_answers=0.02),
}
_AT = {"attack": 0.7}
PROMISES: dict[str, Goal | Bound] = {
    "changed 1": Bound(changed_answers=0.01, thresholds=_AT),
    "missed 2": Bound(missed=0.02, thresholds=_AT),
    "false alarms 0.5": Bound(false_alarms=0.005, thresholds=_AT),
    "all three": Bound(changed_answers=0.01, missed=0.02, false_alarms=0.005, thresholds=_AT),
}


def populations() -> dict[str, Callable[[], LabelledLogits]]:
    """Every population by name."""
    rows_of: dict[str, Callable[[], LabelledLogits]] = {
        name: made.rows for name, made in SYNTHETIC.items()
    }
    rows_of |= {name: partial(_guard, made) for name, (made, _) in GUARDS.items()}
    return rows_of | {path.stem: partial(stored, path) for path in sorted(LOGITS.glob("*.npz"))}


def _guard(made: Synthetic) -> LabelledLogits:
    return replace(made.rows(), decision_thresholds=(1.0, 0.7))


def stored(path: Path) -> LabelledLogits:
    """The rows of dev and test in a stored file, one after another."""
    parts = ("dev", "test")
    with np.load(path) as content:
        logits = np.concatenate([content[f"{part}_logits"] for part in parts], axis=1)
        expected = np.concatenate([content[f"{part}_labels"] for part in parts]).astype(np.int64)
    problem_type = _SINGLE if expected.ndim == 1 else _MULTI
    lengths = np.full(len(expected), 20, np.intp)
    return LabelledLogits(logits.astype(np.float32), lengths, expected, problem_type)


def metric_of(goal: Goal | Bound, rows: LabelledLogits) -> str:
    """The metric that a goal is about."""
    if isinstance(goal, Bound) and goal.drop is None:
        return AGREEMENT
    return METRICS[rows.problem_type][0]


def with_layers(rows: LabelledLogits, metric: str) -> StoppingCosts:
    """Rows whose cost until an exit is its number of layers."""
    costs = np.repeat(np.array(rows.exits, float)[:, None], len(rows), axis=1)
    return StoppingCosts(rows, metric, costs)


class Truth:
    """The true results of rules on some rows."""

    def __init__(self, rows: LabelledLogits) -> None:
        self.rows = rows
        self._stop = StopScores(rows)
        self._scorers: dict[str, Scorer] = {}

    def of(self, rule: ExitRule, metric: str, goal: Goal | Bound) -> tuple[float, float, float]:
        """The loss, the same as a share of what is allowed, and the share of layers saved."""
        if metric not in self._scorers:
            self._scorers[metric] = Scorer(self.rows, metric)
        scorer = self._scorers[metric]
        exits = self._stop.exits([rule])[0]
        drop = 100 * (scorer.full_depth - scorer.score(exits))
        saving = float(1 - exits.mean() / self.rows.exits[-1])
        if isinstance(goal, Goal):
            assert goal.max_drop is not None
            return drop, drop / goal.max_drop, saving
        losses = []
        for promise in goal.promises:
            lost = drop
            if promise.of in ("missed", "false_alarms"):
                every, reference = scorer.decisions
                about = reference[:, 1] == (promise.of == "missed")
                lost = 100 * (every[self.rows.at(exits)][:, 1] != reference[:, 1])[about].mean()
            losses.append((float(lost / promise.at_most), float(lost)))
        share, lost = max(losses)
        return lost, share, saving

    def best(self, metric: str, goal: Goal | Bound) -> float:
        """The largest saving of a threshold of confidence whose true loss is within the promise."""
        base = Confidence(threshold=0.0, label_thresholds=self.rows.decision_thresholds)
        doubts = np.geomspace(1e-6, 0.95, 200)
        rules: list[ExitRule] = [base.with_stop_threshold(doubt) for doubt in doubts]
        if self.rows.first_exit == 0:
            rules += [
                with_exit_0(rule, doubt / 4) for rule, doubt in zip(rules, doubts, strict=True)
            ]
        rules.append(Budget(exit=self.rows.exits[-1]))
        truths = [self.of(rule, metric, goal) for rule in rules]
        return max(saving for _, share, saving in truths if share <= 1 + 1e-9)


def calibrate(
    truth: Truth, goals: dict[str, Goal | Bound], count: int, seed: int
) -> Iterator[tuple[str, float, float, float, bool]]:
    """One calibration for each goal: its name, the truth about it, and whether it refused."""
    population = truth.rows
    generator = np.random.default_rng([seed, 1])
    order = generator.permutation(len(population))
    half = min(count, len(population) // 2)
    drawn = population.take(generator.integers(0, len(population), count))
    full_depth = Budget(exit=population.exits[-1])
    search: Search | None = None
    others = truth
    for name, goal in goals.items():
        metric = metric_of(goal, population)
        if isinstance(goal, Bound):
            chosen = certify(TextEvidence(Scorer(drawn, metric), _LABELS), goal).rule or full_depth
            drop, share, saving = truth.of(chosen, metric, goal)
        else:
            if search is None:
                some = population.take(order[:half])
                search = Search(with_layers(some, metric), settings_lists(some))
                others = Truth(population.take(order[half:]))
            chosen = search.choose(goal) or full_depth
            drop, share, saving = others.of(chosen, metric, goal)
        yield name, drop, share, saving, chosen == full_depth


def study(path: Path, repeats: int, run: Callable[[int], Iterator[tuple[Any, ...]]]) -> None:
    """Run the calibrations that a file does not have yet, one for each seed."""
    done = len(path.read_text().splitlines()) if path.is_file() else 0
    with path.open("a", encoding="utf-8") as file:
        for seed in range(done, repeats):
            file.write(json.dumps({key: list(rest) for key, *rest in run(seed)}) + "\n")
            file.flush()


def binomial_tail(count: int, runs: int, share: float = 0.05) -> float:
    """P(Binomial(runs, share) >= count), exactly."""
    below = (comb(runs, k) * share**k * (1 - share) ** (runs - k) for k in range(count))
    return max(0.0, 1.0 - sum(below))


def tables(work: Path) -> Iterator[str]:
    """The lines of the tables, for what has been run."""
    yield "# Calibration study\n"
    yield "Made by `scripts/calibration_study.py`, which describes the columns.\n"
    cells = list(_cells(work))
    pooled: dict[str, list[Any]] = defaultdict(list)
    for cell in cells:
        pooled[cell["goal"]].append(cell)
    guaranteed = [cell for cell in cells if cell["guaranteed"]]
    worst = min((cell["p"] for cell in guaranteed), default=1.0)
    yield "## All populations and sizes pooled\n"
    yield "| goal | cells | calibrations | refused | broken | p | saving | of best |"
    yield "|---|---|---|---|---|---|---|---|"
    for goal, some in pooled.items():
        runs, refused, broken = (sum(c[key] for c in some) for key in ("runs", "refused", "broken"))
        p = f"{binomial_tail(broken, runs):.3f}" if some[0]["guaranteed"] else "-"
        mean = [np.mean([c[key] for c in some]) for key in ("saving", "of best")]
        broken = broken if some[0]["guaranteed"] else "-"
        words = (goal, len(some), runs, refused, broken, p, f"{mean[0]:.3f}", f"{mean[1]:.2f}")
        yield f"| {' | '.join(map(str, words))} |"
    limit = 0.05 / max(1, len(guaranteed))
    yield f"\nThe smallest p of {len(guaranteed)} cells with a guarantee is {worst:.4f}; a cell"
    yield f"fails if its p is below 0.05 divided by their number, {limit:.5f}.\n"
    yield "## Every cell\n"
    columns = ["population", "rows", "goal", "runs", "loss", "refused", "broken", "p", "saving"]
    yield f"| {' | '.join(columns)} | of best |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for c in cells:
        broken, p = (c["broken"], f"{c['p']:.3f}") if c["guaranteed"] else ("-", "-")
        line = [c["name"], c["rows"], c["goal"], c["runs"], f"{c['loss']:.2f}", c["refused"]]
        line += [broken, p, f"{c['saving']:.3f}", f"{c['of best']:.2f}"]
        yield f"| {' | '.join(map(str, line))} |"


def _cells(work: Path) -> Iterator[dict[str, Any]]:
    for name in populations():
        paths = work.glob(f"{name}-*[0-9].jsonl")
        for count in sorted(int(path.stem.rpartition("-")[2]) for path in paths):
            lines = (work / f"{name}-{count}.jsonl").read_text().splitlines()
            runs = [json.loads(line) for line in lines]
            best = json.loads((work / f"{name}-best.json").read_text())
            for goal, wanted in (PROMISES if name in GUARDS else GOALS).items():
                loss, share, saving, refused = np.array([run[goal] for run in runs], float).T
                broken = int((share > 1 + 1e-9).sum())
                yield {
                    "name": name,
                    "rows": count,
                    "goal": goal,
                    "runs": len(runs),
                    "loss": loss.mean(),
                    "refused": int(refused.sum()),
                    "broken": broken,
                    "p": binomial_tail(broken, len(runs)),
                    "saving": saving.mean(),
                    "of best": saving.mean() / best[goal] if best[goal] else 0.0,
                    "guaranteed": isinstance(wanted, Bound),
                }


@click.command(context_settings={"show_default": True})
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Results so far.")
@click.option("--population", "names", multiple=True, help="Default: all.")
@click.option("--repeats", default=REPEATS, help="Calibrations of each kind.")
@exits_with_one_line
def main(work: Path, names: tuple[str, ...], repeats: int) -> None:
    """Run what is missing, then write the tables of all that has been run."""
    work.mkdir(parents=True, exist_ok=True)
    makers = populations()
    for name in names or makers:
        goals, counts = (PROMISES, (GUARDS[name][1],)) if name in GUARDS else (GOALS, SIZES)
        truth = Truth(makers[name]())
        best = work / f"{name}-best.json"
        if not best.is_file():
            every = {
                goal: truth.best(metric_of(wanted, truth.rows), wanted)
                for goal, wanted in goals.items()
            }
            best.write_text(json.dumps(every))
        for count in counts:
            study(work / f"{name}-{count}.jsonl", repeats, partial(calibrate, truth, goals, count))
            click.echo(f"{name}, {count} rows: done", err=True)
    (work / "tables.md").write_text("\n".join(tables(work)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
