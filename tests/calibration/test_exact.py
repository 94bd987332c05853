"""Tests of shares hold their level exactly."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from fpabee.calibration.exact import (
    binomial_tail,
    most_losses,
    rows_needed,
    share_interval,
    useful_rows,
)


@pytest.mark.parametrize(("rows", "share", "level"), [(60, 0.05, 0.05), (40, 0.2, 0.01)])
def test_a_setting_at_the_bound_passes_with_the_level_at_most(
    rows: int, share: float, level: float
) -> None:
    """All results are enumerated, for many probabilities of a gain."""
    most = most_losses(rows, share, level, with_gains=True)
    sizes = []
    for won in np.linspace(0, (1 - share) / 2, 60):
        results = [
            (losses, gains) for gains in range(rows + 1) for losses in range(rows + 1 - gains)
        ]
        sizes.append(
            sum(
                comb(rows, losses)
                * (share + won) ** losses
                * comb(rows - losses, gains)
                * won**gains
                * (1 - share - 2 * won) ** (rows - losses - gains)
                for losses, gains in results
                if losses <= most[gains]
            )
        )
    assert max(sizes) <= 1.001 * level
    assert np.mean(sizes) > 0.7 * level, "no power is given away"
    assert most[0] == most_losses(rows, share, level)[0], "no gain: the binomial test"


@pytest.mark.parametrize("count", [0, 2, 40])
def test_the_binomial_tail_is_exact(count: int) -> None:
    tail = sum(comb(872, k) * 0.01**k * 0.99 ** (872 - k) for k in range(count + 1))
    assert binomial_tail(count, 872, 0.01) == pytest.approx(tail)
    if count < 40:  # without gains, as many losses pass as the tail allows
        assert most_losses(872, 0.01, 0.999 * tail) == [count - 1]
        assert most_losses(872, 0.01, 1.001 * tail) == [count]


@pytest.mark.parametrize(
    ("rows", "useful"), [(298, 298), (299, 299), (472, 299), (473, 473), (627, 473)]
)
def test_rows_that_allow_no_further_loss_are_of_no_use(rows: int, useful: int) -> None:
    assert useful_rows(rows, 0.01, 0.05) == useful


@pytest.mark.parametrize(
    ("share", "level", "expected"),
    # Without a loss, and for a chance of 80 % at half of the bound, as in the docs.
    [(0.01, 0.05, (299, 1960)), (0.02, 0.05, (149, 980)), (0.005, 0.05, (598, 3900))],
)
def test_the_rows_that_are_needed(share: float, level: float, expected: tuple[int, int]) -> None:
    assert rows_needed(share, level) == expected


def test_the_interval_of_a_share_is_exact() -> None:
    assert share_interval(0, 293) == pytest.approx((0, 0.01251), abs=1e-5)
    assert share_interval(3, 293) == pytest.approx((0.00212, 0.02963), abs=1e-5)
    assert share_interval(293, 293)[1] == 1
