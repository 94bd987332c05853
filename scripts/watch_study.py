#!/usr/bin/env python
"""Does the alarm of a watched promise keep what it says? Simulations on logits of real models.

    python scripts/watch_study.py > scripts/results/watch.md

For each file of `scripts/logits/`, dev and test rows together, a threshold of confidence is chosen
at which about 1 % of the answers change, and exactly this rate is permitted. Watched rows are drawn
with replacement. In a life at the permitted rate, each row is as probable as any other, so every
alarm is false. In traffic that has changed, rows whose answer changes are two or three times as
frequent. The columns are

- rate: the permitted rate, in percent,
- false alarms: lives with an alarm within 20,000 watched rows at the permitted rate,
- from the start: the median number of watched rows until the alarm, if traffic is like that from
  the first row on,
- after 10,000: the same from the change on, if it comes after 10,000 rows at the permitted rate;
  lives with a false alarm before count with 0 rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from fpabee.runtime import Confidence, ProblemType, simulate
from fpabee.runtime.watch import FALSE_ALARM, RateTest

LOGITS = Path(__file__).parent / "logits"
RATE = 0.01
ROWS = 20_000
BEFORE = 10_000
TIMES = (2, 3)
# Longer than any delay that is expected.
MOST_ROWS = 50_000


def changed_rows(path: Path) -> NDArray[np.bool_]:
    """Whether the answer of each row changes, at the threshold nearest to the rate."""
    with np.load(path) as arrays:
        parts = [arrays["dev_logits"], arrays["test_logits"]]
        labels = arrays["dev_labels"]
    logits = np.concatenate(parts, axis=1).astype(np.float32)
    single = labels.ndim == 1
    task = ProblemType.SINGLE_LABEL if single else ProblemType.MULTI_LABEL
    last = simulate(logits[-1:], Confidence(threshold=1.0), task).predictions
    changed = []
    for uncertainty in np.geomspace(1e-4, 0.5, 200):
        early = simulate(logits, Confidence(threshold=1 - uncertainty), task).predictions
        different = early != last
        changed.append(different if single else different.any(axis=1))
    return min(changed, key=lambda rows: abs(rows.mean() - RATE))


def rows_until_alarm(test: RateTest, changed: Iterator[bool], most: int) -> float:
    """How many more rows a test sees until it gives an alarm; infinity if it gives none."""
    for number in range(most):
        if test.is_broken:
            return number
        test.add(next(changed))
    return most if test.is_broken else np.inf


def traffic(coin: np.random.Generator, rate: float) -> Iterator[bool]:
    """Whether the answers of rows change, one row after another."""
    while True:
        yield from (coin.random(1000) < rate).tolist()


def row_of(name: str, changed: NDArray[np.bool_], lives: int) -> str:
    """A row of the table."""
    rate = float(changed.mean())
    coin = np.random.default_rng(0)
    alarms = 0
    from_start: dict[int, list[float]] = {times: [] for times in TIMES}
    from_change: dict[int, list[float]] = {times: [] for times in TIMES}
    for _ in range(lives):
        test = RateTest(rate, FALSE_ALARM)
        usual = traffic(coin, rate)
        rows_until_alarm(test, usual, BEFORE)
        for times in TIMES:
            more = traffic(coin, times * rate)
            new = RateTest(rate, FALSE_ALARM)
            from_start[times].append(rows_until_alarm(new, more, MOST_ROWS))
            from_change[times].append(rows_until_alarm(copy.deepcopy(test), more, MOST_ROWS))
        alarms += rows_until_alarm(test, usual, ROWS - BEFORE) < np.inf
    delays = [
        f"{np.median(each[times]):,.0f}" for times in TIMES for each in (from_start, from_change)
    ]
    return f"| {name} | {100 * rate:.2f} | {alarms} of {lives:,} | {' | '.join(delays)} |"


@click.command()
@click.option("--lives", default=1000, show_default=True, help="Lives of each population.")
def main(lives: int) -> None:
    """Print the table."""
    click.echo(
        "# The alarm of a watched promise\n\nFrom `scripts/watch_study.py`, which explains it.\n"
    )
    click.echo(
        "| logits | rate | false alarms | twice the rate, from the start | after 10,000 "
        "| three times, from the start | after 10,000 |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    for path in sorted(LOGITS.glob("*.npz")):
        click.echo(row_of(path.stem, changed_rows(path), lives))


if __name__ == "__main__":
    main()
