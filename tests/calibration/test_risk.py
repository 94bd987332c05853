"""Risk control: tests that hold their level, and a guarantee that holds on a population."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fpabee.calibration.choose import Settings
from fpabee.calibration.risk import (
    Bound,
    RiskOf,
    _remedy,
    certify,
    control,
    losses,
    p_value,
    path_of,
)
from fpabee.calibration.scoring import LabelledLogits, Scorer
from fpabee.calibration.sweep import StopScores
from fpabee.runtime import Budget, InputError, ProblemType

from .conftest import make_selector

CALIBRATIONS = 2000


def population(
    make_rows: Callable[..., LabelledLogits], risk_of: RiskOf
) -> tuple[NDArray[np.float32], ...]:
    """Losses and costs `[settings, rows]` of entropy's thresholds on 40,000 rows."""
    rows = make_rows(count=40_000, seed=9)
    (family,) = StopScores(rows).families(["entropy"], [])
    family.grid = np.unique(np.quantile(family.scores[:-1], np.linspace(0, 1, 30)))
    each = losses(Scorer(rows, "accuracy"), risk_of)
    numbers = np.arange(len(rows))
    stops = [family.exits(number) for number in range(len(family.grid))]
    found = np.array([each[exits - 1, numbers] for exits in stops])
    return found.astype(np.float32), (np.array(stops) / rows.exits).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("risk_of", "risk"), [("disagreement", 0.05), ("drop", 0.05)])
def test_the_guarantee_holds_on_a_population_with_known_risk(
    make_rows: Callable[..., LabelledLogits], risk_of: str, risk: float
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
            rule=lambda number: Budget(exit=1),
        )
        path = path_of(settings)
        last = certify(all_losses[path][:, tested].astype(np.float64), bound)
        if last is not None:
            violations += risks[path[last]] > risk
            savings[number] = 1 - costs[path[last]]
    assert violations / CALIBRATIONS <= 0.065
    assert savings.mean() >= 0.8 * oracle


@pytest.mark.parametrize(("lost", "won"), [(0.02, 0.0), (0.052, 0.002), (0.05, 0.03), (0.3, 0.28)])
def test_a_setting_at_the_bound_passes_in_at_most_5_percent(lost: float, won: float) -> None:
    """With 5.2 % lost and 0.2 % won, bets that knew their own row would pass in 12 %."""
    draws = np.random.default_rng(2).random((4000, 800))
    sample = (draws < lost).astype(float) - (draws > 1 - won)
    assert (p_value(sample, lost - won, 0.05) <= 0.05).mean() <= 0.05


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
    sequence[1, :30] = 1  # fails, so what comes after it does not matter
    assert certify(sequence, Bound(0.01, 0.95)) == 0
    assert certify(sequence[1:], Bound(0.01, 0.95)) is None
    # 872 rows allow three errors at 1 %.
    sequence[1] = np.arange(872) < 3
    sequence[2] = np.arange(872) < 4
    assert certify(sequence, Bound(0.01, 0.95)) == 1


def test_control_certifies_a_rule_that_stops_early(
    make_rows: Callable[..., LabelledLogits],
) -> None:
    rows = make_rows(count=6000)
    for metric, risk_of in (("accuracy", RiskOf.DROP), ("agreement", RiskOf.DISAGREEMENT)):
        found = control(make_selector(rows, metric), ["entropy"], Bound(0.04, 0.95, risk_of))
        assert found.certificate.risk_of == risk_of.value
        assert (found.certificate.risk, found.certificate.confidence) == (4.0, 95.0)
        assert found.certificate.rows == len(found.tested) == 3600
        assert found.rule.name == "entropy"


@pytest.mark.parametrize(
    ("count", "lost", "bound", "says"),
    [
        (200, True, Bound(0.01, 0.95), r"120 rows .* lost \d\.\d\d points -> .*larger risk"),
        # No loss in n rows: 0.98^n <= 0.05 needs n = 149 that test, which are 60 % of all.
        (200, False, Bound(0.02, 0.95), r"120 rows .* lost 0\.00 points -> give about 249 rows"),
    ],
)
def test_too_few_rows_say_how_many_are_needed(
    make_rows: Callable[..., LabelledLogits], count: int, lost: bool, bound: Bound, says: str
) -> None:
    rows = make_rows(count=count)
    if not lost:
        rows.logits[...] = rows.logits[-1]
    with pytest.raises(InputError, match=says):
        control(make_selector(rows), ["entropy"], bound)


def test_more_rows_are_asked_for_than_have_failed() -> None:
    # By the formula 299 rows without a loss suffice, but 480 just did not: 960 are to test.
    assert str(_remedy(Bound(0.01, 0.95), 0.0, 480)).startswith("give about 1600 rows")
    assert str(_remedy(Bound(0.01, 0.95), 0.0, 120)).startswith("give about 499 rows")


def test_the_drop_of_an_f1_has_no_loss_of_a_row(make_rows: Callable[..., LabelledLogits]) -> None:
    rows = make_rows(problem_type=ProblemType.MULTI_LABEL)
    with pytest.raises(InputError, match=r"micro_f1 is not a mean over rows.*risk_of disagreement"):
        losses(Scorer(rows, "micro_f1"), RiskOf.DROP)


@pytest.mark.parametrize(("risk", "confidence"), [(0.0, 0.95), (1.0, 0.95), (0.01, 1.0)])
def test_bounds_that_make_no_sense_are_refused(risk: float, confidence: float) -> None:
    with pytest.raises(InputError, match="more than 0 and less than 100"):
        Bound(risk, confidence)
