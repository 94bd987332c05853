#!/usr/bin/env python
"""Run one engines folder in many threads and processes for long: right answers, flat memory?

    python scripts/soak.py engines/ --input texts.txt --minutes 10 --threads 8 --processes 4

Every process has one engine that its threads share. They ask for random texts in random batches,
under the operating point in force, a rule of the call's own, or at full depth; another thread
switches the points meanwhile. Each answer is held against that of one thread alone: labels, exit,
and probabilities within a tolerance. A row whose answer lies that close to a threshold is counted
apart, as in verification. Memory is judged after warm-up: its median in the last fifth of the
time may exceed that in the second fifth by at most 5 %, or 32 MiB if that is more. So that it is
the memory in use, glibc is told to give freed buffers back (`MALLOC_MMAP_THRESHOLD_`, unless it
is set already): otherwise its heaps, one a thread, go on filling with gaps (measured: by a tenth
in these 10 minutes). Exit code 1: a wrong answer, an error, or memory that grows.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from soak_process import Outcome, Plan, soak
from soak_reference import Reference, reference_of

from fpabee.runtime import FpabeeError
from fpabee.runtime.environment import environment
from fpabee.runtime.files import read_rows

MIB = 2**20
MOST_GROWTH = 0.05
LEAST_GROWTH = 32 * MIB
_GIVEN_BACK = 2**16


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
