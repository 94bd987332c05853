#!/usr/bin/env python
"""Does calibration keep its promises? Simulations on populations whose true drop is known.

    python scripts/calibration_study.py --work WORK [--quick] [--population sst2] [--rows 1000]

A population is a large set of logits with labels: either synthetic, or from a real model on real
data (`scripts/logits/`, dev and test rows together). A calibration sees rows that are drawn from
it with replacement. What it chooses is then evaluated on the whole population, so its true drop is
known. The cost of a row is its number of layers.

WORK holds one file for each population and number of rows. Finished calibrations are not repeated,
so the script can be stopped at any time. The tables are written to `docs/calibration-study.md`. The
calibrations behind them are in `scripts/results/calibration-study.tar.xz`; unpack it into WORK to
add to them. The extras `calibrate` and `plot` are needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from pages import render

from fpabee.calibration import Bound, Goal, LabelledLogits, RiskOf
from fpabee.calibration.choose import Search
from fpabee.calibration.families import DEFAULT_MEASURES, DEFAULT_RULES, make_families
from fpabee.calibration.risk import control
from fpabee.calibration.scoring import AGREEMENT, METRICS, Scorer
from fpabee.calibration.stopping_costs import StoppingCosts
from fpabee.calibration.sweep import StopScores
from fpabee.runtime import ExitRule, InputError, ProblemType
from fpabee.runtime.cli.errors import exits_with_one_line

LOGITS = Path(__file__).parent / "logits"
PAGE = Path(__file__).parent.parent / "docs" / "calibration-study.md"
SIZES = (200, 500, 1000, 3000)
REPEATS = 500
QUICK_SIZES, QUICK_REPEATS = (500, 1000), 60
# Each kind of rule alone is judged on fewer calibrations of one size.
ALONE_ROWS, ALONE_REPEATS = 1000, 60
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
        ordered: whether the rows come sorted by label instead of at random.
    """

    name: str
    goal: Goal | Bound
    metric: str | None = None
    ordered: bool = False

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
    Promise("risk 1, sorted file", Bound(0.01, 0.95), ordered=True),
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
    """Costs `[exits, rows]`: the number of the exit, which counts its layers; 0.01 for exit 0."""
    return np.repeat(np.maximum(rows.exits, 0.01)[:, None], len(rows), axis=1)


def calibrate(
    population: Population, promises: Sequence[Promise], count: int, seed: int
) -> Iterator[tuple[str, float, float, bool]]:
    """One calibration for each promise: its name, true drop, saving, and whether it refused."""
    rows = population.drawn(count, seed)
    assert rows.expected is not None
    keys = rows.expected if rows.expected.ndim == 1 else rows.expected.sum(axis=1)
    searches: dict[str, Search] = {}
    costs_of: dict[tuple[str, bool], StoppingCosts] = {}
    for promise in promises:
        metric = population.scorer(promise.metric).metric
        if (metric, promise.ordered) not in costs_of:
            seen = rows.take(np.argsort(keys, kind="stable")) if promise.ordered else rows
            costs_of[metric, promise.ordered] = StoppingCosts(seen, metric, layer_costs(seen))
        costs = costs_of[metric, promise.ordered]
        rule: ExitRule | None
        if isinstance(promise.goal, Bound):
            try:
                rule, _ = control(costs, promise.goal, (), DEFAULT_MEASURES, seed)
            except InputError:
                rule = None
        else:
            if metric not in searches:
                families = make_families(costs, DEFAULT_RULES, DEFAULT_MEASURES, seed)
                searches[metric] = Search(costs, families, seed)
            rule = searches[metric].choose(promise.goal, searches[metric].kinds)
        yield promise.name, *population.truth(rule, promise.metric), rule is None


def calibrate_alone(
    population: Population, count: int, seed: int
) -> Iterator[tuple[str, float, float]]:
    """For each kind of rule, the true drop and the saving of `balanced` if only it competes."""
    rows = population.drawn(count, seed)
    costs = StoppingCosts(rows, population.scorer(None).metric, layer_costs(rows))
    search = Search(costs, make_families(costs, DEFAULT_RULES, DEFAULT_MEASURES, seed), seed)
    for kind in search.kinds:
        yield kind, *population.truth(search.choose(BALANCED, [kind]), None)


def study(path: Path, repeats: int, run: Callable[[int], Iterator[tuple[Any, ...]]]) -> None:
    """Run the calibrations that a file does not have yet, one for each seed."""
    done = len(path.read_text().splitlines()) if path.is_file() else 0
    with path.open("a", encoding="utf-8") as file:
        for seed in range(done, repeats):
            file.write(json.dumps({key: list(rest) for key, *rest in run(seed)}) + "\n")
            file.flush()


def page_of(names: Sequence[str], work: Path) -> str:
    """The page, for what has been run."""
    paths = {name: work / f"{name}-alone.jsonl" for name in names}
    alone = {name: _runs(path) for name, path in paths.items() if path.is_file()}
    return render(
        "calibration-study",
        lines=_lines(names, work),
        alone=alone,
        alone_rows=ALONE_ROWS,
        kinds=list(dict.fromkeys(kind for run in chain(*alone.values()) for kind in run)),
        outcome_alone=_outcome_alone,
    )


def _runs(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _lines(names: Sequence[str], work: Path) -> Iterator[str]:
    """The lines of the table of promises."""
    for name in names:
        oracle_path = work / f"{name}-oracle.json"
        oracles = json.loads(oracle_path.read_text()) if oracle_path.is_file() else {}
        found = {
            int(path.stem.rpartition("-")[2]): path for path in work.glob(f"{name}-*[0-9].jsonl")
        }
        for count, path in sorted(found.items()):
            runs = _runs(path)
            for promise in PROMISES:
                yield _line(name, count, promise, [run[promise.name] for run in runs], oracles)


def _line(
    name: str, count: int, promise: Promise, runs: list[Any], oracles: dict[str, float]
) -> str:
    drops, savings, refused = (np.array(column, float) for column in zip(*runs, strict=True))
    broken = int((drops > promise.allowed + 1e-9).sum())
    error = drops.std() / np.sqrt(len(drops))
    share = "-"
    if isinstance(promise.goal, Bound):
        low, high = binomial_interval(broken, len(drops))
        share = f"{100 * broken / len(drops):.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    saving, best = savings.mean(), oracles.get(promise.name, 0.0)
    of = f"{saving / best:.2f}" if best else "-"
    return (
        f"| {name} | {count} | {promise.name} | {len(drops)} | {drops.mean():.2f} ± {error:.2f} | "
        f"{share} | {100 * refused.mean():.0f} % | {saving:.3f} | {of} |"
    )


def _outcome_alone(runs: Sequence[dict[str, Any]], kind: str) -> str:
    """The mean saving and drop if only one kind of rule competes."""
    drop, saving = np.mean([run[kind] for run in runs if kind in run], axis=0)
    return f"{saving:.3f} ({drop:.2f})"


def binomial_interval(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    middle = (count + z**2 / 2) / (total + z**2)
    half = z * np.sqrt(count * (total - count) / total + z**2 / 4) / (total + z**2)
    return max(0.0, middle - half), min(1.0, middle + half)


@click.command(context_settings={"show_default": True})
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Results so far.")
@click.option("--population", "names", multiple=True, help="Default: all.")
@click.option("--rows", "sizes", multiple=True, type=int, help=f"Default: {SIZES}.")
@click.option("--repeats", type=int, help=f"Calibrations of each kind. Default: {REPEATS}.")
@click.option("--quick", is_flag=True, help="Fewer calibrations: at most an hour on two cores.")
@click.option("--page", default=PAGE, type=click.Path(path_type=Path), help="Where to write.")
@exits_with_one_line
def main(
    work: Path,
    names: tuple[str, ...],
    sizes: tuple[int, ...],
    repeats: int | None,
    quick: bool,
    page: Path,
) -> None:
    """Run what is missing, then write the table of all that has been run."""
    work.mkdir(parents=True, exist_ok=True)
    makers = populations()
    repeats = repeats or (QUICK_REPEATS if quick else REPEATS)
    for name in names or makers:
        population = Population(makers[name]())
        oracle = work / f"{name}-oracle.json"
        if not oracle.is_file():
            oracle.write_text(json.dumps({p.name: population.oracle(p) for p in PROMISES}))
        for count in sizes or (QUICK_SIZES if quick else SIZES):
            run = partial(calibrate, population, PROMISES, count)
            study(work / f"{name}-{count}.jsonl", repeats, run)
            click.echo(f"{name}, {count} rows: done", err=True)
        alone = partial(calibrate_alone, population, ALONE_ROWS)
        study(work / f"{name}-alone.jsonl", min(repeats, ALONE_REPEATS), alone)
    page.write_text(page_of(list(makers), work), encoding="utf-8")


if __name__ == "__main__":
    main()
