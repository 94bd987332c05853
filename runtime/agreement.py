"""How closely a target's logits, labels and exits agree with the fp32 PyTorch model.

The one place where two sets of logits are compared: by the export, by the check of a precision,
by the check of a built target, and by `Engine.check`. Needs only numpy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .artifact.manifest import Manifest, ProblemType, Task
from .errors import ArtifactError, VerificationError
from .rules.measures import Integers, Mask, Outputs
from .rules.rules import ExitRule
from .rules.runner import simulate

Logits = NDArray[np.float32]

# If fewer are left, near ties are compared as well: a share of almost nothing proves nothing.
_LEAST_COMPARED = 0.1


@dataclass(frozen=True)
class Requirements:
    """How closely a target must agree with the model.

    Attributes:
        labels: least share of equal labels.
        exits: least share of rows with the same exit.
        tie: a difference of logits that is expected from rounding. Where it could change a label,
            that label is a near tie and is not compared.
        score_tie: the same for the scores of the exit rule, and for the exits of rows.
        logits: largest difference of a logit; infinity: any finite difference is accepted.
    """

    labels: float
    exits: float
    tie: float
    score_tie: float
    logits: float = np.inf


# int8 is a different model rather than a different rounding: thresholds should be calibrated for it.
# So changed exits are only reported.
_INT8 = Requirements(labels=0.995, exits=0.0, tie=0.25, score_tie=0.0)
REQUIREMENTS = {
    "fp32": Requirements(labels=0.999, exits=0.99, tie=1e-3, score_tie=0.01),
    "fp16": Requirements(labels=0.999, exits=0.99, tie=0.01, score_tie=0.01),
    "bf16": Requirements(labels=0.999, exits=0.99, tie=0.08, score_tie=0.01),
    "int8": _INT8,
    "int8-bf16": _INT8,
}
"""What is required of a target, by its precision."""

EXPORT_REQUIREMENTS = Requirements(1.0, 1.0, tie=1e-4, score_tie=1e-3, logits=1e-4)
"""What is required of a fresh fp32 export, which runs where the PyTorch model ran."""

# Another CPU or driver rounds differently from the one on which the tolerance was measured.
_SLACK = 10


def requirements_of(name: str, manifest: Manifest) -> Requirements:
    """What is required of a target of a folder.

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
            "pip install -U fpabee",
        )
    required = REQUIREMENTS[target.precision]
    if target.tolerance is None:
        return required
    return dataclasses.replace(required, logits=max(_SLACK * target.tolerance, required.tie))


@dataclass(frozen=True)
class Agreement:
    """How closely a target agrees with the fp32 PyTorch model on some rows.

    Attributes:
        rows: how many rows were compared.
        max_logit_difference: largest absolute difference of a logit; NaN if one is not a number.
        label_agreement: share of (exit, row) pairs with the same labels, near ties left out.
        exit_agreement: share of rows with the same exit, near ties left out.
        near_ties: rows that were left out of either share. None are if hardly any would be left.
        required: the least shares and the largest difference with which the target passes.
        first_bad_exit: the first exit where logits, labels or the decision to stop differ too much;
            None if there is no such exit.
    """

    rows: int
    max_logit_difference: float
    label_agreement: float
    exit_agreement: float
    near_ties: int
    required: Requirements
    first_bad_exit: int | None = None

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
        del content["required"], content["first_bad_exit"]
        return content

    def __str__(self) -> str:
        required = self.required
        limit = f" (at most {required.logits:.0e} allowed)" if np.isfinite(required.logits) else ""
        least = f" (at least {required.exits:.0%} required)" if required.exits else ""
        ties = f"; near ties in {self.near_ties} of {self.rows} texts are not compared"
        return (
            f"logits differ by {self.max_logit_difference:.2e}{limit}, labels agree for "
            f"{self.label_agreement:.2%} (at least {required.labels:.1%} required), exits for "
            f"{self.exit_agreement:.2%}{least}{ties if self.near_ties else ''}"
        )


def must_pass(agreement: Agreement, what: str, hint: str) -> None:
    """Refuse a target that does not pass.

    Args:
        agreement: what its check found.
        what: what the message says that the target does from the first bad exit on.
        hint: what to change.

    Raises:
        VerificationError: the target does not pass.
    """
    if not agreement.passed:
        raise VerificationError(
            f"{what} from exit {agreement.first_bad_exit} on ({agreement.rows} texts): {agreement}",
            hint,
        )


def compare(
    found: Logits,
    expected: Logits,
    rule: ExitRule,
    task: Task,
    required: Requirements,
    first_exit: int = 1,
) -> Agreement:
    """Compare the logits of a target with those of the fp32 PyTorch model.

    Args:
        found: `[exits, rows, labels]` float32 of the target.
        expected: the same of the model.
        rule: the rule whose exits are compared.
        task: what the labels are, and their thresholds.
        required: how closely they must agree, and what is a near tie.
        first_exit: the exit of the first logits.
    """
    finite = np.isfinite(found).all(axis=-1)
    logits = np.where(np.isfinite(found), found, 0.0).astype(np.float32)
    differences = np.abs(found - expected).max(axis=-1, initial=0.0)

    same_labels = answers(logits, task) == answers(expected, task)
    same_labels = same_labels if same_labels.ndim == 2 else same_labels.all(axis=-1)
    same_labels &= finite
    ties = _few_enough(near_ties(expected, task, required.tie) & finite)

    exits, expected_exits = (_exits(z, rule, task, first_exit) for z in (logits, expected))
    same_exits = (exits == expected_exits) & finite.all(axis=0)
    close_exits = _few_enough(
        exits_near_ties(expected, rule, task, required.tie, first_exit, required.score_tie)
    )
    exit_agreement = _share(same_exits[~close_exits])

    bad = ~finite | (~same_labels & ~ties) | ~(differences <= required.logits)
    bad_exits = {*(np.flatnonzero(bad.any(axis=1)) + first_exit)}
    if exit_agreement < required.exits or not bad_exits:
        # For a row that stops at another exit, the first exit where only one of the two stops it.
        bad_exits |= {*np.minimum(exits, expected_exits)[~(same_exits | close_exits)]}
    return Agreement(
        rows=found.shape[1],
        max_logit_difference=float(differences.max(initial=0.0)),
        label_agreement=_share(same_labels[~ties]),
        exit_agreement=exit_agreement,
        near_ties=int((ties.any(axis=0) | close_exits).sum()),
        required=required,
        first_bad_exit=int(min(bad_exits)) if bad_exits else None,
    )


def answers(logits: Logits, task: Task) -> Integers:
    """Predicted labels: `[exits, rows]`, or for multi-label `[exits, rows, labels]`."""
    return np.stack([Outputs(z, task.problem_type, task.label_thresholds).answers for z in logits])


def near_ties(logits: Logits, task: Task, tolerance: float) -> Mask:
    """Where the labels may change if each logit moves by the tolerance: `[exits, rows]`."""
    if task.problem_type is ProblemType.MULTI_LABEL:
        margins = np.abs(logits - _threshold_logits(task))
        return np.asarray((margins <= tolerance).any(axis=-1))
    if logits.shape[-1] == 1:
        return np.asarray((np.abs(logits) <= tolerance).any(axis=-1))
    top = np.sort(logits, axis=-1)
    return np.asarray(top[..., -1] - top[..., -2] <= 2 * tolerance)


def exits_near_ties(
    logits: Logits,
    rule: ExitRule,
    task: Task,
    tolerance: float,
    first_exit: int = 1,
    score_tolerance: float | None = None,
) -> Mask:
    """Which rows may leave at another exit if logits and scores move by a tolerance: `[rows]`.

    A score moves by at most a few times as much as the logits, and less if it is small, so its
    tolerance is by default ten times as large, times the root of thresholds below 1.
    """
    is_relative = score_tolerance is None
    moved = 10 * tolerance if score_tolerance is None else score_tolerance
    low, high = (
        _exits(logits, rule.shifted(by, is_relative), task, first_exit) for by in (-moved, moved)
    )
    unsure = low != high
    if rule.uses_labels:
        unsure |= near_ties(logits, task, tolerance).any(axis=0)
    return np.asarray(unsure)


def _exits(logits: Logits, rule: ExitRule, task: Task, first_exit: int) -> Integers:
    return simulate(logits, rule, task.problem_type, task.label_thresholds, first_exit).exits


def _few_enough(ties: Mask) -> Mask:
    """The near ties to leave out: none if hardly anything would be left."""
    enough = ties.size == 0 or 1 - ties.mean() >= _LEAST_COMPARED
    return ties if enough else np.zeros_like(ties)


def _share(values: Mask) -> float:
    return float(values.mean()) if values.size else 1.0


def _threshold_logits(task: Task) -> NDArray[np.float64]:
    """The logit `[labels]` from which each label is predicted."""
    thresholds = np.asarray(task.label_thresholds or 0.5, np.float64)
    with np.errstate(divide="ignore"):  # no logit is near a threshold of 0 or 1
        return np.asarray(np.log(thresholds) - np.log1p(-thresholds))
