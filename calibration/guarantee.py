"""Guarantees: the boldest setting whose promises hold on new texts, with stated confidence.

This is Learn then Test (Angelopoulos et al., 2110.01052) with fixed-sequence testing. A fixed list
of thresholds, known before any row is seen, is tested on all rows, from cautious to bold. A setting
passes only if *every* promise passes on the rows that it is about, which needs no correction for
the number of promises. The first setting that fails ends the sequence, and the last one that passed
is certified. Full depth comes first. With exit 0 there is a second sequence, in which exit 0
answers the texts that are four times as sure as a layer has to be. Both are tested, each at half of
1 - confidence, and the faster result counts.

A test asks whether the expected loss could be above the bound. Its p-value is valid for any number
of rows: the exact binomial tail for losses of 0 and 1, and for losses in [-1, 1] the capital of a
bet against the bound (Waudby-Smith & Ramdas, 2010.09686). The order of the bets comes from a hash
of the rows, so nobody can try orders until one passes. F1 and Matthews correlation are not means
over rows. For them, the same bound must hold for the share of right answers, and for the metric by
a bootstrap, whose confidence is approximate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from ..runtime.artifact.manifest import ProblemType, Task
from ..runtime.artifact.operating_point import Certificate, Promise
from ..runtime.rules.measures import Array, Integers
from ..runtime.rules.rules import Budget, Confidence, Entropy, ExitRule
from ..runtime.rules.words import rounded
from .costs import StoppingCosts, observed_losses
from .goals import Bound
from .result import drop_interval
from .scoring import LabelledLogits, Scorer
from .search import StopScores, with_exit_0

# Steps of 1 - confidence: few where only over-confident models need them, then 160.
_CAUTIOUS = np.geomspace(1e-10, 1e-4, 60, endpoint=False)
_STEPS = 160
# Exit 0 answers from 1 - p of a quarter of the layers' on: a bag of words is wrong more often.
_EXIT_0_SHARE = 0.25
_RESAMPLES = 500
# A bet of everything would never recover from a single loss.
_LARGEST_BET = 0.95
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


def decision_thresholds(task: Task, thresholds: Mapping[str, float]) -> tuple[float, ...]:
    """What `LabelledLogits.decision_thresholds` is for thresholds by label.

    In a model with one label for each text, only the named labels decide; in a multi-label model
    all labels do.
    """
    if not thresholds and not task.label_thresholds:
        return ()
    usual = 0.5 if task.problem_type is ProblemType.MULTI_LABEL else 1.0
    values = task.label_thresholds or (usual,) * len(task.labels)
    return tuple(map(thresholds.get, task.labels, values))


def certify(
    costs: StoppingCosts, bound: Bound, labels: Sequence[str], rule: str = "confidence"
) -> Certified:
    """The boldest setting that keeps all promises of a bound.

    Args:
        costs: the rows, with the `decision_thresholds` of the bound and, if decisions are compared
            with another classifier than the last exit, with their `reference`.
        bound: what is asked for.
        labels: the labels of the model.
        rule: `confidence` or `entropy`.
    """
    tests = [_Test(costs.scorer, promise, labels) for promise in bound.promises]
    starts = [False, True] if costs.rows.first_exit == 0 else [False]
    level = (1 - bound.confidence) / len(starts)
    stop, found = StopScores(costs.rows), []
    for at_exit_0 in starts:
        passed, failed, mean_cost, exits = None, "", math.inf, np.zeros_like(costs.rows.lengths)
        for setting in sequence(costs.rows, rule, at_exit_0):
            before, exits = exits, stop.exits(setting)
            if np.array_equal(before, exits):
                continue
            failed = next((t.in_words(exits) for t in tests if not t.passes(exits, level)), "")
            if failed:
                break
            passed, mean_cost = setting, float(costs.costs[costs.rows.at(exits)].mean())
        found.append((mean_cost, passed, failed))
    _, best, failed = min(found, key=lambda each: each[0])
    if best is None or (best == Budget(exit=costs.rows.exits[-1]) and costs.rows.reference is None):
        needs = needs_in_words(bound, costs.rows.first_exit == 0)
        return Certified(best, None, "; ".join(filter(None, [failed, *needs])))
    certificate = Certificate(
        confidence=100 * bound.confidence,
        promises=tuple(test.promise for test in tests),
        thresholds=dict(bound.thresholds),
    )
    return Certified(best, certificate)


def sequence(rows: LabelledLogits, rule: str, at_exit_0: bool) -> Iterator[ExitRule]:
    """The settings to test, from cautious to bold; no row decides about them.

    Args:
        rows: rows of the model; only its labels, exits and thresholds count.
        rule: `confidence` or `entropy`.
        at_exit_0: whether exit 0 may answer.
    """
    yield Budget(exit=rows.exits[-1])
    single, labels = rows.problem_type is ProblemType.SINGLE_LABEL, rows.logits.shape[2]
    boldest = 0.95 if single and not rows.decision_thresholds else 0.5
    doubts = limits = np.concatenate([_CAUTIOUS, np.geomspace(1e-4, boldest, _STEPS)])
    base: ExitRule = Confidence(threshold=0.0, decision_thresholds=rows.decision_thresholds)
    if rule == "entropy":
        largest = math.log(labels) if single else labels * math.log(2)
        base, limits = Entropy(threshold=0.0), np.geomspace(1e-3, 0.95 * largest, len(doubts))
    for doubt, limit in zip(doubts, limits, strict=True):
        setting = base.with_stop_threshold(rounded(limit))
        yield with_exit_0(setting, _EXIT_0_SHARE * doubt) if at_exit_0 else setting


class _Test:
    """Tests whether a promise holds.

    Args:
        scorer: the metric of the rows.
        promise: what is promised.
        labels: the labels of the model.

    Attributes:
        promise: as given, with the number of these rows.
        numbers: the numbers of the rows that the promise is about, in random order.
    """

    def __init__(self, scorer: Scorer, promise: Promise, labels: Sequence[str]) -> None:
        self._scorer = scorer
        self.numbers = shuffled(scorer.rows)
        if promise.of == "drop":
            losses = observed_losses(scorer)
        elif promise.of == "flips":
            losses = scorer.changed.astype(np.float64)
        else:
            every, reference = scorer.decisions
            assert promise.label is not None
            label = labels.index(promise.label)
            about = reference[:, label] == (promise.of == "missed")
            self.numbers = self.numbers[about[self.numbers]]
            losses = (every[..., label] != reference[:, label]).astype(np.float64)
        self._losses = losses
        self.promise = replace(promise, rows=len(self.numbers))

    def lost(self, exits: Integers) -> Array:
        """The losses of the rows that the promise is about."""
        return np.asarray(self._losses[self._scorer.rows.at(exits)][self.numbers])

    def passes(self, exits: Integers, level: float) -> bool:
        """Whether a setting keeps the promise on new rows, at a confidence of 1 - level.

        Args:
            exits: `[rows]` where the setting stops the rows.
            level: the largest p-value.
        """
        share = self.promise.at_most / 100
        if p_value(self.lost(exits), share, level) > level:
            return False
        if self.promise.of != "drop" or self._scorer.is_row_mean:
            return True
        # A bootstrap alone would take rows without any change for certainty.
        _, high = drop_interval(self._scorer, exits, 1 - 2 * level, _RESAMPLES)
        return high <= self.promise.at_most

    def in_words(self, exits: Integers) -> str:
        """What these rows show, for a setting that does not pass."""
        lost, full_depth = self.lost(exits), (exits == self._scorer.rows.exits[-1]).all()
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


def p_value(sample: Array, risk: float, level: float) -> float:
    """p-value against the hypothesis that the expected loss is above the risk.

    Args:
        sample: `[rows]` losses in [-1, 1], rows in random order.
        risk: the bound.
        level: what the p-value will be compared with. It is valid at any level, and most powerful
            at this one.
    """
    if sample.min(initial=0.0) >= 0.0:
        return binomial_tail(int(sample.sum()), len(sample), risk)
    return _betting(sample, risk, level)


def binomial_tail(count: int, rows: int, risk: float) -> float:
    """P(Binomial(rows, risk) <= count), exactly."""
    # Logarithms of C(n, k) p^k (1-p)^(n-k), each from the one before.
    k = np.arange(1, count + 1)
    steps = np.log((rows - k + 1) / k) + math.log(risk) - math.log1p(-risk)
    terms = np.cumsum([rows * math.log1p(-risk), *steps])
    return min(float(np.exp(terms).sum()), 1.0)


def _betting(sample: Array, risk: float, level: float) -> float:
    """One over the largest capital of a bet that the mean is below the risk.

    The capital after row t is the product of 1 + bet_i (risk - loss_i). A bet depends on earlier
    rows only, so under the hypothesis the capital is a supermartingale, and by Ville's inequality
    it exceeds 1/p with probability at most p. The bets are those of 2010.09686, eq. 26: the most
    powerful ones for a given level and number of rows.
    """
    most = _LARGEST_BET / (1 - risk)
    rows = len(sample)
    so_far = np.arange(1, rows + 1)
    # Mean and variance of the rows so far, and of one made-up row with the largest variance.
    mean = (risk + np.cumsum(sample)) / (so_far + 1)
    variance = (0.25 + np.cumsum(np.square(sample - mean))) / (so_far + 1)
    # A bet knows the earlier rows only, not its own.
    variance = np.concatenate([[0.25], variance[:-1]])
    bets = np.minimum(np.sqrt(2 * math.log(1 / level) / (rows * variance)), most)
    capital = np.cumsum(np.log1p(bets * (risk - sample))).max(initial=0.0)
    return math.exp(-capital)


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


def needs_in_words(bound: Bound, has_exit_0: bool) -> list[str]:
    """How many texts each promise needs: `1 % flips: 1,960 rows for a good chance; ...`.

    Args:
        bound: what is asked for.
        has_exit_0: whether two sequences are tested, so that each gets half of the level.
    """
    found = []
    for of, share in bound.shares.items():
        least, good = rows_needed(share, (1 - bound.confidence) / (1 + has_exit_0))
        rows = {"missed": "flagged texts", "false_alarms": "texts that are not flagged"}
        name = "points of drop" if of == "drop" else f"% {of.replace('_', ' ')}"
        counts = f"{good:,} {rows.get(of, 'rows')} for a good chance; {least:,} at the least"
        found.append(f"{100 * share:g} {name}: {counts}")
    return found
