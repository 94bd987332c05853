"""How closely a target's logits, labels and exits agree with the fp32 PyTorch model.

The one place where two sets of logits are compared: by the export, by the check of a precision,
by the check of a built target, by the conversion of a classifier, by the check of a single file,
and by `Engine.check`. Needs only numpy.

A difference of logits is always measured against the size of their row: fp32 rounds in proportion
to the numbers that it adds, so a model with logits of 70 is as exact as one with logits of 7 if
its differences are ten times as large.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from .artifact.manifest import Manifest
from .errors import ArtifactError, CheckError
from .rules.measures import TINY, Array, Mask
from .rules.rules import ExitRule
from .tasks import Task
from .tasks.task import Tolerance

Logits = NDArray[np.float32]

EXPORT_LIMIT = 1e-4
"""How much the logits of an fp32 export may differ from those of the PyTorch model.

So may those of a row in two batches of OpenVINO: a head that reads the first token, which hardly
varies in early layers, subtracts large numbers that are almost equal.
"""

BATCH_LIMIT = 1e-5
"""How much the logits of a row in ONNX Runtime may change with the other rows and the padding."""

# If fewer are left, near ties are compared as well: a share of almost nothing proves nothing.
_LEAST_COMPARED = 0.1


@dataclass(frozen=True)
class Requirements:
    """How closely a target must agree with the model.

    Attributes:
        labels: least share of equal labels, see `Agreement.label_agreement`.
        exits: least share of rows with the same exit.
        tie: an absolute difference of logits that is expected from rounding to the precision.
            Where it could change a label, that label is a near tie and is not compared. Where
            `EXPORT_LIMIT` is more, it counts instead, because fp32 rounds as well.
        score_tie: the same for the scores of the exit rule, and for the exits of rows.
        logits: largest difference of a logit, see `logit_differences`; infinity: any finite
            difference is accepted.
        by_rule: whether the labels are the answers that the rule gives, one for each row, instead
            of the labels of all exits.
    """

    labels: float
    exits: float
    tie: float
    score_tie: float
    logits: float = np.inf
    by_rule: bool = False


# int8 is a different model rather than a different rounding: thresholds should be calibrated for
# it. So its answers are judged, and changed exits are only reported.
_INT8 = Requirements(labels=0.995, exits=0.0, tie=0.25, score_tie=0.0, by_rule=True)
REQUIREMENTS = {
    "fp32": Requirements(labels=0.999, exits=0.99, tie=1e-3, score_tie=0.01),
    "fp16": Requirements(labels=0.999, exits=0.99, tie=0.01, score_tie=0.01),
    "bf16": Requirements(labels=0.999, exits=0.99, tie=0.08, score_tie=0.01),
    "int8": _INT8,
    "int8-bf16": _INT8,
}
"""The requirements of a target, by its precision."""

EXPORT_REQUIREMENTS = Requirements(1.0, 1.0, tie=0.0, score_tie=0.0, logits=EXPORT_LIMIT)
"""The requirements of a fresh fp32 export, which runs where the PyTorch model ran."""

# A score moves by at most a few times as much as the logits.
_SCORE_PER_LOGIT = 10
# Another CPU or driver rounds differently from the one on which the tolerance was measured.
_SLACK = 10


def logit_sizes(logits: Logits) -> NDArray[np.float32]:
    """The sizes by which differences of logits are divided: the largest of a row, at least 1.

    Args:
        logits: `[..., labels]`.

    Returns:
        `[...]` float32; 1 where a logit is not finite, so that any other logit differs.
    """
    sizes = np.abs(logits).max(axis=-1, initial=1.0)
    return np.where(np.isfinite(sizes), sizes, 1.0).astype(np.float32)


def logit_differences(logits: Logits, expected: Logits) -> NDArray[np.float32]:
    """The largest difference of a logit in each row, divided by the size of the row.

    Args:
        logits: `[..., labels]`.
        expected: the same of the model, which give the sizes, see `logit_sizes`.

    Returns:
        `[...]` float32; NaN where a logit is not a number.
    """
    return np.asarray(np.abs(logits - expected).max(axis=-1, initial=0.0) / logit_sizes(expected))


def requirements_of(name: str, manifest: Manifest) -> Requirements:
    """The requirements of a target of a folder on the reference texts.

    Args:
        name: the target.
        manifest: that of the folder.

    Raises:
        ArtifactError: its precision is not known.
    """
    target = manifest.targets[name]
    if target.precision not in REQUIREMENTS:
        raise ArtifactError(
            f"target {name} has precision {target.precision!r}, which this fpabee does not know",
            "update fpabee",
        )
    required = REQUIREMENTS[target.precision]
    if required.by_rule:
        # Answers are judged when the target is built, on texts like those to classify. Texts of the
        # reference are odd, and not what the ranges of the values were made for.
        required = dataclasses.replace(required, labels=0.0)
    if target.tolerance is None:
        return required
    return dataclasses.replace(required, logits=max(_SLACK * target.tolerance, required.tie))


@dataclass(frozen=True)
class Agreement:
    """How closely a target agrees with the fp32 PyTorch model on some rows.

    Attributes:
        rows: how many rows were compared.
        max_logit_difference: largest difference of a logit, divided by the largest logit of its
            row if that is more than 1; NaN if one is not a number.
        label_agreement: share of (exit, row) pairs with the same labels, near ties left out; with
            `Requirements.by_rule`, of rows with the same answer at the exits where they stop.
        exit_agreement: share of rows with the same exit, near ties left out.
        near_ties: rows that were left out of either share. None are if hardly any would be left.
        required: the least shares and the largest difference with which the target passes.
        first_bad_exit: the first exit where logits, labels or the decision to stop differ too much;
            None if there is no such exit.
        labels_are_ties: whether hardly any label is not a near tie, so that near ties are compared
            as well, which proves little.
        exits_are_ties: the same of the exits.
    """

    rows: int
    max_logit_difference: float
    label_agreement: float
    exit_agreement: float
    near_ties: int
    required: Requirements
    first_bad_exit: int | None = None
    labels_are_ties: bool = False
    exits_are_ties: bool = False

    @property
    def passed(self) -> bool:
        """Whether the logits are finite and all requirements are met."""
        return bool(
            np.isfinite(self.max_logit_difference)
            and self.max_logit_difference <= self.required.logits
            and self.label_agreement >= self.required.labels
            and self.exit_agreement >= self.required.exits
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures in types that JSON has."""
        content = dataclasses.asdict(self) | {"passed": self.passed}
        for name in ("required", "first_bad_exit", "labels_are_ties", "exits_are_ties"):
            del content[name]
        return content

    def __str__(self) -> str:
        required = self.required
        limit = f" (at most {required.logits:.0e} allowed)" if np.isfinite(required.logits) else ""
        least_labels = f" (at least {required.labels:.1%} required)" if required.labels else ""
        what = "answers" if required.by_rule else "labels"
        least = f" (at least {required.exits:.0%} required)" if required.exits else ""
        ties = f"; near ties in {self.near_ties} of {self.rows} texts are not compared"
        only_ties = "are hardly anything but near ties, of which {:.2%} agree"
        labels = (only_ties if self.labels_are_ties else "agree for {:.2%}").format(
            self.label_agreement
        )
        exits = (only_ties if self.exits_are_ties else "for {:.2%}").format(self.exit_agreement)
        return (
            f"logits differ by {self.max_logit_difference:.2e} of their size{limit}, {what} "
            f"{labels}{least_labels}, exits {exits}{least}{ties if self.near_ties else ''}"
        )


def must_pass(agreement: Agreement, what: str, hint: str) -> None:
    """Refuse a target that does not pass.

    Args:
        agreement: what its check found.
        what: what the message says that the target does from the first bad exit on.
        hint: what to change.

    Raises:
        CheckError: the target does not pass.
    """
    if not agreement.passed:
        raise CheckError(
            f"{what} from exit {agreement.first_bad_exit} on ({agreement.rows} texts): {agreement}",
            hint,
        )


def compare(
    logits: Logits,
    expected: Logits,
    rule: ExitRule,
    task: Task,
    required: Requirements,
    first_exit: int = 1,
) -> Agreement:
    """Compare the logits of a target with those of the fp32 PyTorch model.

    Args:
        logits: `[exits, rows, labels]` float32 of the target.
        expected: the same of the model.
        rule: the rule whose exits are compared.
        task: what the labels are, and their thresholds.
        required: how closely they must agree, and what is a near tie.
        first_exit: the exit of the first logits.
    """
    finite = np.asarray(np.isfinite(logits).all(axis=-1))
    differences = logit_differences(logits, expected)
    logits = np.where(np.isfinite(logits), logits, 0.0).astype(np.float32)
    rounding = EXPORT_LIMIT * logit_sizes(expected)
    tie = np.maximum(required.tie, rounding)
    score_tie = np.maximum(required.score_tie, _SCORE_PER_LOGIT * rounding)

    exits, expected_exits = (task.simulate(z, rule, first_exit).exits for z in (logits, expected))
    same_exits = (exits == expected_exits) & finite.all(axis=0)
    exit_ties = exits_near_ties(expected, rule, task, tie, first_exit, score_tie)
    close_exits = _few_enough(exit_ties)
    exit_agreement = _share(same_exits[~close_exits])

    # The exits whose labels are compared: `[exits, rows]` all, or `[1, rows]` where rows stop.
    every = np.arange(first_exit, first_exit + len(logits))[:, None]
    at = expected_at = np.broadcast_to(every, finite.shape)
    if required.by_rule:
        at = exits[None]
        expected_at = expected_exits[None]
    rows = np.arange(logits.shape[1])
    places = (at - first_exit, rows)
    expected_places = (expected_at - first_exit, rows)
    answers = task.answers(logits)[places]
    same_labels = task.same(answers, task.answers(expected)[expected_places]) & finite[places]
    label_ties = task.near_ties(expected, tie)[expected_places] & finite[places]
    ties = _few_enough(label_ties)

    bad = ~finite | ~(differences <= required.logits)
    bad_exits = {*(np.flatnonzero(bad.any(axis=1)) + first_exit)}
    bad_exits |= {*np.minimum(at, expected_at)[~same_labels & ~ties]}
    if exit_agreement < required.exits or not bad_exits:
        # For a row that stops at another exit, the first exit where only one of the two stops it.
        bad_exits |= {*np.minimum(exits, expected_exits)[~(same_exits | close_exits)]}
    return Agreement(
        rows=logits.shape[1],
        max_logit_difference=float(differences.max(initial=0.0)),
        label_agreement=_share(same_labels[~ties]),
        exit_agreement=exit_agreement,
        near_ties=int((ties.any(axis=0) | close_exits).sum()),
        required=required,
        first_bad_exit=int(min(bad_exits)) if bad_exits else None,
        labels_are_ties=bool(label_ties.any() and not ties.any()),
        exits_are_ties=bool(exit_ties.any() and not close_exits.any()),
    )


def exits_near_ties(
    logits: Logits,
    rule: ExitRule,
    task: Task,
    tolerance: Tolerance,
    first_exit: int = 1,
    score_tolerance: Tolerance | None = None,
) -> Mask:
    """Which rows may leave at another exit if logits and scores move by a tolerance: `[rows]`.

    A score moves by at most a few times as much as the logits, and less if it is small, so its
    tolerance is by default ten times as large, times the root of thresholds below 1.
    """
    is_relative = score_tolerance is None
    moved = _SCORE_PER_LOGIT * np.asarray(tolerance) if score_tolerance is None else score_tolerance
    unsure = np.zeros(logits.shape[1], np.bool_)
    for by, rows in _by_movement(np.broadcast_to(moved, logits.shape[:2]).max(axis=0, initial=0.0)):
        low, high = (
            task.simulate(logits[:, rows], shifted(rule, each, is_relative), first_exit).exits
            for each in (-by, by)
        )
        unsure[rows] = low != high
    if rule.uses_labels:
        unsure |= task.near_ties(logits, tolerance).any(axis=0)
    return unsure


def shifted(rule: ExitRule, by: float, is_relative: bool = False) -> ExitRule:
    """A rule with all its thresholds moved by `by`, up if more rows shall stop.

    A row whose scores change by less than the thresholds stops no earlier and no later than under
    the rule shifted up and the rule shifted down.

    Args:
        rule: the rule.
        by: how far.
        is_relative: whether a threshold below 1 moves only by `by` times its root. When logits
            change a little, small scores change less than large ones: entropies and 1 - max p in
            proportion to themselves, and divergences in proportion to their root.
    """

    def movement(thresholds: Array) -> Array:
        return by * np.sqrt(np.clip(thresholds, 0, 1)) if is_relative else np.asarray(by)

    moved = rule.with_stop_threshold(rule.stop_thresholds + movement(rule.stop_thresholds))
    if rule.exit_0_threshold is None:
        return moved
    # A confidence is from 0 to 1, so nothing changes beyond the limits of the setting.
    downwards = float(movement(np.asarray(1 - rule.exit_0_threshold)))
    limit = min(max(rule.exit_0_threshold - downwards, 0.0), 2.0)
    return msgspec.structs.replace(moved, exit_0_threshold=limit)


def _by_movement(moved: Array) -> Iterator[tuple[float, NDArray[np.intp]]]:
    """Rows whose scores move about as much, because a rule is shifted for many rows at once.

    Args:
        moved: `[rows]` by how much the scores of each row move.

    Yields:
        The least movement times a power of two, and the rows that move by no more than that, but
        by more than half of it.
    """
    least = max(float(moved.min(initial=np.inf)), TINY)
    doublings = np.ceil(np.log2(np.maximum(moved, least) / least))
    for doubling in np.unique(doublings):
        yield least * 2.0 ** float(doubling), np.flatnonzero(doublings == doubling)


def _few_enough(ties: Mask) -> Mask:
    """The near ties to leave out: none if hardly anything would be left."""
    enough = ties.size == 0 or 1 - ties.mean() >= _LEAST_COMPARED
    return ties if enough else np.zeros_like(ties)


def _share(values: Mask) -> float:
    return float(values.mean()) if values.size else 1.0
