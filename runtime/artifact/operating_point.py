"""Operating points, the part of the manifest that calibration writes."""

from __future__ import annotations

from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]

RuleSettings = dict[str, str | int | float | tuple[float, ...] | None]
"""An exit rule as `ExitRule.to_dict` writes it."""


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """A bound of a guarantee on new texts.

    Attributes:
        of: `drop` of the metric; `changed_answers`: decisions that differ from those of the
            reference, which is full depth unless the folder came from another classifier; `missed`:
            of the texts for which the reference flags a label, those for which it is not flagged;
            or `false_alarms`: of the other texts, those for which it is flagged.
        at_most: the bound, in points or percent.
        label: the label that is flagged; None for a drop and for changed answers.
        rows: how many texts it was tested on.
    """

    of: str
    at_most: float
    label: str | None = None
    rows: Annotated[int, msgspec.Meta(ge=0)] = 0

    def __str__(self) -> str:
        if self.of == "drop":
            return f"a drop of at most {self.at_most:g} points"
        about = "" if self.label is None else f" of {self.label!r}"
        return f"at most {self.at_most:g} % {self.of.replace('_', ' ')}{about}"


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """A guarantee on new texts from the same source (Learn then Test, arXiv 2110.01052).

    Attributes:
        confidence: probability over the calibration rows that all promises hold, in percent.
        promises: what is bounded; they hold together.
        label_thresholds: the probability above which a label is flagged, by label; the promises
            hold for these thresholds only.
        full_depth_changes: an upper bound on the percentage of texts for which this target at full
            depth decides otherwise than the reference, at the same confidence; 0 if full depth is
            the reference.
    """

    confidence: float
    promises: tuple[Promise, ...]
    label_thresholds: dict[str, float] = {}
    full_depth_changes: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0

    def __str__(self) -> str:
        *most, last = map(str, self.promises)
        words = f"{', '.join(most)} and {last}" if most else last
        return f"{words}, with {self.confidence:.4g} % confidence"


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """The goal of an operating point: give one of `max_drop` and `speedup`.

    Attributes:
        max_drop: largest drop of the metric in points (0.5 is 0.005 of a score); the fastest
            setting within it is chosen. None, the default, if `speedup` is given.
        speedup: least estimated speed-up, such as 2.0 for half the time; the setting with the
            smallest drop is chosen. None, the default, if `max_drop` is given.
    """

    max_drop: float | None = None
    speedup: float | None = None

    def __str__(self) -> str:
        if self.max_drop is None:
            return f"at least {self.speedup:g} times as fast"
        return f"drop at most {self.max_drop:g} points"


class QuickPass(msgspec.Struct, frozen=True, kw_only=True):
    """The first pass of an operating point, in a target that is faster than the point's own.

    Texts run in this target, with exits. Those that are still in doubt at its last exit run again,
    all layers, in the target of the point: the exact pass.

    Attributes:
        target: the target that runs first.
        sha256: what decides the logits of that target, see `logits_sha256`. The point holds for
            these logits only.
        p99_share: of rows that run one by one, the 99th percentile of their times, divided by the
            99th percentile at full depth in the exact target. It may be more than 1, because a row
            in doubt runs twice. None: not measured, as for rankings.
        alone: the name of the point of the same target that does without the quick pass, for
            machines that cannot run it; empty if the target has no such point.
    """

    target: str
    sha256: Sha256
    p99_share: Annotated[float, msgspec.Meta(ge=0)] | None = None
    alone: str = ""


class OperatingPoint(msgspec.Struct, frozen=True, kw_only=True):
    """A named rule with its settings, and how it performed on its target.

    Attributes:
        rule: name and settings, as `ExitRule.from_dict` reads them.
        goal: the goal it was chosen for; None: it was asked to have a certificate.
        metric: name of the score, which ranges from 0 to 1 (Matthews correlation from -1).
        score: score with the rule, on rows that neither chose nor certified it.
        full_depth_score: score of the last exit on the same rows.
        drop_interval: 95 % interval of the drop in points: a paired bootstrap, widened if very
            few rows change.
        held_out: the rows of the scores: cross-validated parts, each with the setting that the
            other parts choose or certify, or another file.
        rows: number of these rows.
        data_sha256: SHA-256 of the rows that chose the rule: texts and labels.
        mean_depth: layers that ran for a row, on average; as all figures below, on all of the rows
            that chose the rule.
        exits: how many of these rows stopped at each exit.
        measured_speedup: run time at full depth over that with the rule, by batch size: 1 for rows
            one by one, a larger number for windows of 128 rows.
        versions: versions of the libraries that measured it.
        hardware: the GPU that measured it, or the CPU and how many threads.
        certificate: the guarantee; None if none was asked for, or if the rows confirm none.
        quick: the pass in a faster target that runs first; unset: there is none, as in all points
            of fpabee 1.0. The exits of the point are then those of the quick pass, and one more,
            where the exact pass ends. The rule has a threshold for each of them.
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
    hardware: str = ""
    certificate: Certificate | None = None
    # Left out of the JSON if it is unset, so that folders of 1.0 keep their revision.
    quick: QuickPass | msgspec.UnsetType = msgspec.UNSET
