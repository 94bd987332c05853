"""Asks one engine from many threads: are all answers right, and does memory stay flat?

The threads ask for random texts in random batches, under the rule of an operating point, at full
depth, or under the point in force, which is switched meanwhile. Each answer is compared with that
of a single thread: labels, exit, and probabilities within a tolerance. An answer that changes when
the logits change by that tolerance is not compared.
"""

from __future__ import annotations

import statistics
import threading
import time
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fpabee.runtime import Budget, Engine, ExitRule, Prediction
from fpabee.runtime.agreement import exits_near_ties, near_ties

from ..child_process import MIB, Child, Report, memory_of

FULL_DEPTH = "full depth"
_TOLERANCE = 1e-4
_SAMPLES = 200
# Growth of memory after warming up that is not reported: a share, or bytes if that is more.
_GROWTH = 0.05, 32 * MIB


class Reference:
    """What a single thread answers, by the name of the rule: an operating point, or full depth."""

    def __init__(self, engine: Engine, texts: Sequence[str]) -> None:
        points = engine.manifest.targets[engine.target].operating_points
        self.texts = texts
        self.rules = {name: ExitRule.from_dict(point.rule) for name, point in points.items()}
        self.rules[FULL_DEPTH] = Budget(exit=len(engine.manifest.segments))
        self.answers = {n: engine.predict(texts, rule=rule) for n, rule in self.rules.items()}
        logits, task = engine.trace(texts).logits, engine.manifest.task
        labels = near_ties(logits, task, _TOLERANCE).any(axis=0)
        self.unsure: dict[str, set[int]] = {}
        for name, rule in self.rules.items():
            unsure = labels | exits_near_ties(logits, rule, task, _TOLERANCE)
            self.unsure[name] = {*np.flatnonzero(unsure).tolist()}

    def wrong(
        self, names: Collection[str], rows: Sequence[int], found: Sequence[Prediction]
    ) -> str:
        """What is wrong with the answers of a call that ran under one of several rules."""
        wrong = [self._wrong(name, rows, found) for name in names]
        return "" if "" in wrong else wrong[0]

    def _wrong(self, name: str, rows: Sequence[int], found: Sequence[Prediction]) -> str:
        for row, answer in zip(rows, found, strict=True):
            right = self.answers[name][row]
            same = (answer.labels, answer.exit) == (right.labels, right.exit) and np.allclose(
                answer.probabilities, right.probabilities, rtol=0, atol=_TOLERANCE
            )
            if not same and row not in self.unsure[name]:
                return f"under {name}: {self.texts[row]!r} gives {answer}, expected {right}"
        return ""


def ask(
    engine: Engine, reference: Reference, seconds: float, threads: int, seed: int = 0
) -> tuple[list[str], list[int]]:
    """Ask an engine from many threads; returns what went wrong, and the memory over time."""
    ends, calls = time.monotonic() + seconds, [0] * threads
    points = [name for name in reference.rules if name != FULL_DEPTH]
    problems, memory = list[str](), list[int]()

    def run(number: int) -> None:
        random = Random(f"{seed} {number}")
        try:
            while time.monotonic() < ends:
                rows = random.choices(range(len(reference.texts)), k=random.randint(1, 16))
                texts = [reference.texts[row] for row in rows]
                names = random.choice((points, [random.choice(list(reference.rules))]))
                rule = reference.rules[names[0]] if len(names) == 1 else None
                if wrong := reference.wrong(names, rows, engine.predict(texts, rule=rule)):
                    problems.append(wrong)
                calls[number] += 1
        # Whatever it is, it is to be reported.
        except Exception:  # noqa: BLE001
            problems.append(traceback.format_exc())

    engine.use(points[0])
    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    while time.monotonic() < ends:
        memory.append(memory_of("VmRSS"))
        engine.use(points[len(memory) % len(points)])
        time.sleep(seconds / _SAMPLES)
    for worker in workers:
        worker.join()
    return problems if all(calls) else [*problems, "a thread answered nothing"], memory


def soak(
    engines: Path, texts: Sequence[str], seconds: float, threads: int, processes: int
) -> list[str]:
    """Ask several engines, each in a process of its own; returns what went wrong.

    Args:
        engines: an engines folder with at least two operating points.
        texts: what to ask for.
        seconds: for how long.
        threads: of each process.
        processes: at the same time.
    """
    arguments = {"engines": str(engines.absolute()), "texts": texts, "threads": threads}
    children = [
        Child(_soak_here, **arguments, seconds=seconds, seed=seed) for seed in range(processes)
    ]
    problems: list[str] = []
    for ended in [child.wait(seconds + 120) for child in children]:
        problems += [ended.failure] if ended.failure else ended.reports[0]
    return problems


def _soak_here(report: Report, engines: str, texts: list[str], **how: Any) -> None:
    with Engine.load(engines, threads=1) as engine:
        problems, memory = ask(engine, Reference(engine, texts), **how)
    report([*problems[:5], *growth(memory)])


def growth(samples: Sequence[int]) -> list[str]:
    """What is wrong with the memory: its growth from the second to the last fifth of the time."""
    fifth = max(1, len(samples) // 5)
    warm, last = (
        statistics.median(part) for part in (samples[fifth:][:fifth] or samples, samples[-fifth:])
    )
    share, size = _GROWTH
    if last - warm <= max(share * warm, size):
        return []
    return [f"memory grew from {warm / MIB:.0f} to {last / MIB:.0f} MiB"]
