"""Rules, goals and drops in a few words, for tables."""

from __future__ import annotations

import math

from ...runtime.artifact.operating_point import Certificate, Goal
from ...runtime.artifact.quick import QuickCosts
from ...runtime.rules.rules import Budget
from ..exact import share_interval
from ..result import Calibration, Outcome, Point
from ..scoring import AGREEMENT, ROW_MEANS


def exit_0_in_words(point: Point) -> str:
    """What exit 0 answers: `86 % of rows; 3 of 415 such answers changed`.

    The share is that of the setting that will run. Rows that chose it would flatter the count of
    changed answers, so that is of the rows that `held_out` is about.
    """
    runs = point.chosen_on
    held = point.held_out
    answered, *_ = runs.exits
    judged, *_ = held.exits
    if not answered:
        return "no row"
    share = f"{100 * answered / runs.rows:.0f} % of rows"
    if not judged:
        return share
    return f"{share}; {held.exit_0_changed} of {judged:,} such answers changed"


def promise_in_words(point: Point, result: Calibration) -> str:
    """What a point promises, or why it promises nothing, and how it did on other rows."""
    held = point.held_out
    goal = point.goal
    if point.refusal:
        return f"No guarantee: every text runs through all layers, since {point.refusal}"
    is_full_depth = point.rule == Budget(exit=result.rows.exits[-1])
    if is_full_depth and point.certificate is None:
        return (
            "nothing is lost, but these rows confirm no faster setting: give more rows, or allow a "
            "larger drop"
        )
    where = "rows that did not choose it" if result.test is None else result.held_out
    judged = f"{_lost_in_words(held, point.certificate)} on {where}"
    if point.bounds_only_flags(result.rows):
        judged += f", and {held.relabelled:,} answers, which nothing bounds"
    if not result.is_judged(point):
        judged = (
            "its drop on other rows is not known, because four fifths of these rows confirm no "
            "faster setting: give separate rows as `test`"
        )
    if point.certificate is not None:
        tested = tested_in_words(point.certificate, len(result.rows), "texts")
        about = "" if held.metric in ROW_MEANS else " (about)"  # see `guarantee`
        only = "only at full depth, since no faster setting passed: " if is_full_depth else ""
        return f"{only}on new texts {point.certificate}{about}, {tested}; {judged}"
    # Compared as it is printed, so that the line does not contradict itself.
    drop = round(held.drop, 2)
    if isinstance(goal, Goal) and goal.max_drop is not None and drop > goal.max_drop:
        # As many as make half of the interval as wide as the goal.
        low, high = held.interval
        times = max(2, math.ceil(((high - low) / 2 / max(goal.max_drop, 0.1)) ** 2))
        return (
            f"{judged}, more than the goal of {goal.max_drop:g}; about {times * held.rows} rows "
            "would tell more"
        )
    return judged


def passes_in_words(costs: QuickCosts, quick: str, exact: str, items: str) -> str:
    """What a quick pass does and costs.

    Args:
        costs: those of the operating point.
        quick: the target of its quick pass.
        exact: that of its exact pass.
        items: what runs: texts, or documents.
    """
    words = [
        f"{items} run in {quick} first, and {100 * costs.doubt_share:.1f} % of them, which are in "
        f"doubt at its last exit, again in {exact}"
    ]
    if costs.time_share is not None:
        percent = f"{100 * costs.time_share:.0f} %"
        words.append(f"this takes {percent} of the time of all layers in {exact}")
    if costs.p99_share is not None:
        words.append(
            f"the 99th percentile of single {items} is {costs.p99_share:.2f} times that of all "
            "layers"
        )
    return "; ".join(words)


def share_interval_in_words(count: int, rows: int, certificate: Certificate | None) -> str:
    """Where the share of all texts or queries probably is: `(95 %: 0.08 to 2.44 %)`.

    Args:
        count: how many there were.
        rows: among how many.
        certificate: what the line says before, whose confidence is not named again.
    """
    low, high = share_interval(count, rows)
    return _interval(f"{100 * low:.2f} to {100 * high:.2f} %", certificate)


def tested_in_words(certificate: Certificate, units: int, what: str) -> str:
    """How many texts or queries tested a certificate, and why not all: `tested on 9 of 10 texts`.

    Args:
        certificate: the certificate.
        units: how many there were.
        what: what they are called.
    """
    promises = certificate.promises
    rows = " and ".join(f"{each.rows:,}" for each in promises)
    tested = f"tested on {rows} of {units:,} {what}"
    # A promise about a label is tested on those of them that it is about.
    if all(each.label is None and each.rows < units for each in promises):
        tested += " (all of them would allow no more changes)"  # see `useful_rows`
    return tested


def _interval(interval: str, certificate: Certificate | None) -> str:
    is_named = certificate is not None and round(certificate.confidence, 2) == 95
    return f"({'at this confidence' if is_named else '95 %:'} {interval})"


def _lost_in_words(held: Outcome, certificate: Certificate | None) -> str:
    if held.metric == AGREEMENT:
        changed = held.changed_answers
        interval = share_interval_in_words(changed, held.rows, certificate)
        return f"{changed} of {held.rows:,} decisions changed {interval}"
    low, high = held.interval
    interval = _interval(f"{_lost(low).removesuffix(' lost')} to {_lost(high)}", certificate)
    return f"{_lost(held.drop, ' points')} {interval}"


def _lost(points: float, unit: str = "") -> str:
    # Rounded first, so that nothing is not a gain.
    return f"{abs(points):.2f}{unit} {'gained' if round(points, 2) < 0 else 'lost'}"
