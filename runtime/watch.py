"""Watch a promise in traffic: which rows run on to full depth, the test, and what it shows.

A guarantee about changed answers holds for texts like those that certified it. Watching tests it on
the texts of today: a few rows, chosen by a coin on arrival, are answered at their exit as always,
and then run on to full depth, after all other rows. What counts is whether the decision of the two
differs. The promise compares with the classifier that the folder was converted from, so what must
not be exceeded is the promise plus what this target itself changes at full depth, see
`Certificate.full_depth_changes`.
"""

from __future__ import annotations

import logging
import math
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from .artifact.exits import Exits, exits_of
from .artifact.manifest import Manifest
from .artifact.operating_point import OperatingPoint
from .artifact.quick import exits_of_point
from .errors import InputError, RuleError
from .rules.measures import Integers
from .tasks import task_of

logger = logging.getLogger(__name__)

FALSE_ALARM = 0.001
"""The probability of a false alarm in the life of a process, for all points of a target."""
MOST_WAITING = 64
"""While so many rows are answered and wait to run on, no further rows are chosen."""
_CONFIDENCE = 0.95
# The bets, as multiples of the permitted odds.
_ODDS = (1.5, 2.0, 3.0, 6.0)
_ROWS_OF_A_START = 100
# The depth at calibration counts like that of so many rows.
_ROWS_OF_CALIBRATION = 100


class RateTest:
    """Tests after every row whether a rate is above what is permitted.

    A bet on the rate q multiplies its stake by q / p if a row is changed, and by (1 - q) / (1 - p)
    if not, where p is the permitted rate. This is the capital process of Waudby-Smith and Ramdas
    (arXiv 2010.09686) with the stake (q - p) / (p (1 - p)): if no row is changed with a probability
    above p, whatever the rows before it were, no bet is expected to gain. Capital is divided
    equally among several q > p.

    A bet that began long ago has lost much when a rate rises late. So new bets begin every 100
    rows, as in the e-detectors of Shin, Ramdas and Rinaldo (arXiv 2203.03532); start k gets
    1 / (k (k + 1)) of the capital, which is 1 in total. By Ville's inequality, the probability that
    the capital ever reaches 1 / `level` is at most `level`.

    Args:
        permitted: the rate, above 0 and below 1.
        level: the probability of a false alarm, over all times.

    Attributes:
        rows: how many rows were added.
        changed: how many of them were changed.
        is_broken: whether the rate was above what is permitted; it stays so.
    """

    def __init__(self, permitted: float, level: float) -> None:
        odds = [each * permitted / (1 - permitted) for each in _ODDS]
        rates = [each / (1 + each) for each in odds]
        self._if_changed = [rate / permitted for rate in rates]
        self._if_not = [(1 - rate) / (1 - permitted) for rate in rates]
        self._enough = 1 / level
        # Bets on the same rate have the same gains, whenever they began.
        self._bets = [0.0] * len(rates)
        self._not_begun = 1.0
        self.rows = 0
        self.changed = 0
        self.is_broken = False

    def add(self, is_changed: bool) -> None:
        """Add the next row."""
        if self.rows % _ROWS_OF_A_START == 0:
            start = 1 + self.rows // _ROWS_OF_A_START
            part = 1 / (start * (start + 1)) / len(self._bets)
            self._bets = [bet + part for bet in self._bets]
            self._not_begun = 1 / (start + 1)
        self.rows += 1
        self.changed += is_changed
        factors = self._if_changed if is_changed else self._if_not
        self._bets = [bet * factor for bet, factor in zip(self._bets, factors, strict=True)]
        if sum(self._bets) + self._not_begun >= self._enough:
            self.is_broken = True
            # Nothing more is to be shown, and the numbers stay finite.
            self._bets = [0.0] * len(self._bets)

    def interval(self) -> tuple[float, float]:
        """The 95 % confidence sequence of the rate: it holds at all times together.

        It has the rates p at which, for x of n rows, B(x + 1/2, n - x + 1/2) / B(1/2, 1/2) is less
        than 20 times p^x (1 - p)^(n - x), where B is the beta function. The ratio is the likelihood
        under a beta mixture over that under p. It is a martingale if the rate is p (Robbins 1970;
        Howard, Ramdas, McAuliffe and Sekhon, arXiv 1810.08240), so Ville's inequality holds.
        """
        rest = self.rows - self.changed
        mixture = math.lgamma(self.changed + 0.5) + math.lgamma(rest + 0.5)
        mixture -= math.lgamma(self.rows + 1) + 2 * math.lgamma(0.5)
        least = mixture + math.log(1 - _CONFIDENCE)

        def fits(rate: float) -> bool:
            return self.changed * math.log(rate) + rest * math.log1p(-rate) > least

        estimate = self.changed / max(1, self.rows)
        low = _edge(fits, estimate, 0.0) if self.changed else 0.0
        high = _edge(fits, estimate, 1.0) if rest else 1.0
        return low, high


def _edge(fits: Callable[[float], bool], inside: float, outside: float) -> float:
    """Between a number that fits and one that does not, the last that fits."""
    for _ in range(50):
        middle = (inside + outside) / 2
        if fits(middle):
            inside = middle
        else:
            outside = middle
    return inside


@dataclass(frozen=True)
class Watched:
    """The result of watching the promise of an operating point, since the engine was loaded.

    Attributes:
        operating_point: the point in use.
        permitted: the share of changed answers that must not be exceeded, from 0 to 1: the promise
            plus `Certificate.full_depth_changes`.
        row_share: the share of rows that is chosen, which follows from the depth of the rows.
        rows: how many watched rows have run to full depth.
        changed_answers: how many of them were answered otherwise than at full depth.
        interval: a 95 % confidence sequence for the share of changed answers, if it is the same
            for all rows: it may be looked at at any time.
        is_paused: whether no rows are chosen, because 64 wait to run on.
        is_broken: whether the promise does not hold, at least not for the rows of late, so the
            interval may be below what is permitted. If it holds, this is reported with a
            probability of at most 0.1 % in the life of a process, however often it is looked at.
    """

    operating_point: str
    permitted: float
    row_share: float
    rows: int
    changed_answers: int
    interval: tuple[float, float]
    is_paused: bool
    is_broken: bool

    @property
    def estimate(self) -> float:
        """The share of changed answers, from 0 to 1; NaN before the first row."""
        return self.changed_answers / self.rows if self.rows else math.nan


@dataclass(eq=False)
class _Promise:
    """The promise of one operating point, and its rows.

    Attributes:
        operating_point: its name.
        test: the test.
        permitted: the permitted rate.
        mean_depth: layers that ran for a row at calibration.
        exits: those that its rows see.
        goes_on: whether rows that have stopped go on to full depth where they are; otherwise, they
            start again, in another target.
        label_thresholds: what decides, see `decision_thresholds`.
        rows: those that were chosen and are not tested yet, in the order of their arrival. A row
            whose answer did not change may be known earlier than one before it, and would spoil the
            order by which the test is exact.
    """

    operating_point: str
    test: RateTest
    permitted: float
    mean_depth: float
    exits: Exits
    goes_on: bool
    label_thresholds: tuple[float, ...]
    rows: deque[WatchedRow] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class WatchedRow:
    """A row that was chosen to be watched.

    Attributes:
        watch: what chose it.
        promise: what it tests.
        answer: the logits that answered it; None: it is not answered yet.
        is_done: whether nothing more happens to it.
        is_changed: whether the answer differs from that at full depth; None: it is not known.
    """

    watch: Watch
    promise: _Promise
    answer: NDArray[np.float32] | None = None
    is_done: bool = False
    is_changed: bool | None = None

    def stopped(self, exit_number: int, logits: NDArray[np.float32]) -> bool:
        """Take the logits `[labels]` of its exit, and later those at full depth.

        Returns:
            Whether the row has to run on to full depth.
        """
        return self.watch.stopped(self, exit_number, logits)

    def lost(self) -> None:
        """Nothing will be known about it, if it is not known already."""
        self.watch.lost(self)


class Watch:
    """Chooses rows, and tests the promise of the operating point by which they ran. Thread-safe.

    Args:
        manifest: that of the engines folder.
        target: the target in use.
        percent: how much of the layers that run may be spent on watching.
        operating_point: the point in use; None: there is none.

    Raises:
        InputError: `percent` is not a number above 0 and up to 100.
        RuleError: the point promises nothing about changed answers, or the model ranks documents.
    """

    def __init__(
        self, manifest: Manifest, target: str, percent: float, operating_point: str | None
    ) -> None:
        is_number = isinstance(percent, Real) and not isinstance(percent, bool)
        if not is_number or not 0 < percent <= 100:
            raise InputError(
                f"watch is {percent!r}", "give `watch` as a percentage above 0 and up to 100"
            )
        self._task = task_of(manifest.task)
        if self._task.compares:
            raise RuleError(
                f"this model {self._task.does}, and only answers of classification are watched",
                "leave out `watch`",
            )
        points = manifest.targets[target].operating_points
        rates = {name: rate for name, point in points.items() if (rate := _permitted(point))}
        if operating_point not in rates:
            what = "a rule that is no operating point"
            if operating_point is not None:
                what = f"operating point {operating_point!r} of target {target}"
            raise RuleError(
                f"{what} promises nothing about changed answers, so there is nothing to watch",
                f"give an `operating_point` that does ({', '.join(rates) or 'none yet'}), "
                "calibrate for changed answers, or leave out `watch`",
            )
        self._promises = {
            name: _promise(manifest, name, points[name], rate, FALSE_ALARM / len(rates))
            for name, rate in rates.items()
        }
        # Layers for watching that each layer for an answer pays for.
        share = float(percent) / 100
        self._pays = share / max(1 - share, 1e-9)
        # This runs for every row, so it is plain Python: a call of numpy costs more than a coin.
        self._layers = manifest.exit_layers[-1]
        self._coin = random.Random()
        self._lock = threading.RLock()  # who is told of an alarm may ask what is known
        self._waiting = 0
        self._answered = 0
        self._layers_for_answers = 0
        self._layers_for_watching = 0

    def choose(self, operating_point: str | None, rows: int) -> NDArray[np.object_]:
        """Toss a coin for each of some rows that have arrived.

        Returns:
            `[rows]` a `WatchedRow`, or None for rows that are not watched.
        """
        chosen = np.full(rows, None)
        promise = self._promises.get(operating_point or "")
        if promise is None:
            return chosen
        with self._lock:
            if self._waiting < MOST_WAITING:
                probability = self._probability(promise, rows)
                for place in range(rows):
                    if self._coin.random() < probability:
                        chosen[place] = WatchedRow(self, promise)
                        promise.rows.append(chosen[place])
                        # Until it has stopped, it may be one that stops before layer 1.
                        self._layers_for_watching += self._layers
        return chosen

    def ran(self, numbers: Integers, exits: Exits) -> None:
        """Count the layers of rows that were answered.

        Args:
            numbers: `[rows]` the numbers of their exits.
            exits: the exits that they have seen.
        """
        first = exits.first
        layers_ran = exits.layers_ran
        layers = sum(layers_ran[number - first] for number in numbers.tolist())
        with self._lock:
            self._answered += len(numbers)
            self._layers_for_answers += layers

    def stopped(self, row: WatchedRow, exit_number: int, logits: NDArray[np.float32]) -> bool:
        """See `WatchedRow.stopped`."""
        with self._lock:
            if row.is_done:
                return False
            if row.answer is None:
                exits = row.promise.exits
                rest = exits.layers_left[exit_number - exits.first]
                self._layers_for_watching -= self._layers - rest
                row.answer = logits.copy()  # not a view, which would hold those of other rows
                self._waiting += 1
                if exit_number < exits.last:
                    return True
            both = self._task.outputs(np.stack([row.answer, logits]))
            thresholds = row.promise.label_thresholds
            early, late = both.decisions(thresholds)
            self._done(row, not self._task.same_decisions(early, late, thresholds))
        return False

    def lost(self, row: WatchedRow) -> None:
        """See `WatchedRow.lost`."""
        with self._lock:
            if not row.is_done:
                self._done(row, None)

    def watched(self, operating_point: str | None) -> Watched | None:
        """The result for the promise of a point; None: it promises nothing to watch."""
        promise = self._promises.get(operating_point or "")
        if promise is None:
            return None
        with self._lock:
            return Watched(
                operating_point=promise.operating_point,
                permitted=promise.permitted,
                row_share=self._row_share(promise),
                rows=promise.test.rows,
                changed_answers=promise.test.changed,
                interval=promise.test.interval(),
                is_paused=self._waiting >= MOST_WAITING,
                is_broken=promise.test.is_broken,
            )

    def _mean_rest(self, promise: _Promise) -> float:
        """The layers that a row runs to full depth after it has stopped, on average."""
        ran = self._mean_depth(promise) if promise.goes_on else 0.0
        return self._layers - ran

    def _mean_depth(self, promise: _Promise) -> float:
        known = promise.mean_depth * _ROWS_OF_CALIBRATION
        return (known + self._layers_for_answers) / (_ROWS_OF_CALIBRATION + self._answered)

    def _row_share(self, promise: _Promise) -> float:
        """The share of rows that spends what may be spent, if each costs the mean of the rest."""
        depth = self._mean_depth(promise)
        rest = self._mean_rest(promise)
        return min(1.0, self._pays * depth / rest) if rest > 0 else 1.0

    def _probability(self, promise: _Promise, rows: int) -> float:
        """That of the coin: what is left to spend, and at most twice what may be spent on average.

        It depends only on the depth of earlier rows, not on whether their answers changed.
        """
        depth = self._mean_depth(promise)
        rest = self._mean_rest(promise)
        if rest <= 0:
            return 1.0
        paid = self._pays * (self._layers_for_answers + rows * depth)
        left = max(0.0, paid - self._layers_for_watching)
        return min(left / (rows * rest) if rows else 0.0, 2 * self._row_share(promise))

    def _done(self, row: WatchedRow, is_changed: bool | None) -> None:
        """Nothing more happens to a row; test those before which all others are done."""
        row.is_done = True
        row.is_changed = is_changed
        self._waiting -= row.answer is not None
        row.answer = None
        promise = row.promise
        was_broken = promise.test.is_broken
        while promise.rows and promise.rows[0].is_done:
            result = promise.rows.popleft().is_changed
            if result is not None:
                promise.test.add(result)
        if promise.test.is_broken and not was_broken:
            logger.warning(
                "the promise of operating point %s does not hold for these texts: %d of %d watched "
                "rows changed their answer, and %.2f %% are permitted; calibrate again with texts "
                "of today",
                promise.operating_point,
                promise.test.changed,
                promise.test.rows,
                100 * promise.permitted,
            )


def _permitted(point: OperatingPoint) -> float | None:
    """The rate of changed answers that a point permits; None: it promises nothing to watch."""
    if point.certificate is None:
        return None
    for promise in point.certificate.promises:
        rate = (promise.at_most + point.certificate.full_depth_changes) / 100
        if promise.of == "changed_answers" and 0 < rate < 1:
            return rate
    return None


def _promise(
    manifest: Manifest, name: str, point: OperatingPoint, rate: float, level: float
) -> _Promise:
    assert point.certificate is not None
    exits = exits_of_point(manifest, point)
    return _Promise(
        operating_point=name,
        test=RateTest(rate, level),
        permitted=rate,
        mean_depth=point.mean_depth,
        exits=exits,
        goes_on=exits == exits_of(manifest),
        label_thresholds=task_of(manifest.task).decision_thresholds(
            point.certificate.label_thresholds
        ),
    )
