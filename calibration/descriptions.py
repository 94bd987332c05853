"""Rules and drops in a few words, for tables."""

from __future__ import annotations

import math

from ..runtime.artifact.operating_point import Goal
from ..runtime.rules.rules import Budget
from ..runtime.rules.words import rule_in_words as rule_in_words
from .outcome import Outcome, level_of
from .result import Calibration, Point, RuleComparison
from .risk import RiskOf
from .scoring import ROW_MEANS


def drop_in_words(held: Outcome) -> str:
    """A drop in points with its interval: `+0.23 (-0.80 to +1.15)`."""
    return f"{held.drop:+.2f} ({held.interval[0]:+.2f} to {held.interval[1]:+.2f})"


def exit_0_in_words(found: Point | RuleComparison) -> str:
    """What exit 0 answers: `86 % of rows, 0.4 % of them unlike full depth`.

    The first share is that of the setting that will run. Rows that chose it would flatter the
    second one, so that is of the rows that `held_out` is about.
    """
    runs, held = found.chosen_on, found.held_out
    if not runs.exits[0]:
        return "no row"
    share = f"{100 * runs.exits[0] / runs.rows:.0f} % of rows"
    if held.exit_0_changed is None or not held.exits[0]:
        return share
    return f"{share}, {100 * held.exit_0_changed / held.exits[0]:.1f} % of them unlike full depth"


def promise_in_words(point: Point, result: Calibration) -> str:
    """What a point promises, and what would help if its goal is not met."""
    held, goal = point.held_out, point.goal
    low, high = held.interval
    if point.rule == Budget(exit=result.rows.exits[-1]):
        help = point.refusal.replace("`", "") or "give more rows, or allow a larger drop"
        return f"nothing is lost, but these rows confirm no faster setting: {help}"
    certificate, level = point.certificate, 95.0
    if certificate is not None:
        level = 100 * level_of(certificate.confidence / 100)
    where = "rows that did not choose it" if result.test is None else result.held_out
    found = (
        f"on {where}: {_lost(held.drop, ' points')} ({level:g} %: {_lost(low)} to {_lost(high)})"
    )
    if certificate is not None:
        disagrees = certificate.risk_of == RiskOf.DISAGREEMENT
        about = "" if disagrees or held.metric in ROW_MEANS else "about "
        what = "% of answers changed" if disagrees else "points lost"
        promise = (
            f"at most {certificate.risk:g} {what} on new rows, "
            f"with {about}{certificate.confidence:g} % confidence"
        )
        if result.test is not None:
            return f"{promise}; {found}"
        return f"{promise}, tested on {certificate.rows} other rows"
    # Compared as it is printed, so that the line does not contradict itself.
    drop = round(held.drop, 2)
    if isinstance(goal, Goal) and goal.max_drop is not None and drop > goal.max_drop:
        # As many as make half of the interval as wide as the goal.
        times = max(2, math.ceil(((high - low) / 2 / max(goal.max_drop, 0.1)) ** 2))
        return (
            f"{found}, more than the goal of {goal.max_drop:g}; about {times * held.rows} rows "
            "would tell more"
        )
    return found


def _lost(points: float, unit: str = "") -> str:
    return f"{abs(points):.2f}{unit} {'gained' if points < 0 else 'lost'}"
