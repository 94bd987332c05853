"""One process of the soak: an engine, threads that ask it, and one that switches its points."""

from __future__ import annotations

import resource
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from soak_reference import FULL_DEPTH, Reference

from fpabee.runtime import Engine, Prediction
from fpabee.runtime.encoding import Text

_LARGEST_BATCH = 16
_SWITCH_SECONDS = 0.05
_SAMPLES = 200
_MOST_SHOWN = 5


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
        switch = Switch(engine, [name for name in reference.rules if name != FULL_DEPTH])
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
                names = {FULL_DEPTH}
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
