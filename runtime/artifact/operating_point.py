"""Operating points, the part of the manifest that calibration writes."""

from __future__ import annotations

from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]

RuleSettings = dict[str, str | int | float | tuple[float, ...] | None]
"""An exit rule as `ExitRule.to_dict` writes it."""


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """A guarantee on new rows from the same source (Learn then Test, arXiv 2110.01052).

    Attributes:
        risk_of: `disagreement` with full depth, or `drop` of the score.
        risk: upper bound of the expected risk, in points.
        confidence: probability over the calibration rows that the bound holds, in percent.
        rows: rows that the bound was tested on; other rows fixed which settings were tested.
    """

    risk_of: str
    risk: float
    confidence: float
    rows: Count


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """The goal of an operating point: give one of `max_drop` and `speedup`.

    Attributes:
        max_drop: largest drop of the metric in points (0.5 is 0.005 of a score); the fastest
            setting within it is chosen. None, the default, if `speedup` is given.
        guaranteed: whether the drop must be within `max_drop` with 95 % confidence, instead of by
            its estimate; default: no.
        speedup: least estimated speed-up, such as 2.0 for half the time; the setting with the
            smallest drop is chosen. None, the default, if `max_drop` is given.
    """

    max_drop: float | None = None
    guaranteed: bool = False
    speedup: float | None = None

    def __str__(self) -> str:
        if self.max_drop is None:
            return f"at least {self.speedup:g} times as fast"
        bound = ", with 95 % confidence" if self.guaranteed else ""
        return f"drop at most {self.max_drop:g} points{bound}"


class OperatingPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A named rule with its settings, and how it performed on its target.

    Attributes:
        rule: name and settings, as `ExitRule.from_dict` reads them.
        goal: the goal it was chosen for; None: it was chosen for the bound of its certificate.
        metric: name of the score, which ranges from 0 to 1 (Matthews correlation from -1).
        score: score with the rule, on rows that did not choose it.
        full_depth_score: score of the last exit on the same rows.
        drop_interval: 95 % interval of the drop in points: a paired bootstrap, widened if very
            few rows change. If the point is guaranteed, the upper end is the one-sided bound at
            the confidence of the guarantee.
        held_out: the rows of the scores: cross-validated parts, another file, or the rows that
            tested a certificate.
        rows: number of these rows.
        data_sha256: SHA-256 of the rows that chose the rule: texts and labels.
        mean_depth: layers that ran for a row, on average; as all figures below, on all of the rows
            that chose the rule.
        exits: how many of these rows stopped at each exit.
        measured_speedup: run time at full depth over that with the rule, by batch size: 1 for rows
            one by one, a larger number for windows of 128 rows.
        versions: versions of the libraries that measured it.
        certificate: a bound on the risk, if the point is guaranteed.
    """

    rule: RuleSettings
    goal: Goal | None
    metric: str
    score: float
    full_depth_score: float
    drop_interval: tuple[float, float]
    held_out: str
    rows: Count
    data_sha256: Sha256
    mean_depth: Annotated[float, msgspec.Meta(ge=0)]
    exits: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    measured_speedup: dict[str, float] = {}
    versions: dict[str, str] = {}
    certificate: Certificate | None = None
