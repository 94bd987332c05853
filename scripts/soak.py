#!/usr/bin/env python
"""Run one engines folder in many threads and processes for long: right answers, flat memory?

    python scripts/soak.py engines/ --input texts.txt --minutes 10 --threads 8 --processes 4

Every process has one engine that its threads share. They ask for random texts in random batches,
under the operating point in force, a rule of the call's own, or at full depth; another thread
switches the points meanwhile. Each answer is held against that of one thread alone: labels, exit,
and probabilities within `TOLERANCE`. A row whose answer lies that close to a threshold is counted
apart, as in verification. Memory is judged after warm-up: its median in the last fifth of the
time may exceed that in the second fifth by at most 5 %, or 32 MiB if that is more. So that it is
the memory in use, glibc is told to give freed buffers back (`MALLOC_MMAP_THRESHOLD_`, unless it
is set already): otherwise its heaps, one a thread, fill with gaps for hours. Exit code 1: a wrong
answer, an error, or memory that grows.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from fpabee.runtime import Budget, Engine, ExitRule, FpabeeError, Prediction
from fpabee.runtime.agreement import exit_agreement, near_ties
from fpabee.runtime.encoding import Text
from fpabee.runtime.environment import environment
from fpabee.runtime.text_io import read_rows

TOLERANCE = 1e-4
MIB = 2**20
MOST_GROWTH = 0.05
LEAST_GROWTH = 32 * MIB
_LARGEST_BATCH = 16
_SWITCH_SECONDS = 0.05
_SAMPLES = 200
_GIVEN_BACK = 2**16
_FULL_DEPTH = "full depth"
_MOST_SHOWN = 5


@dataclass(frozen=True)
class Answer:
    """What one thread says of a text under a rule.

    Attributes:
        labels: the predicted labels.
        exit: the exit that answered.
        probabilities: of all labels.
        near: whether a difference within tolerance may change the exit or the labels.
    """

    labels: tuple[str, ...]
    exit: int
    probabilities: tuple[float, ...]
    near: bool

    def agrees(self, found: Prediction) -> bool:
        """Whether a prediction is this one."""
        return (
            found.exit == self.exit
            and found.labels == self.labels
            and np.allclose(found.probabilities, self.probabilities, rtol=0, atol=TOLERANCE)
        )


@dataclass(frozen=True)
class Reference:
    """Texts, and the answers of one thread.

    Attributes:
        texts: the texts.
        rules: rules by name: the operating points, and full depth.
        answers: by rule, one for each text.
    """

    texts: tuple[Text, ...]
    rules: dict[str, ExitRule]
    answers: dict[str, tuple[Answer, ...]]


@dataclass(frozen=True)
class Plan:
    """What a process does.

    Attributes:
        engines: the engines folder.
        seconds: for how long.
        threads: that ask.
        seed: of chance.
    """

    engines: Path
    seconds: float
    threads: int
    seed: int


@dataclass
class Outcome:
    """What happened in a process.

    Attributes:
        rows: answers that were compared.
        near: of them, other than the reference, but too close to a threshold to tell.
        wrong: of them, other than the reference.
        switches: of the operating point.
        errors: wrong answers in words, and tracebacks; the first of each thread.
        rss: resident memory in bytes, sampled evenly over the time.
    """

    rows: int = 0
    near: int = 0
    wrong: int = 0
    switches: int = 0
    errors: list[str] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)

    def count(
        self,
        reference: Reference,
        rows: Sequence[int],
        found: Sequence[Prediction],
        names: Collection[str],
    ) -> None:
        """Compare the answers of a call.

        Args:
            reference: the right ones.
            rows: which texts were asked.
            found: their answers.
            names: rules one of which the call ran under, the same for all its rows.
        """
        self.rows += len(found)
        unlike = {
            name: [
                (row, answer, reference.answers[name][row])
                for row, answer in zip(rows, found, strict=True)
                if not reference.answers[name][row].agrees(answer)
            ]
            for name in names
        }
        name = min(unlike, key=lambda name: sum(not right.near for *_, right in unlike[name]))
        for row, answer, right in unlike[name]:
            if right.near:
                self.near += 1
                continue
            self.wrong += 1
            if len(self.errors) < _MOST_SHOWN:
                self.errors.append(
                    f"under {name}: {reference.texts[row]!r} gives {answer}, expected {right}"
                )


def reference_of(engines: Path, texts: Sequence[Text]) -> Reference:
    """The answers of one thread, for every operating point and at full depth.

    Raises:
        FpabeeError: the folder cannot be run.
    """
    with Engine.load(engines, threads=1) as engine:
        points = engine.manifest.targets[engine.target].operating_points
        rules = {name: ExitRule.from_dict(point.rule) for name, point in points.items()}
        rules[_FULL_DEPTH] = Budget(exit=len(engine.manifest.segments))
        logits = engine.trace(texts).logits
        task = engine.manifest.task.problem_type
        ties = near_ties(logits, task, TOLERANCE)
        answers = {}
        for name, rule in rules.items():
            unsure = exit_agreement(logits, logits, rule, task, TOLERANCE)[1]
            answers[name] = tuple(
                Answer(p.labels, p.exit, p.probabilities, bool(near or ties[p.exit - 1, row]))
                for row, (p, near) in enumerate(
                    zip(engine.predict(texts, rule=rule), unsure, strict=True)
                )
            )
        return Reference(tuple(texts), rules, answers)


class Switch:
    """The operating point of an engine, and which ones a call may have begun under."""

    def __init__(self, engine: Engine, names: Sequence[str]) -> None:
        self._engine = engine
        self._names = names
        self._begun = [names[0]]
        self._done = 1
        engine.use(names[0])

    @property
    def switches(self) -> int:
        """How often it was switched."""
        return self._done - 1

    def next(self, random: Random) -> None:
        """Switch to a point."""
        self._begun.append(random.choice(self._names))
        self._engine.use(self._begun[-1])
        self._done += 1

    def stream(self, texts: Sequence[Text]) -> tuple[list[Prediction], set[str]]:
        """Answers under the point in force, and the points that may have been that one.

        An engine binds the point before it takes the first text.
        """
        first, last = self._done - 1, []

        def noted() -> Iterator[Text]:
            last.append(len(self._begun))
            yield from texts

        found = list(self._engine.stream(noted()))
        return found, set(self._begun[first : last[0]])


def soak(plan: Plan, reference: Reference) -> Outcome:
    """Ask one engine from many threads, until the time is over."""
    random = Random(plan.seed)
    outcomes = [Outcome() for _ in range(plan.threads)]
    ends = time.monotonic() + plan.seconds
    with Engine.load(plan.engines, threads=1) as engine:
        switch = Switch(engine, [name for name in reference.rules if name != _FULL_DEPTH])
        threads = [
            threading.Thread(
                target=_ask, args=(engine, switch, reference, ends, Random(random.random()), mine)
            )
            for mine in outcomes
        ]
        for thread in threads:
            thread.start()
        samples = [resident()]
        while (left := ends - time.monotonic()) > 0:
            switch.next(random)
            if left < plan.seconds * (1 - len(samples) / _SAMPLES):
                samples.append(resident())
            time.sleep(min(left, _SWITCH_SECONDS))
        for thread in threads:
            thread.join()
    return Outcome(
        rows=sum(mine.rows for mine in outcomes),
        near=sum(mine.near for mine in outcomes),
        wrong=sum(mine.wrong for mine in outcomes),
        switches=switch.switches,
        errors=[error for mine in outcomes for error in mine.errors],
        rss=samples,
    )


def _ask(
    engine: Engine,
    switch: Switch,
    reference: Reference,
    ends: float,
    random: Random,
    mine: Outcome,
) -> None:
    """What a thread does: random batches, each under one of three kinds of rule."""
    try:
        while time.monotonic() < ends:
            rows = random.choices(range(len(reference.texts)), k=random.randint(1, _LARGEST_BATCH))
            texts = [reference.texts[row] for row in rows]
            kind = random.randrange(4)
            if kind == 0:
                names = {_FULL_DEPTH}
                found = engine.predict(texts, full_depth=True)
            elif kind == 1:
                names = {random.choice(list(reference.rules))}
                found = engine.predict(texts, rule=reference.rules[next(iter(names))])
            else:
                found, names = switch.stream(texts)
            mine.count(reference, rows, found, names)
    # Whatever it is, it is to be reported.
    except Exception:  # noqa: BLE001
        mine.errors.append(traceback.format_exc())


def resident() -> int:
    """Resident memory of this process in bytes; without Linux's /proc its peak."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def growth(samples: Sequence[int]) -> tuple[float, float]:
    """Median of the second fifth and of the last fifth of evenly spaced samples."""
    fifth = max(1, len(samples) // 5)
    return statistics.median(samples[fifth : 2 * fifth] or samples), statistics.median(
        samples[-fifth:]
    )


def grows(samples: Sequence[int]) -> bool:
    """Whether memory grew beyond what warming up explains."""
    warm, last = growth(samples)
    return last - warm > max(MOST_GROWTH * warm, LEAST_GROWTH)


def run(plan: Plan, processes: int, reference: Reference) -> list[Outcome]:
    """Soak in several processes at once; one that dies is an outcome with an error."""
    outcomes = []
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(_GIVEN_BACK))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        plans = [replace(plan, seed=plan.seed + number) for number in range(processes)]
        for future in [pool.submit(soak, one, reference) for one in plans]:
            try:
                outcomes.append(future.result())
            except (FpabeeError, BrokenProcessPool) as error:
                outcomes.append(Outcome(errors=[f"the process ended: {error}"]))
    return outcomes


def problems(outcomes: Sequence[Outcome]) -> list[str]:
    """What went wrong, one line each."""
    found = []
    for number, outcome in enumerate(outcomes, start=1):
        found += [f"process {number}: {error}" for error in outcome.errors]
        if outcome.wrong:
            found.append(f"process {number}: {outcome.wrong} of {outcome.rows} answers are wrong")
        if outcome.rss and grows(outcome.rss):
            warm, last = (f"{size / MIB:.0f}" for size in growth(outcome.rss))
            found.append(f"process {number}: memory grew from {warm} to {last} MiB")
        if not outcome.rows:
            found.append(f"process {number} answered nothing")
    return found


def report(plan: Plan, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The figures, for JSON."""
    processes = []
    for outcome in outcomes:
        warm, last = growth(outcome.rss) if outcome.rss else (0, 0)
        processes.append(
            {
                "rows": outcome.rows,
                "rows_per_second": round(outcome.rows / plan.seconds, 1),
                "near_threshold": outcome.near,
                "wrong": outcome.wrong,
                "switches": outcome.switches,
                "rss_start_mib": round(outcome.rss[0] / MIB, 1) if outcome.rss else 0,
                "rss_warm_mib": round(warm / MIB, 1),
                "rss_end_mib": round(last / MIB, 1),
            }
        )
    return {
        "seconds": plan.seconds,
        "threads": plan.threads,
        "rows": sum(outcome.rows for outcome in outcomes),
        "processes": processes,
        "problems": problems(outcomes),
        "environment": environment(),
    }


def table(content: dict[str, Any]) -> Table:
    """The figures, a line a process."""
    columns = list(content["processes"][0])
    shown = Table("", *(name.replace("_", " ") for name in columns))
    for number, process in enumerate(content["processes"], start=1):
        shown.add_row(str(number), *(f"{process[name]:g}" for name in columns))
    return shown


@click.command()
@click.argument("engines", type=click.Path(path_type=Path))
@click.option("--input", "source", required=True, help="Texts, in any format of fpabee-run.")
@click.option("--minutes", default=10.0, show_default=True, help="For how long.")
@click.option("--threads", default=8, show_default=True, help="Of each process.")
@click.option("--processes", default=4, show_default=True, help="At once.")
@click.option("--texts", "most", default=500, show_default=True, help="The first texts are used.")
@click.option("--seed", default=1, show_default=True, help="Of chance.")
def main(
    engines: Path, source: str, minutes: float, threads: int, processes: int, most: int, seed: int
) -> None:
    """Run ENGINES in many threads and processes: a table on stderr, JSON on stdout."""
    console = Console(stderr=True, highlight=False)
    plan = Plan(engines, minutes * 60, threads, seed)
    try:
        reference = reference_of(engines, [row.content for row in islice(read_rows(source), most)])
    except FpabeeError as error:
        sys.exit(f"error: {error}")
    if len(reference.rules) < 3:
        sys.exit(f"error: {engines} has no two operating points to switch -> fpabee-calibrate")
    content = report(plan, run(plan, processes, reference))
    console.print(table(content))
    click.echo(json.dumps(content, indent=2))
    if content["problems"]:
        sys.exit("\n".join(f"error: {problem}" for problem in content["problems"]))


if __name__ == "__main__":
    main()
