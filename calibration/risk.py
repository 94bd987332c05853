"""Risk control: the fastest setting whose risk on new rows is bounded, with stated confidence.

This is Learn then Test (Angelopoulos et al., 2110.01052) with fixed-sequence testing. The rows are
shuffled. A fifth of them fix a path of settings, from cautious to bold. The other rows test these
settings one after another until one fails. The last setting that passed is certified. The test rows
are used for nothing else, so no test is biased. Because there is only one path, each test has the
full significance level.

A test asks whether the expected loss could be above the bound. Its p-value is valid for any number
of rows: the exact binomial tail for losses of 0 and 1, and for losses in [-1, 1] the capital of a
bet against the bound (Waudby-Smith & Ramdas, 2010.09686). F1 and Matthews correlation are not
means over rows. For them, the same bound must hold for the share of right answers, and for the
metric by a bootstrap, whose confidence is approximate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..runtime.artifact.operating_point import Certificate, Goal
from ..runtime.errors import InputError
from ..runtime.rules.measures import Array, Measure
from ..runtime.rules.rules import Budget, ExitRule
from .choose import Search
from .families import Family, make_families
from .outcome import drop_interval, exits_of, level_of
from .scoring import Scorer
from .stopping_costs import StoppingCosts, observed_losses
from .sweep import StopScores

PATH_RULES = ("entropy",)
"""The rule of the path if none is named. Choosing it from the rows would need more rows."""

_PATH_SHARE = 0.2
_RESAMPLES = 500
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

    It is given by Learn then Test with fixed-sequence testing (arXiv 2110.01052): a fifth of the
    rows fix a path of settings, and the other rows test them.

    Attributes:
        risk: largest expected loss, as a share of rows (0.01 is one point).
        confidence: probability, over the choice of calibration rows, that the bound holds; such
            as 0.95.
        risk_of: the loss.

    Raises:
        InputError: the risk is not between 0 and 1, or the confidence not between 0.5 and 1.

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
        # With less confidence, the bound would more probably be wrong than right.
        for name, least in (("risk", 0.0), ("confidence", 0.5)):
            value = getattr(self, name)
            if not least < value < 1:
                raise InputError(
                    f"{name} is {100 * value:g} %",
                    f"give more than {100 * least:g} and less than 100 % (in Python, a share of 1)",
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


def losses(scorer: Scorer, risk_of: RiskOf) -> Array:
    """The loss of a row that stops at an exit, -1, 0 or 1: `[exits, rows]`.

    If the metric is not a mean over rows, right answers are counted instead, as accuracy does.
    """
    if risk_of is RiskOf.DISAGREEMENT:
        return scorer.changed.astype(np.float64)
    return observed_losses(scorer)


def p_value(sample: Array, risk: float, level: float) -> float:
    """p-value against the hypothesis that the expected loss is above the risk.

    Args:
        sample: `[rows]` losses in [-1, 1], rows in random order.
        risk: the bound.
        level: what the p-value will be compared with. It is valid at any level, and most powerful
            at this one.
    """
    if sample.min(initial=0.0) >= 0.0:
        return _binomial_tail(int(sample.sum()), len(sample), risk)
    return _betting(sample, risk, level)


def _binomial_tail(count: int, rows: int, risk: float) -> float:
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


def split(rows: int, seed: int = 0) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The numbers of the rows that fix a path, and of those that test it, in random order."""
    order = np.random.default_rng(seed).permutation(rows)
    count = math.ceil(_PATH_SHARE * rows)
    return order[:count], order[count:]


def control(
    costs: StoppingCosts,
    bound: Bound,
    rules: Sequence[str],
    measures: Sequence[Measure],
    seed: int = 0,
) -> tuple[ExitRule, Certificate]:
    """The boldest setting whose risk is bounded, and the bound.

    Args:
        costs: the rows, with the metric `agreement` if disagreement is bounded.
        bound: what is asked for.
        rules: names of the rules of the path; empty means `PATH_RULES`.
        measures: similarity measures of these rules.
        seed: shuffles the rows.

    Raises:
        InputError: no setting passes; the hint says what would help.
    """
    choosing, tested = split(len(costs.rows), seed)
    family = _path(costs.take(choosing), bound, rules or PATH_RULES, measures, seed)
    rows = costs.rows.take(tested)
    scorer, stop = Scorer(rows, costs.scorer.metric), StopScores(rows)
    passed: ExitRule | None = None
    least: float | None = None
    for rule in family.rules:
        exits = stop.exits(rule)
        if not passes(scorer, exits, bound):
            lost = losses(scorer, bound.risk_of)[rows.at(exits)]
            least = float(lost.mean())
            break
        if (exits != rows.exits[-1]).any():
            passed = rule
    if passed is None:
        if least is None:
            raise InputError("no setting stops any of these rows early", "change `rules`")
        raise InputError(
            f"these rows confirm no setting with a risk ({bound.risk_of.value}) of at most "
            f"{100 * bound.risk:g} points at {100 * bound.confidence:g} % confidence: on the "
            f"{len(tested)} rows that tested it, the most cautious setting lost "
            f"{100 * least:.2f} points",
            _hint(bound, least, len(tested)),
        )
    certificate = Certificate(
        risk_of=bound.risk_of.value,
        risk=100 * bound.risk,
        confidence=100 * bound.confidence,
        rows=len(tested),
    )
    return passed, certificate


def passes(scorer: Scorer, exits: NDArray[np.int64], bound: Bound) -> bool:
    """Whether rows show, at the confidence of a bound, that the risk of a setting is within it.

    Args:
        scorer: the metric of the rows, which are in random order.
        exits: `[rows]` where the setting stops them.
        bound: what is asked for.
    """
    level = 1 - bound.confidence
    lost = losses(scorer, bound.risk_of)[scorer.rows.at(exits)]
    if p_value(lost, bound.risk, level) > level:
        return False
    if scorer.is_row_mean or bound.risk_of is RiskOf.DISAGREEMENT:
        return True
    # A bootstrap alone would take rows without any change for certainty.
    _, high = drop_interval(scorer, exits, level_of(bound.confidence), _RESAMPLES)
    return high <= 100 * bound.risk


def _path(
    costs: StoppingCosts,
    bound: Bound,
    rules: Sequence[str],
    measures: Sequence[Measure],
    seed: int,
) -> Family:
    """The settings to test: those of the rule that is fastest on the rows that fix the path."""
    # Thresholds that are fitted per exit are left out: they have no cautious start.
    families = _joined(make_families(costs, rules, measures, seed, per_exit=False))
    if not families:
        raise InputError(
            "no setting of these rules can be tried on these rows", "name other `rules`"
        )
    if len(families) == 1:
        return families[0]

    def fastest(family: Family) -> float:
        rule = Search(costs, [family], seed).choose(bound.as_goal(), [family.kind])
        exits = exits_of(rule or Budget(exit=costs.rows.exits[-1]), costs.rows)
        return float(costs.costs[costs.rows.at(exits)].mean())

    return min(families, key=fastest)


def _joined(families: Sequence[Family]) -> list[Family]:
    """The same settings; families of one setting, such as PABEE's patiences, become one path."""
    found = [family for family in families if len(family.exits) > 1]
    single: dict[str, list[Family]] = {}
    for family in families:
        if len(family.exits) == 1:
            single.setdefault(family.kind, []).append(family)
    for kind, members in single.items():
        members.sort(key=lambda family: -float(family.exits.mean()))
        exits = np.concatenate([family.exits for family in members])
        found.append(Family(kind, exits, [family.rules[0] for family in members]))
    return found


def _hint(bound: Bound, least: float, tested: int) -> str:
    """What makes a certificate possible, if the most cautious setting lost `least`."""
    if least >= bound.risk:
        return "allow a larger `risk`, or a lower `confidence`"
    needed = bound.rows_needed
    if least > 0:
        deviation = math.sqrt(least) / (bound.risk - least)
        needed = max(needed, math.ceil((NormalDist().inv_cdf(bound.confidence) * deviation) ** 2))
    if needed <= tested:  # an estimate that these rows have shown to be too small
        needed = 2 * tested
    rows = math.ceil(needed / (1 - _PATH_SHARE))
    return f"give about {rows} rows, or a larger `risk`"
