"""Guarantees: the boldest setting whose promises hold on new texts, with stated confidence.

This is Learn then Test (Angelopoulos et al., 2110.01052) with fixed-sequence testing. A fixed list
of settings, known before any row is seen, is tested from cautious to bold. A setting passes only if
*every* promise passes on the rows that it is about, which needs no correction for the number of
promises. The first setting that fails ends the sequence, and the last one that passed is certified.
Full depth comes first. If there is exit 0, it has a threshold in every setting after it.

A test asks whether the expected loss could be above the bound. It is exact for any number of rows,
see `most_losses`. F1 and Matthews correlation are not means over rows. For them, the same bound
must hold for the share of right answers, and for the metric by a bootstrap, whose confidence is
approximate.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ..runtime.artifact.manifest import Task
from ..runtime.artifact.operating_point import Certificate, Promise
from ..runtime.errors import InputError
from ..runtime.rules.measures import Array, Integers, Mask
from ..runtime.rules.rules import Budget, ExitRule
from ..runtime.tasks import task_of
from .costs import observed_losses
from .goals import DEFAULT_RULE, Bound
from .result import drop_interval
from .scoring import LabelledLogits, Scorer
from .settings import StopScores, settings_lists

# One list, because several would have to share the level. With this power, a weak exit 0 costs next
# to no savings, and a strong one answers nearly as many texts as with a bolder power.
_EXIT_0_POWER = 2.0
_log_factorial = np.vectorize(lambda count: math.lgamma(count + 1))
_RESAMPLES = 500
# More gains than these count as these.
_MOST_GAINS = 100
# Rows are enough for a good chance if a setting with half of the allowed losses passes this often.
_GOOD_CHANCE = 0.8


@dataclass(frozen=True)
class Certified:
    """What rows certify.

    Attributes:
        rule: the boldest setting that passed; `Budget` of the last exit is full depth. None if not
            even full depth passed.
        certificate: the guarantee; None if nothing is certified but that full depth is full depth.
        failed: without a certificate, what was counted for the promise that ended the sequence,
            and how many rows are needed.
    """

    rule: ExitRule | None
    certificate: Certificate | None = None
    failed: str = ""


def check_possible(bound: Bound, task: Task, reference: NDArray[np.float32]) -> None:
    """Refuse, before anything is trained, what cannot be certified even if nothing changes.

    Args:
        bound: what is asked for.
        task: of the model.
        reference: `[rows, labels]` float32, the logits that decisions are compared with, of the
            rows that certify.

    Raises:
        InputError: all decisions are the same, or a promise is about too few texts.
    """
    thresholds = task_of(task).decision_thresholds(bound.thresholds)
    lengths = np.ones(len(reference), np.intp)
    rows = LabelledLogits(
        reference[None], lengths, None, task.problem_type, decision_thresholds=thresholds
    )
    _, decisions = rows.decisions()
    if (decisions == decisions[0]).all():
        raise InputError(
            f"the classifier decides the same for all {len(decisions):,} texts that certify",
            "give texts like those to classify, or other `thresholds`",
        )
    for promise in bound.promises:
        least, _ = rows_needed(promise.at_most / 100, 1 - bound.confidence)
        about = np.ones(len(decisions), np.bool_)
        if promise.label is not None:
            about = decisions[:, task.labels.index(promise.label)] == (promise.of == "missed")
        if about.sum() < least:
            raise InputError(
                f"{promise} needs at least {least:,} texts that it is about; among the "
                f"{len(decisions):,} texts that certify, there are {about.sum():,}",
                f"give more texts, or a larger `{promise.of}`",
            )


def certify(
    scorer: Scorer, bound: Bound, labels: Sequence[str], rule: str = DEFAULT_RULE
) -> Certified:
    """The boldest setting that keeps all promises of a bound.

    Args:
        scorer: the metric of the rows, which have the `decision_thresholds` of the bound and, if
            decisions are compared with another classifier than the last exit, their `reference`.
        bound: what is asked for.
        labels: the labels of the model.
        rule: `confidence` or `entropy`.
    """
    rows = scorer.rows
    level = 1 - bound.confidence
    tests = [_Test(scorer, promise, labels, level) for promise in bound.promises]
    full_depth = Budget(exit=rows.exits[-1])
    # Without exit 0, the only list is also the last.
    sequence = [full_depth, *settings_lists(rows, (rule,), (_EXIT_0_POWER,))[-1]]
    stop = StopScores(rows)
    exits = np.vstack([stop.exits([full_depth]), stop.exits(sequence[1:])])
    # A setting that stops all rows where the one before does passes or fails like it.
    changes = np.append(True, (exits[1:] != exits[:-1]).any(axis=1))
    best: ExitRule | None = None
    failed = ""
    for number in np.flatnonzero(changes):
        now = exits[number]
        failed = next((test.in_words(now) for test in tests if not test.passes(now)), "")
        if failed:
            break
        best = sequence[number]
    if best is None or (best == full_depth and rows.reference is None):
        if any(test.shows_more(exits[0]) for test in tests):
            needs = ["more texts would hardly help"]
        else:
            needs = needs_in_words(bound)
        return Certified(best, None, "; ".join(filter(None, [failed, *needs])))
    certificate = Certificate(
        confidence=100 * bound.confidence,
        promises=tuple(test.promise for test in tests),
        label_thresholds=dict(bound.thresholds),
        full_depth_changes=full_depth_changes(scorer, bound.confidence),
    )
    return Certified(best, certificate)


def full_depth_changes(scorer: Scorer, confidence: float) -> float:
    """See `Certificate.full_depth_changes`; the exact bound of Clopper and Pearson (1934)."""
    if scorer.rows.reference is None:
        return 0.0
    return most_changes(scorer.changed[-1], confidence)


def most_changes(changed: Mask, confidence: float) -> float:
    """An upper bound in percent on the share that changes.

    Args:
        changed: `[rows]` or `[queries]`, which of them changed.
        confidence: of the bound.
    """
    # An interval leaves half of the rest above it.
    _, most = share_interval(int(changed.sum()), len(changed), 2 * confidence - 1)
    return 100 * most


class _Test:
    """Tests whether a promise holds.

    Args:
        scorer: the metric of the rows.
        promise: what is promised.
        labels: the labels of the model.
        level: 1 - the confidence.

    Attributes:
        promise: as given, with the number of rows that it was tested on.
        numbers: the numbers of the rows that test it.
        most: see `most_losses`.
    """

    def __init__(
        self, scorer: Scorer, promise: Promise, labels: Sequence[str], level: float
    ) -> None:
        self._scorer = scorer
        self._level = level
        numbers = shuffled(scorer.rows)
        if promise.of == "drop":
            losses = observed_losses(scorer)
        elif promise.of == "changed_answers":
            losses = scorer.changed.astype(np.float64)
        else:
            every, reference = scorer.decisions
            assert promise.label is not None
            label = labels.index(promise.label)
            about = reference[:, label] == (promise.of == "missed")
            numbers = numbers[about[numbers]]
            losses = (every[..., label] != reference[:, label]).astype(np.float64)
        share = promise.at_most / 100
        self.numbers = numbers[: useful_rows(len(numbers), share, level)]
        self._losses = losses
        self.most = most_losses(len(self.numbers), share, level, promise.of == "drop")
        self.promise = replace(promise, rows=len(self.numbers))

    def lost(self, exits: Integers) -> Array:
        """The losses of the rows that test the promise."""
        return np.asarray(self._losses[self._scorer.rows.at(exits)][self.numbers])

    def passes(self, exits: Integers) -> bool:
        """Whether a setting keeps the promise on new rows, with the confidence.

        Args:
            exits: `[rows]` where the setting stops the rows.
        """
        lost = self.lost(exits)
        gains = min(int((lost < 0).sum()), len(self.most) - 1)
        if (lost > 0).sum() > self.most[gains]:
            return False
        if self.promise.of != "drop" or self._scorer.is_row_mean:
            return True
        # A bootstrap alone would take rows without any change for certainty.
        _, high = drop_interval(self._scorer, exits, 1 - 2 * self._level, _RESAMPLES)
        return high <= self.promise.at_most

    def shows_more(self, exits: Integers) -> bool:
        """Whether these rows are enough, and themselves show more losses than allowed."""
        share = self.promise.at_most / 100
        return bool(self.most[0] >= 0 and self.lost(exits).mean() > share)

    def in_words(self, exits: Integers) -> str:
        """What these rows show, for a setting that does not pass."""
        lost = self.lost(exits)
        if self.most[0] < 0:
            return f"{len(lost)} texts are too few"
        full_depth = (exits == self._scorer.rows.exits[-1]).all()
        setting = "full depth" if full_depth else "the next setting"
        what = "losses" if self.promise.of == "drop" else self.promise.of.replace("_", " ")
        return f"{setting} has {lost.sum():g} {what} in {len(lost)} texts"


def shuffled(rows: LabelledLogits) -> NDArray[np.intp]:
    """The numbers of the rows in random order, which depends only on which rows there are."""
    columns = np.ascontiguousarray(rows.logits.transpose(1, 0, 2))
    hashes = [hashlib.sha256(column.tobytes()).digest() for column in columns]
    order = np.array(sorted(range(len(hashes)), key=hashes.__getitem__), np.intp)
    every = hashlib.sha256(b"".join(sorted(hashes))).digest()
    return order[np.random.default_rng(int.from_bytes(every, "big")).permutation(len(order))]


def useful_rows(rows: int, share: float, level: float) -> int:
    """The fewest rows that allow as many losses as all rows do, see `most_losses`.

    Further rows could only show further losses.
    """
    most = int(most_losses(rows, share, level)[0])
    while most >= 0 and binomial_tail(most, rows - 1, share) <= level:
        rows -= 1
    return rows


@functools.lru_cache
def most_losses(
    rows: int, share: float, level: float, with_gains: bool = False
) -> NDArray[np.int64]:
    """With how many losses a promise passes at most, by the number of gains; -1 if never.

    Of independent rows, each is a loss, a gain or neither. The hypothesis is that losses are more
    probable than gains by `share` or more; how probable gains are is not known. Barnard's exact
    test: results (losses, gains) are put in order, and as many of them pass as together have a
    probability of at most `level`, *however* probable gains are. The order is that of p-values with
    the probability of gains that fits a result best under the hypothesis, for the score of
    Miettinen and Nurminen (estimation and maximization, Lloyd 2008). Without gains, this is the
    binomial test, and results without gains come first, so they pass as they do there.

    Args:
        rows: how many rows there are.
        share: what is allowed.
        level: the probability of passing wrongly.
        with_gains: whether rows can gain.

    Returns:
        `[gains + 1]`, up to 100 gains; more count as these. Only `[1]` without gains.
    """
    columns = min(_MOST_GAINS, rows) + 1 if with_gains else 1
    if not rows:
        return np.full(columns, -1)
    allowed = rows * share
    losses, gains = np.ogrid[: min(rows, int(allowed) + columns) + 1, :columns]
    # Probabilities of a gain, in eighths of the root of the expected number of gains.
    rates = np.maximum((np.arange(12 * math.isqrt(columns - 1) + 1) / 8) ** 2, 1e-9) / rows
    rates = rates[rates < (1 - share) / 2, None, None]
    by_losses = _binomial(losses, rows, share + rates)
    chances = by_losses * _binomial(gains, rows - losses, rates / (1 - share - rates))
    # The last column stands for as many gains or more.
    chances[..., -1:] = by_losses - chances[..., :-1].sum(axis=-1, keepdims=True)
    shape = chances.shape[1:]
    chances = chances.reshape(len(rates), -1)
    # The expected number of gains that fits best, for Poisson counts.
    more = 2 * allowed - losses - gains
    fitting = (np.sqrt(more**2 + 8 * gains * allowed) - more) / 4
    score = (allowed + gains - losses) / np.sqrt(allowed + 2 * fitting)
    order = np.argsort(-score, axis=None, kind="stable")
    nearest = np.minimum(np.rint(8 * np.sqrt(fitting)), len(rates) - 1).astype(int).flat[order]
    p_values = chances[:, order].cumsum(axis=1)[nearest, np.arange(len(order))]
    p_values[(order % columns == 0) & (p_values <= level)] = 0.0
    order = order[np.argsort(p_values, kind="stable")]
    passing = chances[:, order].cumsum(axis=1).max(axis=0) <= level
    passes = np.zeros(shape, np.bool_)
    passes.flat[order[: passing.argmin()]] = True
    return np.asarray(np.logical_and.accumulate(passes).sum(axis=0) - 1)


def _binomial(counts: Integers, rows: Integers | int, chance: Array | float) -> Array:
    """The probabilities of counts among rows, exactly."""
    rest = np.maximum(rows - counts, 0)
    ways = _log_factorial(rows) - _log_factorial(counts) - _log_factorial(rest)
    chances = np.exp(ways + counts * np.log(chance) + rest * np.log1p(-chance))
    return np.where(counts <= rows, chances, 0.0)


def binomial_tail(count: int, rows: int, risk: float) -> float:
    """P(Binomial(rows, risk) <= count), exactly."""
    return float(_binomial(np.arange(count + 1), rows, risk).sum())


def share_interval(count: int, rows: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share (Clopper and Pearson, 1934).

    Args:
        count: how many of the rows have it.
        rows: how many rows there are.
        level: the confidence level.
    """
    tail = (1 - level) / 2

    def share_where(is_below: Callable[[float], bool]) -> float:
        low = 0.0
        high = 1.0
        for _ in range(50):
            middle = (low + high) / 2
            if is_below(middle):
                low = middle
            else:
                high = middle
        return high

    low = 0.0
    high = 1.0
    if count > 0:
        low = share_where(lambda share: 1 - binomial_tail(count - 1, rows, share) < tail)
    if count < rows:
        high = share_where(lambda share: binomial_tail(count, rows, share) > tail)
    return low, high


def rows_needed(share: float, level: float) -> tuple[int, int]:
    """How many rows a promise needs: at the least, without any loss; and for a good chance.

    The chance is good if a setting with half of the allowed losses passes in 80 % of all cases.

    Args:
        share: what is allowed.
        level: the largest p-value that passes.
    """
    least = rows = math.ceil(math.log(level) / math.log1p(-share))
    count = 0
    while binomial_tail(count, rows, share / 2) < _GOOD_CHANCE:
        count += 1
        while binomial_tail(count, rows, share) > level:
            rows += max(1, rows // 1000)
    return least, math.ceil(rows / 20) * 20


def needs_in_words(bound: Bound, what: str = "texts") -> list[str]:
    """How many texts each promise needs, such as `at most 1 % missed of ...: 299 texts are ...`.

    Args:
        bound: what is asked for.
        what: what a promise is about: texts, or queries with their documents.
    """
    lines = []
    for of, share in bound.shares.items():
        least, good = rows_needed(share, 1 - bound.confidence)
        rows = {"missed": "flagged texts", "false_alarms": "texts that are not flagged"}
        name = "points of drop" if of == "drop" else f"% {of.replace('_', ' ')}"
        counts = f"{least:,} {rows.get(of, what)} are the least, and {good:,} give a good chance"
        lines.append(f"at most {100 * share:g} {name}: {counts}")
    return lines
