"""Risk control: the fastest setting whose risk on new rows is bounded, with stated confidence.

This is Learn-then-Test (Angelopoulos et al., 2110.01052) with fixed-sequence testing. Some of the
rows put settings in an order, from cautious to aggressive. The other rows then test them one after
another, each at the full level, until one fails. The last setting that passed is certified. If
thousands of settings were tested at once instead, each would have to pass at a thousandth of the
level, and no calibration set of usual size allows that.

A test asks whether the expected loss could be above the bound. Its p-value is valid for any number
of rows: the exact binomial tail for losses of 0 and 1, and for losses in [-1, 1] the capital of a
bet against the bound (Waudby-Smith & Ramdas, 2010.09686).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.operating_point import Certificate, Goal
from ..runtime.errors import InputError, Remedy
from ..runtime.rules.base import ExitRule
from ..runtime.rules.measures import Array
from .choose import ALL, PARTS, Selector, Settings
from .outcome import exits_of
from .scoring import ROW_MEANS, Scorer, same_answers
from .stopping_costs import observed_losses

# How many settings are tested one after another, at most.
_SEQUENCE = 100
# The parts of the rows that put the settings in order.
_ORDERING = frozenset({0, 1})
# A bet of everything would never recover from a single loss.
_LARGEST_BET = 0.95


class RiskOf(str, Enum):
    """The loss of a row; its expectation on new rows is the risk that is bounded."""

    DISAGREEMENT = "disagreement"
    """1 if the answer differs from full depth, else 0; it needs no labels."""
    DROP = "drop"
    """The metric at full depth minus the metric with the rule, so that gains offset losses."""


@dataclass(frozen=True)
class Bound:
    """A guarantee that is asked for, on new rows from the same source.

    It is given by Learn-then-Test with fixed-sequence testing (arXiv 2110.01052): part of the rows
    put the settings in order, and the other rows test them.

    Attributes:
        risk: largest expected loss, as a share of rows (0.01 is one point).
        confidence: probability, over the choice of calibration rows, that the bound holds; such
            as 0.95.
        risk_of: the loss.

    Raises:
        InputError: risk or confidence is not between 0 and 1.

    Example:
        >>> from fpabee.calibration import Bound
        >>> bound = Bound(risk=0.01, confidence=0.95)
        >>> str(bound)
        'drop at most 1 points with 95 % confidence'
        >>> bound.rows_needed
        299
    """

    risk: float
    confidence: float
    risk_of: RiskOf = RiskOf.DROP

    def __post_init__(self) -> None:
        for name in ("risk", "confidence"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise InputError(
                    f"{name} is {100 * value:g} %", "give more than 0 and less than 100"
                )

    def __str__(self) -> str:
        return (
            f"{self.risk_of.value} at most {100 * self.risk:g} points with "
            f"{100 * self.confidence:g} % confidence"
        )

    @property
    def rows_needed(self) -> int:
        """The least number of test rows with which a setting that never loses passes."""
        return math.ceil(math.log(1 - self.confidence) / math.log(1 - self.risk))

    def as_goal(self) -> Goal:
        """The same drop as a goal, without a guarantee."""
        return Goal(max_drop=100 * self.risk)


def check_row_mean(metric: str) -> None:
    """Check that the drop of a metric is the mean of a loss of each row.

    Raises:
        InputError: the metric is not a mean over rows.
    """
    if metric not in ROW_MEANS:
        raise InputError(
            f"{metric} is not a mean over rows, so the risk of its drop cannot be bounded",
            Remedy(
                "use {metric} accuracy (exact_match for multi-label), or {risk_of} disagreement"
            ),
        )


def losses(scorer: Scorer, risk_of: RiskOf) -> Array:
    """The loss of a row that stops at an exit, -1, 0 or 1: `[exits, rows]`.

    Raises:
        InputError: the metric is not a mean over rows, so that a row has no loss of its drop.
    """
    if risk_of is RiskOf.DISAGREEMENT:
        answers = scorer.answers
        return np.asarray(1.0 - same_answers(answers, answers[-1], scorer.problem_type))
    check_row_mean(scorer.metric)
    return observed_losses(scorer)


def p_value(sample: Array, risk: float, level: float) -> Array:
    """p-values `[settings]` against the hypothesis that the expected loss is above the risk.

    Args:
        sample: `[settings, rows]` losses in [-1, 1], rows in random order.
        risk: the bound.
        level: what the p-value will be compared with. It is valid at any level, and most powerful
            at this one.
    """
    if sample.min(initial=0.0) >= 0.0:
        return _binomial_tail(sample.sum(axis=1), sample.shape[1], risk)
    return _betting(sample, risk, level)


def _binomial_tail(counts: Array, rows: int, risk: float) -> Array:
    """P(Binomial(rows, risk) <= count), exactly."""
    # Logarithms of C(n, k) p^k (1-p)^(n-k), each from the one before.
    k = np.arange(1, int(counts.max(initial=0)) + 1)
    steps = np.log((rows - k + 1) / k) + math.log(risk) - math.log1p(-risk)
    terms = np.cumsum([rows * math.log1p(-risk), *steps])
    cumulative = np.cumsum(np.exp(terms))
    return np.asarray(np.minimum(cumulative[counts.astype(np.intp)], 1.0))


def _betting(sample: Array, risk: float, level: float) -> Array:
    """One over the largest capital of a bet that the mean is below the risk.

    The capital after row t is the product of 1 + bet_i (risk - loss_i). A bet depends on earlier
    rows only, so under the hypothesis the capital is a supermartingale, and by Ville's inequality
    it exceeds 1/p with probability at most p. The bets are those of 2010.09686, eq. 26: the most
    powerful ones for a given level and number of rows.
    """
    most = _LARGEST_BET / (1 - risk)
    rows = sample.shape[1]
    so_far = np.arange(1, rows + 1)
    # Mean and variance of the rows so far, and of one made-up row with the largest variance.
    mean = (risk + np.cumsum(sample, axis=1)) / (so_far + 1)
    variance = (0.25 + np.cumsum(np.square(sample - mean), axis=1)) / (so_far + 1)
    # A bet knows the earlier rows only, not its own.
    variance = np.concatenate([np.full((len(sample), 1), 0.25), variance[:, :-1]], axis=1)
    bets = np.minimum(np.sqrt(2 * math.log(1 / level) / (rows * variance)), most)
    capital = np.cumsum(np.log1p(bets * (risk - sample)), axis=1).max(axis=1, initial=0.0)
    return np.asarray(np.exp(-capital))


def certify(sequence: Array, bound: Bound) -> int | None:
    """Test settings in their order until one fails.

    Args:
        sequence: `[settings, rows]` losses on the test rows, the most cautious setting first.
        bound: what is asked for.

    Returns:
        The number of the last setting that passed; None if the first one failed.
    """
    level = 1 - bound.confidence
    failed = p_value(sequence, bound.risk, level) > level
    passed = int(np.argmax(failed)) if failed.any() else len(failed)
    return passed - 1 if passed else None


@dataclass(frozen=True)
class Controlled:
    """A certified setting.

    Attributes:
        rule: the setting.
        tested: the numbers of the rows that it was tested on.
        certificate: the bound that holds.
    """

    rule: ExitRule
    tested: NDArray[np.intp]
    certificate: Certificate


def control(selector: Selector, kinds: Collection[str], bound: Bound) -> Controlled:
    """The most aggressive setting whose risk is bounded.

    Args:
        selector: all settings; with the metric `agreement` if disagreement is bounded.
        kinds: the kinds of settings to choose from.
        bound: what is asked for.

    Raises:
        InputError: no setting passes; the message says how many rows would be needed.
    """
    settings = selector.settings(kinds, _ORDERING)
    path = [settings.rule(int(number)) for number in path_of(settings)]
    tested = selector.rows_of(ALL - _ORDERING)
    rows = selector.stopping_costs.rows.take(tested)
    each = losses(selector.stopping_costs.scorer, bound.risk_of)[:, tested]
    sequence = np.zeros((len(path), len(tested)))
    for number, rule in enumerate(path):
        sequence[number] = each[exits_of(rule, rows) - 1, np.arange(len(tested))]
    last = certify(sequence, bound) if path else None
    if last is None:
        least = float(sequence[0].mean()) if path else 1.0
        raise InputError(
            f"no setting is certain to have a risk ({bound.risk_of.value}) of at most "
            f"{100 * bound.risk:g} points at {100 * bound.confidence:g} % confidence: on the "
            f"{len(tested)} rows that tested it, the most cautious setting lost "
            f"{100 * least:.2f} points",
            _remedy(bound, least, len(tested)),
        )
    certificate = Certificate(
        risk_of=bound.risk_of.value,
        risk=100 * bound.risk,
        confidence=100 * bound.confidence,
        rows=len(tested),
    )
    return Controlled(path[last], tested, certificate)


def path_of(settings: Settings) -> NDArray[np.intp]:
    """The numbers of settings that no other beats, from cautious to aggressive, thinned out.

    Full depth is left out, since it needs no certificate.
    """
    front = settings.front(settings.drops)
    early = front.numbers[front.costs < settings.full_cost * (1 - 1e-9)]
    steps = np.linspace(0, len(early) - 1, min(len(early), _SEQUENCE)).round().astype(np.intp)
    return np.asarray(early[steps])


def _remedy(bound: Bound, least: float, tested: int) -> Remedy:
    """What makes a certificate possible, if the most cautious setting lost `least`."""
    if least >= bound.risk:
        return Remedy("allow a larger {risk}, or a lower {confidence}")
    needed = bound.rows_needed
    if least > 0:
        deviation = math.sqrt(least) / (bound.risk - least)
        needed = max(needed, math.ceil((NormalDist().inv_cdf(bound.confidence) * deviation) ** 2))
    if needed <= tested:  # an estimate that these rows have shown to be too small
        needed = 2 * tested
    rows = math.ceil(needed * PARTS / (PARTS - len(_ORDERING)))
    return Remedy("give about {rows} rows, or a larger {risk}", rows=rows)
