#!/usr/bin/env python
"""Does calibration keep its promises? Simulations on populations whose true drop is known.

    python scripts/calibration_study.py --work WORK [--population trec-minilm] [--rows 1000]

A population is a large set of logits with labels: either synthetic, or from a real model on real
data (`scripts/logits/`, dev and test rows together). A calibration sees rows that are drawn from
it with replacement. What it chooses is then evaluated on the whole population, so its true drop is
known. The cost of a row is its number of layers.

WORK holds one file for each population and number of rows. Finished calibrations are not repeated,
so the script can be stopped at any time. The tables of all of them are written to
`scripts/results/calibration-study.md`; the first one is also in `docs/calibration-study.md`. The
columns are

- drop: the mean true drop over calibrations, in points, with its standard error,
- broken: the share of calibrations whose true drop exceeds a guarantee, with its 95 % interval,
- refused: the share of calibrations that choose full depth, since no faster setting is confirmed,
- saving: the mean share of layers that is saved; a refusal saves nothing,
- oracle: the saving as a share of the oracle's, which knows the population, and takes the setting
  that saves most within the promise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from fpabee.calibration import Bound, Goal, LabelledLogits, RiskOf
from fpabee.calibration.choose import Search
from fpabee.calibration.families import DEFAULT_MEASURES, DEFAULT_RULES, make_families
from fpabee.calibration.risk import control
from fpabee.calibration.scoring import AGREEMENT, METRICS, Scorer
from fpabee.calibration.stopping_costs import StoppingCosts
from fpabee.calibration.sweep import StopScores
from fpabee.runtime import ExitRule, InputError, ProblemType
from fpabee.runtime.cli.command import exits_with_one_line

LOGITS = Path(__file__).parent / "logits"
OUTPUT = Path(__file__).parent / "results" / "calibration-study.md"
SIZES = (200, 500, 1000, 3000)
REPEATS = 500
SUMMARY_ROWS = 1000
"""The number of rows of the first table."""
_SYNTHETIC_ROWS = 20_000
_SINGLE, _MULTI = ProblemType.SINGLE_LABEL, ProblemType.MULTI_LABEL


@dataclass(frozen=True)
class Synthetic:
    """A population of rows whose evidence for their label grows with depth.

    The evidence at an exit is a Brownian motion with drift, sampled at the exit's information, so
    the last exit's logits are log-likelihoods: it is calibrated if `sharpness` is 1, over-confident
    above 1, and under-confident below 1. Earlier exits have some noise of their own.
    """

    exits: int
    labels: int
    problem_type: ProblemType = _SINGLE
    sharpness: float = 1.0

    def rows(self) -> LabelledLogits:
        """The population."""
        generator = np.random.default_rng(0)
        shape = (_SYNTHETIC_ROWS, self.labels)
        single = self.problem_type is _SINGLE
        expected: NDArray[np.int64]
        towards: NDArray[np.floating[Any]]
        if single:
            expected = generator.integers(0, self.labels, _SYNTHETIC_ROWS)
            towards = np.eye(self.labels)[expected]
        else:
            expected = (generator.random(shape) < 0.3).astype(np.int64)
            towards = 2.0 * expected - 1.0
        strength = generator.gamma(2.0, 2.4 if single else 4.8, (_SYNTHETIC_ROWS, 1))
        steps = np.diff(np.linspace(0.4, 1.0, self.exits) ** 2, prepend=0.0)
        logits, evidence = [], np.zeros(shape)
        for number, step in enumerate(steps):
            gained = strength * step
            evidence = evidence + towards * gained
            evidence += np.sqrt(gained) * generator.normal(size=shape)
            own = 0.5 * (1 - number / (self.exits - 1)) * generator.normal(size=shape)
            logits.append(evidence + own if single else 2 * evidence + np.log(3 / 7) + own)
        stacked = (self.sharpness * np.stack(logits)).astype(np.float32)
        lengths = np.full(_SYNTHETIC_ROWS, 20, np.intp)
        return LabelledLogits(stacked, lengths, expected, self.problem_type)


SYNTHETIC = {
    "calibrated, 6 exits": Synthetic(6, 4),
    "over-confident, 6 exits": Synthetic(6, 4, sharpness=2.5),
    "under-confident, 6 exits": Synthetic(6, 4, sharpness=0.4),
    "calibrated, 12 exits": Synthetic(12, 2),
    "over-confident, 12 exits": Synthetic(12, 2, sharpness=2.5),
    "under-confident, 12 exits": Synthetic(12, 2, sharpness=0.4),
    "multi-label, 6 exits": Synthetic(6, 8, _MULTI),
    "multi-label, over-confident": Synthetic(6, 8, _MULTI, sharpness=2.5),
}


@dataclass(frozen=True)
class Promise:
    """What a calibration is asked for.

    Attributes:
        name: as the table shows it.
        goal: what is asked for.
        metric: the metric; None means the first one of the task.
    """

    name: str
    goal: Goal | Bound
    metric: str | None = None

    @property
    def allowed(self) -> float:
        """The largest drop, in points."""
        if isinstance(self.goal, Bound):
            return 100 * self.goal.risk
        assert self.goal.max_drop is not None
        return self.goal.max_drop


SAFE, BALANCED = Bound(0.005, 0.95), Goal(max_drop=0.5)
PROMISES = (
    Promise("balanced", BALANCED),
    Promise("fast", Goal(max_drop=2.0)),
    Promise("safe", SAFE),
    Promise("safe, macro-F1", SAFE, "macro_f1"),
    Promise("safe, agreement", SAFE, AGREEMENT),
    Promise("risk 1", Bound(0.01, 0.95)),
    Promise("risk 2", Bound(0.02, 0.95)),
    Promise("risk 2, disagreement", Bound(0.02, 0.95, RiskOf.DISAGREEMENT), AGREEMENT),
)


def populations() -> dict[str, Callable[[], LabelledLogits]]:
    """Every population by name."""
    found: dict[str, Callable[[], LabelledLogits]] = {
        name: made.rows for name, made in SYNTHETIC.items()
    }
    for path in sorted(LOGITS.glob("*.npz")):
        found[path.stem] = partial(stored_logits, path)
    return found


def stored_logits(path: Path) -> LabelledLogits:
    """The rows of dev and test in a stored file, one after another."""
    parts = ("dev", "test")
    with np.load(path) as content:
        logits = np.concatenate([content[f"{part}_logits"] for part in parts], axis=1)
        expected = np.concatenate([content[f"{part}_labels"] for part in parts]).astype(np.int64)
        problem_type = _SINGLE if expected.ndim == 1 else _MULTI
    lengths = np.full(len(expected), 20, np.intp)
    return LabelledLogits(logits.astype(np.float32), lengths, expected, problem_type)


class Population:
    """A population, and the truth about rules on it."""

    def __init__(self, rows: LabelledLogits) -> None:
        self.rows = rows
        self._scorers: dict[str, Scorer] = {}
        self._stop = StopScores(rows)

    def drawn(self, count: int, seed: int) -> LabelledLogits:
        """Rows that are drawn with replacement."""
        # Another stream than those of the calibration.
        generator = np.random.default_rng([seed, 1])
        return self.rows.take(generator.integers(0, len(self.rows), count))

    def scorer(self, metric: str | None) -> Scorer:
        """A metric of the whole population."""
        name = metric or METRICS[self.rows.problem_type][0]
        if name not in self._scorers:
            self._scorers[name] = Scorer(self.rows, name)
        return self._scorers[name]

    def truth(self, rule: ExitRule | None, metric: str | None) -> tuple[float, float]:
        """The true drop in points, and the share of layers saved."""
        if rule is None:
            return 0.0, 0.0
        exits = self._stop.exits(rule)
        scorer = self.scorer(metric)
        drop = 100 * (scorer.full_depth - scorer.score(exits))
        return drop, float(1 - exits.mean() / self.rows.exits[-1])

    def oracle(self, promise: Promise) -> float:
        """The largest saving of a setting whose true drop is within the promise."""
        metric = self.scorer(promise.metric).metric
        costs = StoppingCosts(self.rows, metric, layer_costs(self.rows))
        best = 0.0
        for family in make_families(costs, DEFAULT_RULES, DEFAULT_MEASURES):
            savings = 1 - family.exits.mean(axis=1) / self.rows.exits[-1]
            for number in np.flatnonzero(savings > best):
                exits = family.exits[number].astype(np.int64)
                drop = costs.scorer.full_depth - costs.scorer.score(exits)
                if 100 * drop <= promise.allowed:
                    best = max(best, float(savings[number]))
        return best


def layer_costs(rows: LabelledLogits) -> NDArray[np.float64]:
    """Costs `[exits, rows]`: the number of the exit, which counts its layers."""
    return np.repeat(np.array(rows.exits, float)[:, None], len(rows), axis=1)


def calibrate(
    population: Population, count: int, seed: int
) -> Iterator[tuple[str, float, float, bool]]:
    """One calibration for each promise: its name, true drop, saving, and whether it refused."""
    rows = population.drawn(count, seed)
    searches: dict[str, Search] = {}
    for promise in PROMISES:
        metric = population.scorer(promise.metric).metric
        if metric not in searches:
            costs = StoppingCosts(rows, metric, layer_costs(rows))
            families = make_families(costs, DEFAULT_RULES, DEFAULT_MEASURES, seed)
            searches[metric] = Search(costs, families, seed)
        search, rule = searches[metric], None
        if isinstance(promise.goal, Bound):
            with suppress(InputError):  # The rows cannot confirm any rule.
                rule, _ = control(search.stopping_costs, promise.goal, (), DEFAULT_MEASURES, seed)
        else:
            rule = search.choose(promise.goal, search.kinds)
        yield promise.name, *population.truth(rule, promise.metric), rule is None


def study(path: Path, repeats: int, run: Callable[[int], Iterator[tuple[Any, ...]]]) -> None:
    """Run the calibrations that a file does not have yet, one for each seed."""
    done = len(path.read_text().splitlines()) if path.is_file() else 0
    with path.open("a", encoding="utf-8") as file:
        for seed in range(done, repeats):
            file.write(json.dumps({key: list(rest) for key, *rest in run(seed)}) + "\n")
            file.flush()


def tables(names: Sequence[str], work: Path) -> Iterator[str]:
    """The lines of the tables, for what has been run."""
    yield "# Calibration study\n"
    yield "Made by `scripts/calibration_study.py`, which describes the columns.\n"
    yield f"## `balanced` and `safe` with {SUMMARY_ROWS:,} rows\n"
    yield "| population | balanced: drop | saving | oracle | safe: broken | saving | oracle |"
    yield "|---|---|---|---|---|---|---|"
    for name in names:
        if (work / f"{name}-{SUMMARY_ROWS}.jsonl").is_file():
            _, *balanced = _cells(name, SUMMARY_ROWS, PROMISES[0], work)
            _, *safe = _cells(name, SUMMARY_ROWS, PROMISES[2], work)
            cells = [name, balanced[0], *balanced[3:], safe[1], *safe[3:]]
            yield f"| {' | '.join(cells)} |"
    yield "\n## All promises\n"
    yield "| population | rows | promise | runs | drop | broken | refused | saving | oracle |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in names:
        paths = work.glob(f"{name}-*[0-9].jsonl")
        for count in sorted(int(path.stem.rpartition("-")[2]) for path in paths):
            for promise in PROMISES:
                cells = [name, str(count), promise.name, *_cells(name, count, promise, work)]
                yield f"| {' | '.join(cells)} |"


def _cells(name: str, count: int, promise: Promise, work: Path) -> list[str]:
    """Runs, drop, broken, refused, saving and oracle of a promise."""
    runs = (work / f"{name}-{count}.jsonl").read_text().splitlines()
    found = [json.loads(line)[promise.name] for line in runs]
    drops, savings, refused = (np.array(column, float) for column in zip(*found, strict=True))
    broken = int((drops > promise.allowed + 1e-9).sum())
    error = drops.std() / np.sqrt(len(drops))
    share = "-"
    if isinstance(promise.goal, Bound):
        low, high = binomial_interval(broken, len(drops))
        share = f"{100 * broken / len(drops):.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    best = json.loads((work / f"{name}-oracle.json").read_text())[promise.name]
    return [
        str(len(drops)),
        f"{drops.mean():.2f} ± {error:.2f}",
        share,
        f"{100 * refused.mean():.0f} %",
        f"{savings.mean():.3f}",
        f"{savings.mean() / best:.2f}" if best else "-",
    ]


def binomial_interval(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    middle = (count + z**2 / 2) / (total + z**2)
    half = z * np.sqrt(count * (total - count) / total + z**2 / 4) / (total + z**2)
    return max(0.0, middle - half), min(1.0, middle + half)


@click.command(context_settings={"show_default": True})
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Results so far.")
@click.option("--population", "names", multiple=True, help="Default: all.")
@click.option("--rows", "sizes", multiple=True, type=int, default=SIZES)
@click.option("--repeats", default=REPEATS, help="Calibrations of each kind.")
@click.option("--output", default=OUTPUT, type=click.Path(path_type=Path), help="Where to write.")
@exits_with_one_line
def main(
    work: Path, names: tuple[str, ...], sizes: tuple[int, ...], repeats: int, output: Path
) -> None:
    """Run what is missing, then write the tables of all that has been run."""
    work.mkdir(parents=True, exist_ok=True)
    makers = populations()
    for name in names or makers:
        population = Population(makers[name]())
        oracle = work / f"{name}-oracle.json"
        if not oracle.is_file():
            oracle.write_text(json.dumps({p.name: population.oracle(p) for p in PROMISES}))
        for count in sizes:
            run = partial(calibrate, population, count)
            study(work / f"{name}-{count}.jsonl", repeats, run)
            click.echo(f"{name}, {count} rows: done", err=True)
    output.write_text("\n".join(tables(list(makers), work)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
