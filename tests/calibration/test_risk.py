"""Risk control: tests that hold at their level, and a guarantee that holds on a population."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fpabee.calibration.choose import Selector
from fpabee.calibration.risk import Bound, RiskOf, _hint, certify, control, losses, p_value, path_of
from fpabee.calibration.scoring import Rows, Scorer
from fpabee.calibration.settings import Candidate, Settings
from fpabee.calibration.stop_scores import StopScores, families
from fpabee.calibration.stopping_costs import StoppingCosts
from fpabee.calibration.sweep import Sweep
from fpabee.runtime import Budget, InputError, ProblemType

CALIBRATIONS = 2000


def population(make_rows: Callable[..., Rows], risk_of: RiskOf) -> tuple[NDArray[np.float32], ...]:
    """Losses and costs `[settings, rows]` of entropy's thresholds on 40,000 rows."""
    rows = make_rows(count=40_000, seed=9)
    (family,) = families(StopScores(rows), ["entropy"], [])
    sweep = Sweep(family, np.unique(np.quantile(family.scores[:-1], np.linspace(0, 1, 30))))
    each = losses(Scorer(rows, "accuracy"), risk_of)
    numbers = np.arange(len(rows))
    stops = [sweep.exits(number) for number in range(len(sweep.grid))]
    found = np.array([each[exits - 1, numbers] for exits in stops])
    return found.astype(np.float32), (np.array(stops) / rows.exits).astype(np.float32)


@pytest.mark.parametrize(("risk_of", "risk"), [("disagreement", 0.05), ("drop", 0.05)])
def test_the_guarantee_holds_on_a_population_with_known_risk(
    make_rows: Callable[..., Rows], risk_of: str, risk: float
) -> None:
    """Over 2,000 calibrations: violations within 5 % and chance, most of the oracle's saving."""
    bound = Bound(risk, 0.95, RiskOf(risk_of))
    all_losses, all_costs = population(make_rows, bound.risk_of)
    risks, costs = all_losses.mean(axis=1), all_costs.mean(axis=1)
    oracle = 1 - costs[risks <= risk].min()
    generator = np.random.default_rng(0)
    violations, savings = 0, np.zeros(CALIBRATIONS)
    for number in range(CALIBRATIONS):
        drawn = generator.integers(0, all_losses.shape[1], 3000)
        ordering, tested = drawn[:1200], drawn[1200:]
        settings = Settings(
            sums=np.zeros((len(risks), 0)),
            costs=all_costs[:, ordering].mean(axis=1, dtype=np.float64),
            drops=all_losses[:, ordering].mean(axis=1, dtype=np.float64),
            full_cost=1.0,
            candidate=lambda number: Candidate(Budget(exit=1)),
        )
        path = path_of(settings)
        last = certify(all_losses[path][:, tested].astype(np.float64), bound)
        if last is not None:
            violations += risks[path[last]] > risk
            savings[number] = 1 - costs[path[last]]
    assert violations / CALIBRATIONS <= 0.065
    assert savings.mean() >= 0.8 * oracle


@pytest.mark.parametrize(("lost", "won"), [(0.02, 0.0), (0.05, 0.03), (0.3, 0.28)])
def test_p_values_hold_their_level_at_the_edge(lost: float, won: float) -> None:
    generator = np.random.default_rng(2)
    draws = generator.random((4000, 800))
    sample = (draws < lost).astype(float) - (draws > 1 - won)
    rejected = p_value(sample, lost - won, 0.05) <= 0.05
    assert rejected.mean() <= 0.06


def test_the_binomial_tail_is_exact() -> None:
    sample = np.zeros((3, 872))
    sample[1, :2] = 1
    sample[2, :40] = 1
    values = p_value(sample, 0.01, 0.05)
    assert values[0] == pytest.approx(0.99**872)
    terms = [0.99**872, 872 * 0.01 * 0.99**871, 872 * 871 / 2 * 0.0001 * 0.99**870]
    assert values[1] == pytest.approx(sum(terms))
    assert values[2] == pytest.approx(1.0)


def test_testing_ends_at_the_first_failure() -> None:
    sequence = np.zeros((3, 872))
    sequence[1, :30] = 1  # fails; what comes after is not looked at
    assert certify(sequence, Bound(0.01, 0.95)) == 0
    assert certify(sequence[1:], Bound(0.01, 0.95)) is None
    # 872 rows allow three errors at 1 %.
    sequence[1] = np.arange(872) < 3
    sequence[2] = np.arange(872) < 4
    assert certify(sequence, Bound(0.01, 0.95)) == 1


def selector(rows: Rows, metric: str) -> Selector:
    costs = np.repeat(np.arange(1.0, rows.exits + 1)[:, None], len(rows), axis=1)
    swept = list(families(StopScores(rows), ["entropy", "fpabee"], []))
    return Selector(StoppingCosts(rows, metric, costs), swept or [])


def test_control_certifies_a_rule_that_stops_early(make_rows: Callable[..., Rows]) -> None:
    rows = make_rows(count=6000)
    for metric, risk_of in (("accuracy", RiskOf.DROP), ("agreement", RiskOf.DISAGREEMENT)):
        found = control(selector(rows, metric), ["entropy"], Bound(0.04, 0.95, risk_of))
        assert found.certificate.risk_of == risk_of.value
        assert (found.certificate.risk, found.certificate.confidence) == (4.0, 95.0)
        assert found.certificate.rows == len(found.tested) == 3600
        assert found.candidate.rule.name == "entropy"


def test_too_few_rows_say_how_many_are_needed(make_rows: Callable[..., Rows]) -> None:
    with pytest.raises(InputError, match=r"no setting is certain.*120 rows tested it.*larger"):
        control(selector(make_rows(count=200), "accuracy"), ["entropy"], Bound(0.01, 0.95))
    # No loss in n rows: 0.98^n <= 0.05 needs n = 149 of those that test, which are 60 %.
    sure = make_rows(count=200)
    sure.logits[...] = sure.logits[-1]
    with pytest.raises(InputError, match=r"lost 0\.00 points -> give about 249 rows"):
        control(selector(sure, "accuracy"), ["entropy"], Bound(0.02, 0.95))


def test_more_rows_are_asked_for_than_have_failed() -> None:
    # By the formula 299 rows without a loss do, but 480 just did not: 960 are to test.
    assert _hint(Bound(0.01, 0.95), 0.0, 480) == "give about 1600 rows, or more risk"
    assert _hint(Bound(0.01, 0.95), 0.0, 120) == "give about 499 rows, or more risk"


def test_the_drop_of_an_f1_has_no_loss_of_a_row(make_rows: Callable[..., Rows]) -> None:
    rows = make_rows(problem_type=ProblemType.MULTI_LABEL)
    with pytest.raises(InputError, match=r"micro_f1 is no mean over rows.*--risk-of disagreement"):
        losses(Scorer(rows, "micro_f1"), RiskOf.DROP)


@pytest.mark.parametrize(("risk", "confidence"), [(0.0, 0.95), (1.0, 0.95), (0.01, 1.0)])
def test_bounds_that_make_no_sense_are_refused(risk: float, confidence: float) -> None:
    with pytest.raises(InputError, match="more than 0 and less than 100"):
        Bound(risk, confidence)
