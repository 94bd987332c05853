"""Risk control: the most aggressive setting whose risk on new rows is bounded, with confidence.

Learn-then-Test (Angelopoulos et al., 2110.01052) with fixed-sequence testing: settings are
put in an order, from cautious to aggressive, on rows of their own; then they are tested
one after another on the other rows, each at the full level, until one fails. The last
that passed is certified. Testing thousands of settings at once would need every one of
them to pass at a thousandth of the level, which no calibration set of usual size allows.

A test asks whether the expected loss could be above the bound. Its p-value holds for any
number of rows: the exact binomial tail for losses of 0 and 1, and for losses in [-1, 1] the
capital of a bet against the bound (Waudby-Smith & Ramdas, 2010.09686).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.operating_point import Certificate
from ..runtime.errors import InputError
from ..runtime.rules.measures import Array
from .choose import ALL, PARTS, Selector
from .outcome import exits_of
from .scoring import ROW_MEANS, Scorer
from .settings import Candidate, Settings

# Settings that are tested one after another, at most.
_SEQUENCE = 100
# The parts of the rows that put the settings in order.
_ORDERING = frozenset({0, 1})
# A bet of everything would never recover from one loss.
_LARGEST_BET = 0.95


class RiskOf(str, Enum):
    """What is bounded: the loss of a row, whose expectation on new rows is the risk."""

    DISAGREEMENT = "disagreement"
    """Share of rows whose answer differs from that of full depth: needs no labels."""
    DROP = "drop"
    """Score at full depth minus score with the rule: gains make up for losses."""


@dataclass(frozen=True)
class Bound:
    """A guarantee that is asked for, on new rows from the same source.

    Granted by Learn-then-Test with fixed-sequence testing (arXiv 2110.01052). Part of the rows
    put the settings in order, and the others test them.

    Attributes:
        risk: largest expected loss, as a share of rows (0.01 is one point).
        confidence: probability over the calibration rows that it holds, such as 0.95.
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


def check_row_mean(metric: str) -> None:
    """Check that the drop of a metric has a loss of each row.

    Raises:
        InputError: it is no mean over rows.
    """
    if metric not in ROW_MEANS:
        raise InputError(
            f"{metric} is no mean over rows, so the risk of its drop cannot be bounded",
            "give --metric accuracy (exact_match), or --risk-of disagreement",
        )


def losses(scorer: Scorer, risk_of: RiskOf) -> Array:
    """The loss `[exits, rows]` of a row that stops at an exit: -1, 0 or 1.

    Raises:
        InputError: the metric is no mean over rows, so that its drop has no loss of a row.
    """
    if risk_of is RiskOf.DISAGREEMENT:
        answers = scorer.answers
        same = answers == answers[-1]
        same = same if same.ndim == 2 else same.all(axis=-1)
        return np.asarray(1.0 - same)
    check_row_mean(scorer.metric)
    right = scorer.right().astype(np.float64)
    return np.asarray(right[-1] - right)


def p_value(sample: Array, risk: float, level: float) -> Array:
    """Against the hypothesis that the expected loss is above the risk.

    Args:
        sample: `[settings, rows]` losses in [-1, 1], rows in random order.
        risk: the bound.
        level: at which it will be compared; the p-value is valid at any, but strongest there.

    Returns:
        `[settings]`.
    """
    if sample.min(initial=0.0) >= 0.0:
        return _binomial_tail(sample.sum(axis=1), sample.shape[1], risk)
    return _betting(sample, risk, level)


def _binomial_tail(counts: Array, rows: int, risk: float) -> Array:
    """P(Binomial(rows, risk) <= count), exactly."""
    most = int(counts.max(initial=0))
    # In logarithms, term by term: C(n, k) p^k (1-p)^(n-k).
    terms = np.empty(most + 1)
    terms[0] = rows * math.log1p(-risk)
    odds = math.log(risk) - math.log1p(-risk)
    for k in range(1, most + 1):
        terms[k] = terms[k - 1] + math.log((rows - k + 1) / k) + odds
    cumulative = np.cumsum(np.exp(terms))
    return np.asarray(np.minimum(cumulative[counts.astype(np.intp)], 1.0))


def _betting(sample: Array, risk: float, level: float) -> Array:
    """One over the largest capital of a bet that the mean is below the risk.

    The capital after row t is the product of 1 + bet_i (risk - loss_i); a bet depends on the
    rows before it only, so that under the hypothesis the capital is a supermartingale, and
    by Ville's inequality it exceeds 1/p with probability at most p. Bets are those of
    2010.09686, eq. 26: the most powerful at a given level and number of rows.
    """
    most = _LARGEST_BET / (1 - risk)
    rows = sample.shape[1]
    so_far = np.arange(1, rows + 1)
    # Mean and variance of the rows so far, with one made-up row that has the largest variance.
    mean = (risk + np.cumsum(sample, axis=1)) / (so_far + 1)
    variance = (0.25 + np.cumsum(np.square(sample - mean), axis=1)) / (so_far + 1)
    # A bet knows the rows before it only.
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
        The number of the last setting that passed; None if the first failed.
    """
    level = 1 - bound.confidence
    passed = p_value(sequence, bound.risk, level) <= level
    failures = np.flatnonzero(~passed)
    first = int(failures[0]) if len(failures) else len(passed)
    return first - 1 if first else None


@dataclass(frozen=True)
class Controlled:
    """A certified setting.

    Attributes:
        candidate: the setting.
        tested: numbers of the rows that it was tested on.
        certificate: what holds.
    """

    candidate: Candidate
    tested: NDArray[np.intp]
    certificate: Certificate


def control(selector: Selector, kinds: Collection[str], bound: Bound) -> Controlled:
    """The most aggressive setting whose risk is bounded.

    Some parts of the rows order the settings, the others test them.

    Args:
        selector: all settings; of the metric `agreement` if that is what is bounded.
        kinds: of the settings to choose from.
        bound: what is asked for.

    Raises:
        InputError: no setting passes; says how many rows would be needed.
    """
    settings = selector.settings(kinds, _ORDERING)
    path = [settings.candidate(int(number)) for number in path_of(settings)]
    tested = selector.rows_of(ALL - _ORDERING)
    rows = selector.stopping_costs.rows.take(tested)
    each = losses(selector.stopping_costs.scorer, bound.risk_of)[:, tested]
    stops = [exits_of(candidate.rule, rows) for candidate in path]
    numbers = np.arange(len(tested))
    sequence = np.array([each[exits - 1, numbers] for exits in stops]).reshape(-1, len(tested))
    last = certify(sequence, bound) if path else None
    if last is None:
        least = float(sequence[0].mean()) if path else 1.0
        raise InputError(_too_few(bound, len(tested), least), _hint(bound, least, len(tested)))
    certificate = Certificate(
        risk_of=bound.risk_of.value,
        risk=100 * bound.risk,
        confidence=100 * bound.confidence,
        rows=len(tested),
    )
    return Controlled(path[last], tested, certificate)


def path_of(settings: Settings) -> NDArray[np.intp]:
    """Numbers of settings from cautious to aggressive: those that no other beats, thinned out.

    Full depth is left out: it needs no certificate.
    """
    front = settings.front()
    front = front[settings.costs[front] < settings.full_cost * (1 - 1e-9)]
    steps = np.linspace(0, len(front) - 1, min(len(front), _SEQUENCE)).round().astype(np.intp)
    return np.asarray(front[steps])


def _too_few(bound: Bound, rows: int, least: float) -> str:
    return (
        f"no setting is certain to have a risk ({bound.risk_of.value}) of at most "
        f"{100 * bound.risk:g} points at {100 * bound.confidence:g} % confidence: "
        f"{rows} rows tested it, and the most cautious setting lost {100 * least:.2f} points"
    )


def _hint(bound: Bound, least: float, tested: int) -> str:
    needed = bound.rows_needed
    if least > 0:
        if least >= bound.risk:
            return "allow a larger --risk, or a lower --confidence"
        deviation = math.sqrt(least) / (bound.risk - least)
        needed = max(needed, math.ceil((NormalDist().inv_cdf(bound.confidence) * deviation) ** 2))
    if needed <= tested:  # an estimate that these rows have shown to be too small
        needed = 2 * tested
    return f"give about {math.ceil(needed * PARTS / (PARTS - len(_ORDERING)))} rows, or more risk"
